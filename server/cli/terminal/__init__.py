"""What subcommands share: their flags, help and failures, the banner, and text of strangers made safe to show."""

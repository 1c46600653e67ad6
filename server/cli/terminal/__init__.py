"""What subcommands share: their flags and help, the banner, and text of strangers made safe to show."""

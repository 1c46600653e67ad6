"""Where finished images are kept until they expire: a class for each scheme of a URL."""

"""The web pages of the server: the playground and the API reference."""

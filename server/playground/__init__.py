"""The two pages that come with the server: the playground, and the API reference."""

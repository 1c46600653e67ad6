"""What several measurements share: models, servers, memory figures, and the command line."""

"""`srpo generate`: requests drawn without a server, by this machine into files or by a cluster into a bucket."""

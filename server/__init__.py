"""HTTP: the wire contract, settings, keys, stored images. Knows no tensor."""

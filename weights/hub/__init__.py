"""Getting model files: pulling, verifying and listing what a published model is made of."""

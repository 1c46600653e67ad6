"""The FLUX step engine: diffusers' pipeline as prepare, step, preview and finish."""

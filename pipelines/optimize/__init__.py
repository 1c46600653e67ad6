"""Optimizations of an engine (compile, attention, fp8, batching), and what was measured about them."""

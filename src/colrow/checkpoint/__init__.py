"""Saved on one mesh, loaded on any other; exported for transformers."""

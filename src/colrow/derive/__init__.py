"""Derive a plan from a model's graph: no table of architectures, no GPU, and nothing sharded that no rule covers."""

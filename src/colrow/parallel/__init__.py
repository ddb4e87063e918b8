"""Applies a plan to a model on a mesh, with data axes, pipelines and recomputation."""

"""Running one rank of a model on fake tensors, and simulated ranks."""

"""What a mesh will cost, before a GPU is used: memory of a rank, time of a step, tokens/s."""

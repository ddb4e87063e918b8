"""A run and its folder: launch, ranks, loop, resume, stop, last lines."""

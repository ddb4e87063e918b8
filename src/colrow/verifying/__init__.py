"""Is a plan proved: loss, gradients and a step against one process."""

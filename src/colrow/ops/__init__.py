"""Pure functions, autograd operators and kernels."""

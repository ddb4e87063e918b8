"""colrow: tensor-parallel training for PyTorch. Plan, check, verify, train, keep."""

__version__ = "0.1.0"

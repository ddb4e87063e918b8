"""The plan as data: which module has which style."""

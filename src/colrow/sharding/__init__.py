"""Which region of a tensor lies where, and what each operator does to a sharded dim."""

"""The training step against one process, in fp64: small models × meshes; `python -m benchmarks.parity.table`."""

"""The collectives of one layer, and the fewest that a layer can have."""

from __future__ import annotations

from colrow.dryrun.result import DryRun

FEWEST = sorted([(op, way) for op in ("all_gather", "reduce_scatter") for way in ("forward", "backward")] * 2)


def per_layer(run: DryRun, layer: str) -> list[tuple[str, str]]:
    assert run.failure is None, run.failure
    return sorted((c.op, c.pass_) for c in run.collectives if c.where.startswith(layer))

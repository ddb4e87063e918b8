"""Placements as a plan writes them: `replicate`, `shard(N)`, `partial`, `none`."""

from __future__ import annotations

import re
from typing import Any

from torch.distributed.tensor import Partial, Replicate, Shard
from torch.distributed.tensor.placement_types import Placement

from colrow.errors import PlanError

_SHARD = re.compile(r"shard\((-?\d+)\)")


def parse_placement(text: Any) -> Placement | None:
    """`shard(1)` to Shard(1); None for `none`: an argument that is no tensor, or is left as it is."""
    if text is None or isinstance(text, Placement):
        return text
    match text:
        case "replicate":
            return Replicate()
        case "partial":
            return Partial()
        case "none":
            return None
    if isinstance(text, str) and (match_ := _SHARD.fullmatch(text)):
        return Shard(int(match_.group(1)))
    raise PlanError(f"unknown placement {text!r}: write replicate, shard(N), partial or none")


def format_placement(placement: Placement | None) -> str:
    """The inverse of parse_placement. Raises PlanError for a placement that a plan cannot name."""
    if placement is None:
        return "none"
    if type(placement) is Shard:
        return f"shard({placement.dim})"
    if type(placement) is Replicate:
        return "replicate"
    if type(placement) is Partial:
        return "partial"
    raise PlanError(f"placement {placement!r} has no name in a plan: use replicate, shard(N) or partial")

"""The layout of what a style's arithmetic made, by its shape: see `paired_runs`."""

from __future__ import annotations

from collections.abc import Sequence

from colrow.sharding.local_call import Shape
from colrow.sharding.local_layout import REPLICATED, STYLE, UNKNOWN, Layout, repeating, sharded
from colrow.styles.base import OutputSegment


def layout_shown(here: Shape, there: Shape, segments: Sequence[OutputSegment], ranks: int, *, gradient: bool) -> Layout:
    """Of a tensor that a module gets or gives: its shape on a rank and unsharded, and the segments of an output's last
    dim. A gradient of the same shape may be a sum over ranks or the complete one."""
    if len(here) != len(there):
        return UNKNOWN
    if segments and (here[-1], there[-1]) == (sum(s.local for s in segments), sum(s.size for s in segments)):
        held = tuple(s.local * ranks for s in segments)
        complete = tuple(i for i, s in enumerate(segments) if s.complete)
        return repeating(len(here) - 1, held, tuple(s.size for s in segments), complete)
    differing = [d for d, (a, b) in enumerate(zip(here, there, strict=True)) if a != b]
    if len(differing) == 1 and here[differing[0]] * ranks == there[differing[0]]:
        return sharded(differing[0])
    if differing:
        return UNKNOWN
    return STYLE if gradient else REPLICATED

"""Styles for fused weights and stacked experts: each part of a concatenation is split on its own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import ParallelStyle
from torch.distributed.tensor.placement_types import Placement

from colrow.errors import PlanError
from colrow.styles.base import ParameterLayout, Style, _Coerce, _one
from colrow.styles.cuts import Cut, CutStyle, check_cuts, layouts, named_cuts
from colrow.styles.site import Site


def _weight_dims(site: Site, style: str) -> tuple[int, int]:
    """Dimensions of output and input features of the weight: (0, 1) for a Linear, (1, 0) for transformers' Conv1D."""
    module: Any = site.module
    weight = module._parameters.get("weight")
    if weight is None or weight.dim() != 2 or isinstance(module, nn.Embedding):
        raise PlanError(
            f"{site.fqn}: style {style} is for a module that multiplies by a two-dimensional weight, not "
            f"{type(module).__name__}"
        )
    return (1, 0) if is_transposed(module) else (0, 1)


def is_transposed(module: nn.Module) -> bool:
    """Whether weights are [in, out]: transformers' Conv1D, and stacked experts that say so."""
    if isinstance(module, nn.Linear):
        return False
    return hasattr(module, "nf") or bool(getattr(module, "is_transposed", False))


def _numbers(value: Any) -> Any:
    return None if value is None else tuple(int(n) for n in value)


@dataclass(frozen=True, kw_only=True)
class PackedColwise(_Coerce, Style):
    """Linear or Conv1D whose output features are `segments` one after another, each split over tp. Those at the
    positions `whole` are computed by every rank (the one k and v head of multi-query attention); of those at the
    positions `kv`, which hold `kv_heads` for `heads` query heads, a rank computes what its query heads need.

    `input` is the layout of x outside; unless given, x comes as the enclosing `local_block` hands it over, and without
    one it is whole on each rank.
    """

    name = "packed_colwise"
    _coerce: ClassVar[dict[str, Any]] = {"input": _one, "segments": _numbers, "whole": _numbers, "kv": _numbers}
    segments: tuple[int, ...] | None = None
    whole: tuple[int, ...] | None = None
    kv: tuple[int, ...] | None = None
    heads: int | None = None
    kv_heads: int | None = None
    input: Placement | None = None

    def cuts(self, site: Site) -> dict[str, Cut]:
        out, _ = _weight_dims(site, self.name)
        weight: Any = site.module._parameters["weight"]
        segments = self.segments or (int(weight.shape[out]),)
        uneven: dict[str, Any] = {
            "whole": self.whole or (),
            "kv": self.kv or (),
            "heads": self.heads or 0,
            "kv_heads": self.kv_heads or 0,
        }
        cuts = {"weight": Cut(out, segments, **uneven)}
        if site.module._parameters.get("bias") is not None:
            cuts["bias"] = Cut(0, segments, **uneven)
        return cuts

    def check(self, site: Site) -> None:
        check_cuts(site, self.cuts(site))

    def build(self, site: Site) -> ParallelStyle:
        return CutStyle(self.cuts(site), self.input, None, partial=False, outside=Replicate())

    def parameters(self, site: Site) -> dict[str, ParameterLayout]:
        return layouts(site, self.cuts(site), "output features split, segment by segment")


@dataclass(frozen=True, kw_only=True)
class PackedRowwise(_Coerce, Style):
    """Linear or Conv1D whose input features are `segments` one after another, each split over tp; the output is a sum
    over ranks, brought to `output` (`partial` leaves the sum to the enclosing block)."""

    name = "packed_rowwise"
    _coerce: ClassVar[dict[str, Any]] = {"output": _one, "segments": _numbers}
    segments: tuple[int, ...] | None = None
    output: Placement | None = None

    def cuts(self, site: Site) -> dict[str, Cut]:
        _, into = _weight_dims(site, self.name)
        weight: Any = site.module._parameters["weight"]
        cuts = {"weight": Cut(into, self.segments or (int(weight.shape[into]),))}
        if site.module._parameters.get("bias") is not None:
            cuts["bias"] = Cut(scaled=True)
        return cuts

    def check(self, site: Site) -> None:
        check_cuts(site, self.cuts(site))

    def build(self, site: Site) -> ParallelStyle:
        return CutStyle(self.cuts(site), None, self.output or Replicate(), partial=True)

    def parameters(self, site: Site) -> dict[str, ParameterLayout]:
        return layouts(site, self.cuts(site), "input features split, segment by segment")


@dataclass(frozen=True, kw_only=True)
class LocalShards(_Coerce, Style):
    """Any module whose own parameters are split as `shards` says: name to dim, or to {dim, segments, whole}. Its
    forward runs on the parts. For stacked experts: `{gate_up_proj: {dim: 1, segments: [F, F]}, down_proj: 2}`.

    A parameter left out stays whole with its gradient summed; one that is added to a partial sum is
    `{scaled: true}`. `output` (default `partial`: left to the enclosing block) says what the output becomes when the
    module ends in a sum over ranks.
    """

    name = "local_shards"
    _coerce: ClassVar[dict[str, Any]] = {"output": _one, "input": _one}
    shards: dict[str, Any] | None = None
    input: Placement | None = None
    output: Placement | None = None

    def cuts(self, site: Site) -> dict[str, Cut]:
        return named_cuts(site, self.name, self.shards or {})

    def check(self, site: Site) -> None:
        check_cuts(site, self.cuts(site))

    def build(self, site: Site) -> ParallelStyle:
        return CutStyle(self.cuts(site), self.input, self.output, partial=self.output is not None)

    def parameters(self, site: Site) -> dict[str, ParameterLayout]:
        return layouts(site, self.cuts(site), "split over tp; the module runs on its part")

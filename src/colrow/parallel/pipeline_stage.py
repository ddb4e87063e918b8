"""Stages: parts of a single-device model, each a model of its own with the same names.

A stage is the model with everything that another stage runs set to None (`embed_tokens`, entries of `layers`, `norm`,
`lm_head`), so that `layers.17.mlp.up_proj.weight` is called so on every mesh. Stage s runs on rank s mod pp of the
pipeline axis.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from colrow.errors import ConfigError
from colrow.parallel.parallelize import tied_parameters
from colrow.parallel.pipeline_split import require_parts

_ENDS = ("embed_tokens", "norm", "lm_head")


@dataclass(frozen=True)
class Tie:
    """One parameter of the whole model that two stages need: each holds a copy, and `original` is the one that counts
    in norms and stands in checkpoints."""

    original: str
    original_stage: int
    copy: str
    copy_stage: int


@dataclass(frozen=True)
class Stage:
    """One pipeline stage on this rank."""

    module: nn.Module
    index: int
    count: int
    """Stages over all ranks."""
    absent: frozenset[str]
    """Names of the whole model's modules that other stages hold: `parallelize` wants them."""
    ties: tuple[Tie, ...]
    """All parameters that two stages share, the same on every rank."""

    @property
    def first(self) -> bool:
        return self.index == 0

    @property
    def last(self) -> bool:
        return self.index == self.count - 1

    @property
    def blocks(self) -> list[nn.Module]:
        """The layers that this stage runs, in order."""
        layers: Any = self.module.layers
        return [layer for layer in layers if layer is not None]

    @property
    def copies(self) -> dict[str, str]:
        """Parameters here that are copies of another stage's: their names to the original's. They take the original's
        initial value, and a checkpoint holds the original alone."""
        return {tie.copy: tie.original for tie in self.ties if tie.copy_stage == self.index}


def cut_stages(model: nn.Module, mesh: DeviceMesh, first_layers: tuple[int, ...]) -> list[Stage]:
    """This rank's stages of `model`, in order; the model itself stays as it is.

    Each stage is a copy of its part, so cut while the model is on the meta device, where a copy costs nothing.

    Args:
        model: has `layers` and may have `embed_tokens`, `norm` and `lm_head`; runs with any of them, and any layers,
            set to None, and takes `seq_len` (as `colrow.models.llama.Llama` does).
        mesh: has the axis pp.
        first_layers: the first layer of each stage after the first (`split_layers`, or `pipeline.split`).

    Raises:
        ConfigError: the model cannot be cut, or the stages do not spread evenly over pp.
    """
    layers = require_parts(model)
    pp, count = mesh["pp"].size(), len(first_layers) + 1
    if count % pp:
        raise ConfigError(f"{count} stages do not spread evenly over pp={pp}: cut the model into a multiple of {pp}")
    bounds = [0, *first_layers, len(layers)]
    ties = _ties(model, bounds)
    everything = {name for name, _ in model.named_modules(remove_duplicate=False)}
    stages = []
    for index in range(mesh["pp"].get_local_rank(), count, pp):
        with _only(model, range(bounds[index], bounds[index + 1]), index == 0, index == count - 1):
            part = copy.deepcopy(model)
        present = {name for name, _ in part.named_modules(remove_duplicate=False)}
        stages.append(Stage(part, index, count, frozenset(everything - present), ties))
    return stages


@contextmanager
def _only(model: nn.Module, kept: range, first: bool, last: bool) -> Iterator[None]:
    """Hide from `model` what the stage does not hold."""
    layers: Any = model.layers
    dropped = {**({} if first else {"embed_tokens": None}), **({} if last else {"norm": None, "lm_head": None})}
    ends = {name: getattr(model, name) for name in dropped}
    hidden = {i: layer for i, layer in enumerate(layers) if i not in kept}
    try:
        for name in ends:
            setattr(model, name, None)
        for i in hidden:
            layers[i] = None
        yield
    finally:
        for name, module in ends.items():
            setattr(model, name, module)
        for i, layer in hidden.items():
            layers[i] = layer


def _ties(model: nn.Module, bounds: list[int]) -> tuple[Tie, ...]:
    """Tied parameters that lie in different stages."""
    last = len(bounds) - 2

    def stage_of(name: str) -> int:
        kind, _, rest = name.partition(".")
        if kind == "layers":
            layer = int(rest.partition(".")[0])
            return next(stage for stage in range(last + 1) if layer < bounds[stage + 1])
        return 0 if kind == "embed_tokens" else last

    ties = []
    for names in tied_parameters(model):
        stages = [stage_of(name) for name in names]
        if len(set(stages)) == 1:
            continue
        if len(names) > 2:
            raise ConfigError(
                f"{', '.join(names)} are one parameter in {len(set(stages))} pipeline stages, and only two stages can "
                "share one: move the cut (pipeline.split) so that the layers which share it are in one stage"
            )
        ties.append(Tie(names[0], stages[0], names[1], stages[1]))
    return tuple(ties)

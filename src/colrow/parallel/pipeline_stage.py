"""Pipeline stages of a single-device model, each a model of its own with the same names.

A stage is the model with everything that another stage runs set to None (`embed_tokens`, entries of `layers`, `norm`,
`lm_head`), so that `layers.17.mlp.up_proj.weight` is called so on every mesh. Stage s runs on rank s mod pp of the
pipeline axis.

[Note: ties over stages]
A parameter that two stages need (an embedding that is the output head too) cannot be one tensor: each stage holds a
copy. Both start from the original's values; after every step's backward the two partial gradients are exchanged and
summed, and since a + b == b + a in floating point, both optimizers see the same bits and the copies never differ. The
copy is left out where a parameter counts once: in the gradient norm and in checkpoints.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from colrow.errors import ConfigError
from colrow.mesh import MeshAxes
from colrow.models.blocks import blocks_of
from colrow.parallel.parallelize import tied_parameters
from colrow.parallel.pipeline_split import require_parts
from colrow.sharding.parameter_state import copied_model


@dataclass(frozen=True)
class Tie:
    """A parameter that two stages hold, by its two names: see [Note: ties over stages]."""

    original: str
    original_stage: int
    copy: str
    copy_stage: int


@dataclass(frozen=True)
class Stage:
    """One pipeline stage on this rank; without a pipeline the model is the only one."""

    module: nn.Module
    index: int = 0
    count: int = 1
    """Stages over all ranks."""
    absent: frozenset[str] = frozenset()
    """Names of the model's modules that other stages hold: `parallelize` needs them."""
    ties: tuple[Tie, ...] = ()
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
        return blocks_of(self.module)

    @property
    def copies(self) -> dict[str, str]:
        """Parameters here that are copies of another stage's: their names to the original's."""
        return {tie.copy: tie.original for tie in self.ties if tie.copy_stage == self.index}


def split_stages(model: nn.Module, mesh: DeviceMesh, first_layers: tuple[int, ...]) -> list[Stage]:
    """This rank's stages of `model`, in order; the model itself stays as it is.

    Each stage is a copy, so split while the model is on the meta device, where a copy costs nothing. Without a
    pipeline (pp 1 and no `first_layers`) the stage is the model itself, any model.

    Args:
        model: has `layers` and may have `embed_tokens`, `norm` and `lm_head`; runs with any of them, and any layers,
            set to None, and takes `seq_len` (as `colrow.models.llama.Llama` does).
        mesh: has the axis pp.
        first_layers: the first layer of each stage after the first (`split_layers`, or `pipeline.split`).

    Raises:
        ConfigError: the model cannot be split, or pp does not divide the stages.
    """
    axes, count = MeshAxes(mesh), len(first_layers) + 1
    pp = axes.size("pp")
    if pp == count == 1:
        return [Stage(model)]
    layers = require_parts(model)
    if count % pp:
        raise ConfigError(f"pp={pp} does not divide {count} stages: split the model into a multiple of {pp}")
    bounds = [0, *first_layers, len(layers)]
    ties = _ties(model, bounds)
    all_names = {name for name, _ in model.named_modules(remove_duplicate=False)}
    stages = []
    # stage s on rank s mod pp, as torch's interleaved schedules expect
    for index in range(axes.rank("pp"), count, pp):
        module = stage_copy(model, bounds, index)
        present = {name for name, _ in module.named_modules(remove_duplicate=False)}
        stages.append(Stage(module, index, count, frozenset(all_names - present), ties))
    return stages


def stage_copy(model: nn.Module, bounds: Sequence[int], index: int) -> nn.Module:
    """A copy of what stage `index` holds of the model, whose layers are parted at `bounds`."""
    with _only(model, range(bounds[index], bounds[index + 1]), index == 0, index == len(bounds) - 2):
        return copied_model(model)


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
        top, _, rest = name.partition(".")
        if top == "layers":
            layer = int(rest.partition(".")[0])
            return next(stage for stage in range(last + 1) if layer < bounds[stage + 1])
        return 0 if top == "embed_tokens" else last

    ties = []
    for names in tied_parameters(model):
        stages = [stage_of(name) for name in names]
        if len(set(stages)) == 1:
            continue
        if len(names) > 2:
            raise ConfigError(
                f"{', '.join(names)} are one parameter in {len(set(stages))} pipeline stages, and only two stages can "
                "share one: move the split (pipeline.split) so that the layers which share it are in one stage"
            )
        ties.append(Tie(names[0], stages[0], names[1], stages[1]))
    return tuple(ties)

"""torch's own styles of activations: `sequence`, `prepare_input`, `prepare_output` and `prepare_input_output`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self

from torch.distributed.tensor.parallel import (
    ParallelStyle,
    PrepareModuleInput,
    PrepareModuleInputOutput,
    PrepareModuleOutput,
    SequenceParallel,
)
from torch.distributed.tensor.placement_types import Placement

from colrow.errors import PlanError
from colrow.styles.base import NegativeControl, ParameterLayout, Style, replicated
from colrow.styles.options import named_placements_of, option, placements_of
from colrow.styles.site import Site

Placements = tuple[Placement | None, ...]
NamedPlacements = dict[str, Placement | None]


@dataclass(frozen=True, kw_only=True)
class Sequence(Style):
    """A norm or dropout that runs on this rank's shard of dimension `sequence_dim`; its parameters are replicated."""

    name = "sequence"
    torch_class = SequenceParallel
    sums_gradients = True
    negative_control = NegativeControl("replicate", "style sequence left out")
    sequence_dim: int = 1
    use_local_output: bool = False

    @classmethod
    def from_torch(cls, style: Any) -> Self:
        # torch keeps the dim as a placement
        return cls(sequence_dim=style.sequence_sharding[0].dim, use_local_output=style.use_local_output)

    def build(self, site: Site) -> ParallelStyle:
        return SequenceParallel(sequence_dim=self.sequence_dim, use_local_output=self.use_local_output)

    def check(self, site: Site) -> None:
        # torch's style would register the parameters of children as the module's own
        if next(site.module.children(), None) is not None:
            message = "style sequence is for a norm or dropout, not for a module with children"
            raise PlanError("CR206", site.fqn, message, "name the norms inside it")

    def parameters(self, site: Site) -> dict[str, ParameterLayout]:
        return replicated(site.module, f"used on a shard of dim {self.sequence_dim}; gradients summed over tp")


@dataclass(frozen=True, kw_only=True)
class _PrepareInput(Style):
    input: Placements | None = option(placements_of)
    desired: Placements | None = option(placements_of)
    input_kwargs: NamedPlacements | None = option(named_placements_of)
    desired_kwargs: NamedPlacements | None = option(named_placements_of)

    def input_layouts(self) -> dict[str, Any]:
        """The options of inputs as torch's classes take them."""
        return {
            "input_layouts": self.input,
            "desired_input_layouts": self.desired,
            "input_kwarg_layouts": self.input_kwargs,
            "desired_input_kwarg_layouts": self.desired_kwargs,
        }

    def check(self, site: Site) -> None:
        _check_lengths(site, "input", self.input, "desired", self.desired)
        _check_lengths(site, "input_kwargs", self.input_kwargs, "desired_kwargs", self.desired_kwargs)


@dataclass(frozen=True, kw_only=True)
class PrepareInput(_PrepareInput):
    """Bring a module's inputs from one layout to another: `input` to `desired`, one entry for each positional
    argument, and `input_kwargs` to `desired_kwargs` by name."""

    name = "prepare_input"
    torch_class = PrepareModuleInput
    gathers_for_children = True
    use_local_output: bool = False

    @classmethod
    def from_torch(cls, style: Any) -> Self:
        return cls(use_local_output=style.use_local_output, **_torch_inputs(style))

    def build(self, site: Site) -> ParallelStyle:
        return PrepareModuleInput(**self.input_layouts(), use_local_output=self.use_local_output)


@dataclass(frozen=True, kw_only=True)
class PrepareOutput(Style):
    """Bring a module's outputs from layout `output` to `desired`."""

    name = "prepare_output"
    torch_class = PrepareModuleOutput
    output: Placements | None = option(placements_of)
    desired: Placements | None = option(placements_of)
    use_local_output: bool = True

    @classmethod
    def from_torch(cls, style: Any) -> Self:
        return cls(
            output=style.output_layouts, desired=style.desired_output_layouts, use_local_output=style.use_local_output
        )

    def build(self, site: Site) -> ParallelStyle:
        return PrepareModuleOutput(
            output_layouts=self.output,  # type: ignore[arg-type]
            desired_output_layouts=self.desired,  # type: ignore[arg-type]
            use_local_output=self.use_local_output,
        )

    def check(self, site: Site) -> None:
        _require_both(site, self.name, self.output, "desired", self.desired)
        _check_lengths(site, "output", self.output, "desired", self.desired)


@dataclass(frozen=True, kw_only=True)
class PrepareInputOutput(_PrepareInput):
    """`prepare_input` (`input` to `desired`) and `prepare_output` (`output` to `desired_output`) in one."""

    name = "prepare_input_output"
    torch_class = PrepareModuleInputOutput
    use_local_input: bool = False
    output: Placements | None = option(placements_of)
    desired_output: Placements | None = option(placements_of)
    use_local_output: bool = True

    @classmethod
    def from_torch(cls, style: Any) -> Self:
        return cls(
            use_local_input=style.prepare_module_input.use_local_output,
            output=style.prepare_module_output.output_layouts,
            desired_output=style.prepare_module_output.desired_output_layouts,
            use_local_output=style.prepare_module_output.use_local_output,
            **_torch_inputs(style.prepare_module_input),
        )

    def build(self, site: Site) -> ParallelStyle:
        return PrepareModuleInputOutput(
            **self.input_layouts(),
            use_local_input=self.use_local_input,
            output_layouts=self.output,  # type: ignore[arg-type]
            desired_output_layouts=self.desired_output,  # type: ignore[arg-type]
            use_local_output=self.use_local_output,
        )

    def check(self, site: Site) -> None:
        _require_both(site, self.name, self.output, "desired_output", self.desired_output)
        super().check(site)
        _check_lengths(site, "output", self.output, "desired_output", self.desired_output)


def _torch_inputs(style: Any) -> dict[str, Any]:
    return {
        "input": style.input_layouts,
        "desired": style.desired_input_layouts,
        "input_kwargs": style.input_kwarg_layouts or None,  # torch keeps {} where None was given
        "desired_kwargs": style.desired_input_kwarg_layouts or None,
    }


def _require_both(site: Site, style: str, output: Any, name: str, desired: Any) -> None:
    if output is None or desired is None:
        raise site.wrong_options(f"an option of style {style} is missing", f"give it both 'output' and {name!r}")


def _check_lengths(site: Site, option: str, given: Any, other: str, desired: Any) -> None:
    if (given is None) != (desired is None) or (given is not None and len(given) != len(desired)):
        raise site.wrong_options(
            f"{option} and {other} are of different lengths", "give each of them one entry for every argument"
        )

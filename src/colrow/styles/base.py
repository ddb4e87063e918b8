"""Styles: how one module is parallelised. Each is data, and builds a torch `ParallelStyle`.

A style's options are its dataclass fields, so that a plan can be read, printed, compared and saved. `build` makes
what torch applies; `parameters` says, without a process group, what each parameter of the module becomes.
"""

from __future__ import annotations

import copy
import dataclasses
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    PrepareModuleInput,
    PrepareModuleInputOutput,
    PrepareModuleOutput,
    RowwiseParallel,
    SequenceParallel,
)
from torch.distributed.tensor.placement_types import Placement

from colrow.errors import PlanError, did_you_mean
from colrow.sharding.layout import Packed
from colrow.sharding.placements import format_placement, parse_placement
from colrow.styles.heads import check_heads
from colrow.styles.site import Site, divide

STYLES: dict[str, type[Style]] = {}


@dataclass(frozen=True)
class ParameterLayout:
    """What a parameter becomes over tp: its placement, the shape of a rank's part, and one line of reason."""

    placement: Placement
    local_shape: tuple[int, ...]
    reason: str
    packed: Packed | None = None


@dataclass(frozen=True, kw_only=True)
class Style(ABC):
    """One way to parallelise a module. Subclasses name their options as fields."""

    name: ClassVar[str]
    on_one_rank: ClassVar[bool] = False
    """The style changes what the module computes, and so applies where tp is 1 too."""
    token_order: ClassVar[str] = ""
    """What the style does with the tokens of a rank: `sequence` (its part of each sequence), `row` (its part of all
    tokens in a row), or neither. A plan holds to one of them."""
    optional: bool = False
    """The plan's key may match nothing (an option of the architecture, such as q/k norms)."""
    attributes: dict[str, Any] | None = None
    """Attributes of the module that hold a size of which a rank has less (`num_heads`, `config.num_attention_heads`):
    `/tp` divides the value by tp, a number replaces it. A config is copied for the module."""

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if "name" in cls.__dict__:
            STYLES[cls.name] = cls

    @abstractmethod
    def build(self, site: Site) -> ParallelStyle:
        """A fresh torch style for this module."""

    def check(self, site: Site) -> None:
        """Raise PlanError, with the mend, when the style cannot work on this module at this degree."""

    def local_attributes(self, site: Site) -> dict[str, int]:
        """The values that `attributes` get on a rank. Raises PlanError for a missing or indivisible one."""
        out = {}
        for key, value in (self.attributes or {}).items():
            old: Any = site.module
            for part in key.split("."):
                old = getattr(old, part, None)
            if type(old) is not int:
                raise PlanError(f"{site.fqn} has no integer attribute {key!r}: correct the option attributes")
            out[key] = divide(old, site.tp, f"{site.fqn}.{key}={old}") if value == "/tp" else int(value)
        return out

    def parameters(self, site: Site) -> dict[str, ParameterLayout]:
        """What the module's own parameters become; none for styles that touch only activations."""
        return {}

    def options(self) -> dict[str, Any]:
        """The options that differ from their defaults, as plain values."""
        return {
            field.name: _plain(value)
            for field in dataclasses.fields(self)
            if (value := getattr(self, field.name)) != field.default
        }

    def to_data(self) -> str | dict[str, Any]:
        """What a plan file says: the name alone, or a mapping with the options."""
        options = self.options()
        return {"style": self.name, **options} if options else self.name


def set_attribute(module: nn.Module, key: str, value: int | str, tp: int) -> None:
    """Give an integer attribute its local value; `config.NAME` changes a copy of the config that only `module` sees."""
    holder: Any = module
    *path, last = key.split(".")
    for part in path:
        own = copy.copy(getattr(holder, part))
        object.__setattr__(holder, part, own)
        holder = own
    object.__setattr__(holder, last, getattr(holder, last) // tp if value == "/tp" else value)


def style_from_data(data: Any, where: str) -> Style:
    """The style that a plan says at `where`: a name, a mapping, a Style, or one of torch's own style objects."""
    if isinstance(data, Style):
        return data
    if isinstance(data, ParallelStyle):
        return from_torch(data)
    if isinstance(data, str):
        data = {"style": data}
    if not isinstance(data, dict) or "style" not in data:
        raise PlanError(f"{where}: a style is a name or a mapping with the key 'style', not {data!r}")
    options = {str(key): value for key, value in data.items() if key != "style"}
    cls = STYLES.get(str(data["style"]))
    if cls is None:
        raise PlanError(f"{where}: unknown style {data['style']!r}{did_you_mean(str(data['style']), STYLES)}")
    known = {field.name for field in dataclasses.fields(cls)}
    for key in options:
        if key not in known:
            raise PlanError(f"{where}: style {cls.name} has no option {key!r}{did_you_mean(key, known)}")
    try:
        return cls(**options)
    except TypeError as error:
        raise PlanError(f"{where}: style {cls.name}: {error}") from error
    except PlanError as error:
        raise PlanError(f"{where}: {error}") from error


def from_torch(style: ParallelStyle) -> Style:
    """The same style as data. A class of the user's own is kept as it is (`opaque`)."""
    kind: Any = type(style)
    s: Any = style
    if kind is ColwiseParallel or kind is RowwiseParallel:
        cls = Colwise if kind is ColwiseParallel else Rowwise
        return cls(input=s.input_layouts[0], output=s.output_layouts[0], use_local_output=s.use_local_output)
    if kind is SequenceParallel:
        return Sequence(sequence_dim=s.sequence_sharding[0].dim, use_local_output=s.use_local_output)
    if kind is PrepareModuleInput:
        return PrepareInput(use_local_output=s.use_local_output, **_torch_inputs(s))
    if kind is PrepareModuleOutput:
        return PrepareOutput(
            output=s.output_layouts, desired=s.desired_output_layouts, use_local_output=s.use_local_output
        )
    if kind is PrepareModuleInputOutput:
        return PrepareInputOutput(
            use_local_input=s.prepare_module_input.use_local_output,
            output=s.prepare_module_output.output_layouts,
            desired_output=s.prepare_module_output.desired_output_layouts,
            use_local_output=s.prepare_module_output.use_local_output,
            **_torch_inputs(s.prepare_module_input),
        )
    return Opaque(object=style)


def token_order(style: Style) -> str:
    """`row`, `sequence` or neither (""): see `Style.token_order`. Shards of dimension 1 are parts of sequences."""
    if style.token_order:
        return style.token_order
    values = [getattr(style, field.name) for field in dataclasses.fields(style)]
    values += [item for value in values if isinstance(value, dict) for item in value.values()]
    values += [item for value in values if isinstance(value, tuple) for item in value]
    shards = any(isinstance(value, Shard) and value.dim == 1 for value in values)
    return "sequence" if shards or getattr(style, "sequence_dim", 0) == 1 else ""


def _torch_inputs(style: Any) -> dict[str, Any]:
    return {
        "input": style.input_layouts,
        "desired": style.desired_input_layouts,
        "input_kwargs": style.input_kwarg_layouts or None,
        "desired_kwargs": style.desired_input_kwarg_layouts or None,
    }


def _plain(value: Any) -> Any:
    if isinstance(value, Placement):
        return format_placement(value)
    if isinstance(value, tuple | list):
        return ["none" if item is None else _plain(item) for item in value]
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return value


def _one(value: Any) -> Any:
    return parse_placement(value)


def _many(value: Any) -> Any:
    """A tuple of placements; a single one stands for one argument."""
    if value is None:
        return None
    if isinstance(value, tuple | list):
        return tuple(parse_placement(item) for item in value)
    return (parse_placement(value),)


def _named(value: Any) -> Any:
    if value is None:
        return None
    if not isinstance(value, dict):
        raise PlanError(f"keyword layouts are a mapping from argument to placement, not {value!r}")
    return {str(key): parse_placement(item) for key, item in value.items()}


class _Coerce:
    """Turns options given as text into placements when a style is made."""

    _coerce: ClassVar[dict[str, Any]] = {}

    def __post_init__(self) -> None:
        for name, convert in self._coerce.items():
            object.__setattr__(self, name, convert(getattr(self, name)))


def replicated(module: nn.Module, reason: str) -> dict[str, ParameterLayout]:
    """Every own parameter of the module whole on each rank."""
    return {
        name: ParameterLayout(Replicate(), tuple(param.shape), reason)
        for name, param in module.named_parameters(recurse=False)
    }


def _to_write_into(_: nn.Module, __: Any, out: Any) -> Any:
    """An embedding's local output as a tensor that a model may change in place (`x *= scale`), without a copy.

    What a DTensor hands over is a view made inside an autograd Function, which autograd lets nobody write into. Nothing
    keeps a looked-up row for backward, so that to write into it is safe. A collective that still runs is waited for.
    """
    local = isinstance(out, Tensor) and not isinstance(out, DTensor)
    return torch.ops.aten._unsafe_view.default(out, out.shape) if local else out


class _RowwiseLookup(RowwiseParallel):
    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        module = super()._apply(module, device_mesh)
        module.register_forward_hook(_to_write_into)
        return module


class _ColwiseLookup(ColwiseParallel):
    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        module = super()._apply(module, device_mesh)
        module.register_forward_hook(_to_write_into)
        return module


@dataclass(frozen=True, kw_only=True)
class Colwise(_Coerce, Style):
    """Linear: output features split, x whole in, y split out. Embedding: the embedding dimension split."""

    name = "colwise"
    _coerce: ClassVar[dict[str, Any]] = {"input": _one, "output": _one}
    input: Placement | None = None
    output: Placement | None = None
    use_local_output: bool = True

    def build(self, site: Site) -> ParallelStyle:
        kind = _ColwiseLookup if isinstance(site.module, nn.Embedding) else ColwiseParallel
        return kind(input_layouts=self.input, output_layouts=self.output, use_local_output=self.use_local_output)

    @property
    def output_stays_split(self) -> bool:
        return self.output is None or (isinstance(self.output, Shard) and self.output.dim == -1)

    def check(self, site: Site) -> None:
        module = _require(site, self.name, nn.Linear, nn.Embedding)
        if isinstance(module, nn.Embedding):
            divide(module.embedding_dim, site.tp, f"{site.fqn}: embedding_dim={module.embedding_dim}")
            return
        if self.output_stays_split:
            check_heads(site)
        divide(module.out_features, site.tp, f"{site.fqn}: out_features={module.out_features}")

    def parameters(self, site: Site) -> dict[str, ParameterLayout]:
        module = site.module
        if isinstance(module, nn.Embedding):
            rows, dim = module.weight.shape
            return {"weight": ParameterLayout(Shard(1), (rows, dim // site.tp), "embedding dimension split")}
        return {
            name: ParameterLayout(Shard(0), (param.shape[0] // site.tp, *param.shape[1:]), "output features split")
            for name, param in module.named_parameters(recurse=False)
        }


@dataclass(frozen=True, kw_only=True)
class Rowwise(_Coerce, Style):
    """Linear: input features split, x split in, y a sum over ranks. Embedding: the vocabulary split."""

    name = "rowwise"
    _coerce: ClassVar[dict[str, Any]] = {"input": _one, "output": _one}
    input: Placement | None = None
    output: Placement | None = None
    use_local_output: bool = True

    def build(self, site: Site) -> ParallelStyle:
        kind = _RowwiseLookup if isinstance(site.module, nn.Embedding) else RowwiseParallel
        return kind(input_layouts=self.input, output_layouts=self.output, use_local_output=self.use_local_output)

    def check(self, site: Site) -> None:
        module = _require(site, self.name, nn.Linear, nn.Embedding)
        if isinstance(module, nn.Embedding):
            divide(module.num_embeddings, site.tp, f"{site.fqn}: vocab_size={module.num_embeddings}")
        else:
            divide(module.in_features, site.tp, f"{site.fqn}: in_features={module.in_features}")

    def parameters(self, site: Site) -> dict[str, ParameterLayout]:
        module = site.module
        if isinstance(module, nn.Embedding):
            rows, dim = module.weight.shape
            return {"weight": ParameterLayout(Shard(0), (rows // site.tp, dim), "vocabulary split")}
        layouts = replicated(module, "bias, added once after the sum")
        assert isinstance(module.weight, nn.Parameter)
        out, features = module.weight.shape
        layouts["weight"] = ParameterLayout(Shard(1), (out, features // site.tp), "input features split")
        return layouts


@dataclass(frozen=True, kw_only=True)
class Sequence(Style):
    """A norm or dropout that runs on this rank's part of dimension `sequence_dim`; its parameters stay whole."""

    name = "sequence"
    sequence_dim: int = 1
    use_local_output: bool = False

    def build(self, site: Site) -> ParallelStyle:
        return SequenceParallel(sequence_dim=self.sequence_dim, use_local_output=self.use_local_output)

    def check(self, site: Site) -> None:
        if next(site.module.children(), None) is not None:
            raise PlanError(
                f"{site.fqn}: style sequence is for a norm or dropout, not for a module with children: "
                "name the norms inside it"
            )

    def parameters(self, site: Site) -> dict[str, ParameterLayout]:
        return replicated(site.module, f"used on a shard of dim {self.sequence_dim}; gradients summed over tp")


@dataclass(frozen=True, kw_only=True)
class PrepareInput(_Coerce, Style):
    """Bring a module's inputs from one layout to another: `input` to `desired`, one entry for each positional
    argument, and `input_kwargs` to `desired_kwargs` by name."""

    name = "prepare_input"
    _coerce: ClassVar[dict[str, Any]] = {
        "input": _many,
        "desired": _many,
        "input_kwargs": _named,
        "desired_kwargs": _named,
    }
    input: tuple[Placement | None, ...] | None = None
    desired: tuple[Placement | None, ...] | None = None
    input_kwargs: dict[str, Placement | None] | None = None
    desired_kwargs: dict[str, Placement | None] | None = None
    use_local_output: bool = False

    def build(self, site: Site) -> ParallelStyle:
        return PrepareModuleInput(
            input_layouts=self.input,
            desired_input_layouts=self.desired,
            input_kwarg_layouts=self.input_kwargs,  # type: ignore[arg-type]
            desired_input_kwarg_layouts=self.desired_kwargs,  # type: ignore[arg-type]
            use_local_output=self.use_local_output,
        )

    def check(self, site: Site) -> None:
        _same_length(site, "input", self.input, "desired", self.desired)
        _same_length(site, "input_kwargs", self.input_kwargs, "desired_kwargs", self.desired_kwargs)


@dataclass(frozen=True, kw_only=True)
class PrepareOutput(_Coerce, Style):
    """Bring a module's outputs from layout `output` to `desired`."""

    name = "prepare_output"
    _coerce: ClassVar[dict[str, Any]] = {"output": _many, "desired": _many}
    output: tuple[Placement | None, ...] | None = None
    desired: tuple[Placement | None, ...] | None = None
    use_local_output: bool = True

    def build(self, site: Site) -> ParallelStyle:
        return PrepareModuleOutput(
            output_layouts=self.output,  # type: ignore[arg-type]
            desired_output_layouts=self.desired,  # type: ignore[arg-type]
            use_local_output=self.use_local_output,
        )

    def check(self, site: Site) -> None:
        if self.output is None or self.desired is None:
            raise PlanError(f"{site.fqn}: style prepare_output needs both 'output' and 'desired'")
        _same_length(site, "output", self.output, "desired", self.desired)


@dataclass(frozen=True, kw_only=True)
class PrepareInputOutput(_Coerce, Style):
    """`prepare_input` (`input` to `desired`) and `prepare_output` (`output` to `desired_output`) in one."""

    name = "prepare_input_output"
    _coerce: ClassVar[dict[str, Any]] = {
        "input": _many,
        "desired": _many,
        "input_kwargs": _named,
        "desired_kwargs": _named,
        "output": _many,
        "desired_output": _many,
    }
    input: tuple[Placement | None, ...] | None = None
    desired: tuple[Placement | None, ...] | None = None
    input_kwargs: dict[str, Placement | None] | None = None
    desired_kwargs: dict[str, Placement | None] | None = None
    use_local_input: bool = False
    output: tuple[Placement | None, ...] | None = None
    desired_output: tuple[Placement | None, ...] | None = None
    use_local_output: bool = True

    def build(self, site: Site) -> ParallelStyle:
        return PrepareModuleInputOutput(
            input_layouts=self.input,
            desired_input_layouts=self.desired,
            input_kwarg_layouts=self.input_kwargs,  # type: ignore[arg-type]
            desired_input_kwarg_layouts=self.desired_kwargs,  # type: ignore[arg-type]
            use_local_input=self.use_local_input,
            output_layouts=self.output,  # type: ignore[arg-type]
            desired_output_layouts=self.desired_output,  # type: ignore[arg-type]
            use_local_output=self.use_local_output,
        )

    def check(self, site: Site) -> None:
        if self.output is None or self.desired_output is None:
            raise PlanError(f"{site.fqn}: style prepare_input_output needs both 'output' and 'desired_output'")
        _same_length(site, "input", self.input, "desired", self.desired)
        _same_length(site, "input_kwargs", self.input_kwargs, "desired_kwargs", self.desired_kwargs)
        _same_length(site, "output", self.output, "desired_output", self.desired_output)


@dataclass(frozen=True, kw_only=True)
class Opaque(Style):
    """A ParallelStyle class of the user's own. It is applied as it is; a plan that holds one cannot be saved."""

    name = "opaque"
    object: Any = None

    def build(self, site: Site) -> ParallelStyle:
        if not isinstance(self.object, ParallelStyle):
            raise PlanError(f"{site.fqn}: style opaque is made from a ParallelStyle object, in Python only")
        return self.object

    def options(self) -> dict[str, Any]:
        raise PlanError(
            f"{type(self.object).__name__} is a style of your own and has no name in a plan file: "
            "keep the plan in Python, or use one of " + ", ".join(sorted(set(STYLES) - {"opaque"}))
        )


def _require(site: Site, style: str, *kinds: type[nn.Module]) -> Any:
    module = site.module
    if not isinstance(module, kinds):
        names = " or ".join(f"nn.{kind.__name__}" for kind in kinds)
        raise PlanError(f"{site.fqn}: style {style} is for {names}, not for {type(module).__name__}")
    return module


def _same_length(site: Site, name: str, given: Any, other: str, wanted: Any) -> None:
    if (given is None) != (wanted is None) or (given is not None and len(given) != len(wanted)):
        raise PlanError(f"{site.fqn}: {name} and {other} need one entry each for every argument")

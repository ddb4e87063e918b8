"""What every style has, the registry of styles, and how a plan's text becomes one.

A style is data: its options are dataclass fields, so that a plan can be read, printed, compared and saved. `build`
makes the `ParallelStyle` that torch applies; `parameters` says, without a process group, what each parameter of the
module becomes. What the rest of colrow asks about a style (does it sum gradients, does its module run on local tensors,
which operators does it run) stands on its class: nothing outside this package compares a style's name.
"""

from __future__ import annotations

import copy
import dataclasses
from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar, Literal, NamedTuple, get_args, get_origin, get_type_hints

from pydantic import ConfigDict, TypeAdapter
from torch import nn
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import ParallelStyle
from torch.distributed.tensor.placement_types import Placement

from colrow.errors import PlanError, did_you_mean
from colrow.sharding.layout import Packed
from colrow.styles.local_sizes import rules_of
from colrow.styles.options import integers_of, option, plain
from colrow.styles.site import Site

STYLES: dict[str, type[Style]] = {}
"""Every style by its name; a class with a `name` is entered when it is defined."""
PREVIOUS_NAMES: dict[str, type[Style]] = {}
"""Styles by names that plans of earlier releases give them: read for ever, never written."""

TokenOrder = Literal["", "sequence", "flattened"]


@dataclass(frozen=True)
class ParameterLayout:
    """What a parameter becomes over tp: its placement, the shape of a rank's shard (the first rank's, where they
    differ), and one line of reason."""

    placement: Placement
    local_shape: tuple[int, ...]
    reason: str
    packed: Packed | None = None

    def __str__(self) -> str:
        """Which rows a rank holds, as text: equal exactly where two layouts give each rank the same ones."""
        return f"{self.placement} of each of {list(self.packed.segments)}" if self.packed else str(self.placement)


@dataclass(frozen=True)
class NegativeControl:
    """A style that computes the same loss with wrong gradients: `verify` puts it in a sound one's place."""

    style: str
    change: str


class OutputSegment(NamedTuple):
    """A segment of output features: its size, that on a rank, and whether each rank computes all of it, in order."""

    size: int
    local: int
    complete: bool


@dataclass(frozen=True, kw_only=True)
class Style(ABC):
    """One way to parallelise a module. Subclasses name their options as fields."""

    name: ClassVar[str]
    previous_names: ClassVar[tuple[str, ...]] = ()
    torch_class: ClassVar[type[ParallelStyle] | None] = None
    """The class of torch whose objects this style stands for (`from_torch`)."""

    on_one_rank: ClassVar[bool] = False
    """The style changes what the module computes, and so applies where tp is 1 too. `verify` compares with the module
    without its style: it cannot prove one that changes the result."""
    on_data_axes: ClassVar[bool] = False
    """The style has a faster way to compute the same on one rank of tp too: it applies there where a data axis has
    several ranks."""
    returns_loss: ClassVar[bool] = False
    """The module returns the loss: the plan's loss has to be `linear`."""
    sums_gradients: ClassVar[bool] = False
    """Gradients of the module's replicated parameters are summed over tp."""
    local: ClassVar[bool] = False
    """The module's own code runs on local tensors. A parameter that it uses behind a reduction of its own has the
    complete gradient on each rank already, and would have it summed."""
    computes_module: ClassVar[bool] = False
    """The module computes in the style's own way, not by its class's forward on what it is called with: the style's
    tests prove that its results are the unsharded module's."""
    gathers_for_children: ClassVar[bool] = False
    """The module's input is gathered once, for the modules inside it."""
    gathers_own_input: ClassVar[bool] = False
    """The module can stand outside any block: its option `input` says how its input is sharded."""
    operator: ClassVar[str] = ""
    """The operator of `colrow::` that runs in every forward of the module: it is missing in the trace of a step that
    took another path."""
    saved_operators: ClassVar[frozenset[str]] = frozenset()
    """Operators whose results selective recomputation keeps: they hold a reduction over ranks."""
    negative_control: ClassVar[NegativeControl | None] = None

    optional: bool = False
    """The plan's key may match nothing (an option of the architecture, such as q/k norms)."""
    used_outside: tuple[int, ...] | None = option(integers_of)
    """Numbers of the outputs (0: the only one) that code outside of the block around the module uses, such as router
    logits for an auxiliary loss. Each rank gets their complete gradient there, and the block sums over ranks: so a rank
    passes 1/tp of it back."""
    attributes: dict[str, Any] | None = None
    """Attributes of the module that hold a size of which a rank has less (`num_heads`, `config.num_attention_heads`):
    `/tp` divides the value by tp, a number replaces it. A config is copied for the module."""
    sizes: dict[str, str] | None = option(rules_of)
    """Sizes that the module's code writes of which a rank has less, such as `view(*, *, 4, *)`: `*, *, /tp, *`. See
    [Note: sizes in code]."""

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if "name" in cls.__dict__:
            STYLES[cls.name] = cls
            PREVIOUS_NAMES.update(dict.fromkeys(cls.__dict__.get("previous_names", ()), cls))

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value, convert = getattr(self, field.name), field.metadata.get("convert", lambda value: value)
            try:
                # strict: of a text such as "maybe" no boolean is made
                converted = _type_of_option(type(self), field.name).validate_python(convert(value), strict=True)
            except (ValueError, TypeError, AttributeError) as error:
                if isinstance(error, PlanError):
                    raise
                message = f"style {self.name}: option {field.name} cannot be {value!r}"
                hint = get_type_hints(type(self))[field.name]
                one_of = f"use one of {', '.join(get_args(hint))}" if get_origin(hint) is Literal else ""
                raise PlanError("CR211", "", message, one_of or f"give it a value of type {field.type}") from error
            object.__setattr__(self, field.name, converted)  # the dataclass is frozen

    @abstractmethod
    def build(self, site: Site) -> ParallelStyle:
        """A fresh torch style for this module."""

    @classmethod
    def from_torch(cls, style: Any) -> Style:
        """The style that an object of `torch_class` stands for."""
        raise NotImplementedError

    @property
    def token_order(self) -> TokenOrder:
        """Which tokens a rank holds around the module: `sequence`, a shard of dimension 1; `flattened`, a shard of all
        tokens of the micro-batch; or neither (""). A plan holds to one of them. See [Note: flattened tokens]."""
        values = [getattr(self, field.name) for field in dataclasses.fields(self)]
        values += [item for value in values if isinstance(value, dict) for item in value.values()]
        values += [item for value in values if isinstance(value, tuple) for item in value]
        shards = any(isinstance(value, Shard) and value.dim == 1 for value in values)
        # style sequence has its dim as a number, all others in placements
        return "sequence" if shards or getattr(self, "sequence_dim", 0) == 1 else ""

    def applies(self, tp: int, *, data_axes: bool) -> bool:
        """Whether the style changes how a module runs at this degree, where a data axis has several ranks or none."""
        return tp > 1 or self.on_one_rank or (data_axes and self.on_data_axes)

    def check(self, site: Site) -> None:
        """Raise PlanError, with the fix, when the style cannot work on this module at this degree."""

    def parameters(self, site: Site) -> dict[str, ParameterLayout]:
        """What the module's own parameters become; none for styles that touch only activations."""
        return {}

    def output_segments(self, site: Site) -> tuple[OutputSegment, ...]:
        """The segments of the output's last dim, for a style that `computes_module`. Empty: the dim is sharded as one,
        or not at all."""
        return ()

    def local_attributes(self, site: Site) -> dict[str, int]:
        """The values that `attributes` get on a rank. Raises PlanError for a missing or indivisible one."""
        out = {}
        for key, value in (self.attributes or {}).items():
            old: Any = site.module
            for part in key.split("."):
                old = old.get(part) if isinstance(old, dict) else getattr(old, part, None)
            if type(old) is not int:
                raise site.wrong_options(
                    f"the module has no integer attribute {key!r}", "correct the option attributes"
                )
            out[key] = site.divide(old, "CR211", f"{key}={old}") if value == "/tp" else int(value)
        return out

    def options(self) -> dict[str, Any]:
        """The options that differ from their defaults, as plain values."""
        return {
            field.name: plain(value)
            for field in dataclasses.fields(self)
            if (value := getattr(self, field.name)) != field.default
        }

    def to_data(self) -> str | dict[str, Any]:
        """What a plan file says: the name alone, or a mapping with the options."""
        options = self.options()
        return {"style": self.name, **options} if options else self.name


@dataclass(frozen=True, kw_only=True)
class Opaque(Style):
    """A ParallelStyle class of the user's own. It is applied as it is; a plan that holds one cannot be saved."""

    name = "opaque"
    object: Any = None

    def build(self, site: Site) -> ParallelStyle:
        if not isinstance(self.object, ParallelStyle):
            raise site.wrong_options("style opaque is made from a ParallelStyle object", "build the plan in Python")
        return self.object

    def options(self) -> dict[str, Any]:
        raise PlanError(
            f"{type(self.object).__name__} is a style of your own and has no name in a plan file: "
            "keep the plan in Python, or use one of " + ", ".join(sorted(set(STYLES) - {self.name}))
        )


@cache
def _type_of_option(cls: type[Style], name: str) -> TypeAdapter[Any]:
    return TypeAdapter(get_type_hints(cls)[name], config=ConfigDict(arbitrary_types_allowed=True))


def style_class(name: str) -> type[Style] | None:
    """The style of this name, or of this previous name."""
    return STYLES.get(name) or PREVIOUS_NAMES.get(name)


def style_from_data(data: Any, where: str) -> Style:
    """The style that a plan gives at `where`: a name, a mapping, a Style, or one of torch's own style objects."""
    if isinstance(data, Style):
        return data
    if isinstance(data, ParallelStyle):
        # by identity: a user's subclass may do something else than the class that it extends
        same_class = [cls for cls in STYLES.values() if cls.torch_class is type(data)]
        return same_class[0].from_torch(data) if same_class else Opaque(object=data)
    if isinstance(data, str):
        data = {"style": data}
    if not isinstance(data, dict) or "style" not in data:
        raise PlanError(f"{where}: a style is a name or a mapping with the key 'style', not {data!r}")
    cls = style_class(str(data["style"]))
    if cls is None:
        raise PlanError(f"{where}: unknown style {data['style']!r}{did_you_mean(str(data['style']), STYLES)}")
    known = {field.name for field in dataclasses.fields(cls)}
    previous = {field.metadata.get("previous"): field.name for field in dataclasses.fields(cls)}
    options = {previous.get(str(key), str(key)): value for key, value in data.items() if key != "style"}
    for key in options:
        if key not in known:
            raise PlanError(f"{where}: style {cls.name} has no option {key!r}{did_you_mean(key, known)}")
    try:
        return cls(**options)
    except TypeError as error:
        raise PlanError(f"{where}: style {cls.name}: {error}") from error
    except PlanError as error:
        raise error.at(where) from error


def replicated(module: nn.Module, reason: str) -> dict[str, ParameterLayout]:
    """The layouts of a module each of whose own parameters every rank holds."""
    return {
        name: ParameterLayout(Replicate(), tuple(param.shape), reason)
        for name, param in module.named_parameters(recurse=False)
    }


def set_attribute(module: nn.Module, key: str, value: int | str, tp: int) -> None:
    """Give an integer attribute its local value; `config.NAME` changes a copy of the config that only `module` sees,
    `axes_lengths.NAME` an axis of an einops layer."""
    owner: Any = module
    *path, leaf = key.split(".")
    if path == ["axes_lengths"]:
        lengths: dict[str, int] = vars(module)["axes_lengths"]
        own = {**lengths, leaf: lengths[leaf] // tp if value == "/tp" else int(value)}
        vars(module).update(axes_lengths=own, _axes_lengths=tuple(own.items()))  # its forward reads the second
        return
    for part in path:  # layers share a config, and the module's neighbours may keep the global size
        own = copy.copy(getattr(owner, part))
        object.__setattr__(owner, part, own)
        owner = own
    object.__setattr__(owner, leaf, getattr(owner, leaf) // tp if value == "/tp" else value)

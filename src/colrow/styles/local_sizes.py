"""The option `sizes`: sizes in a module's code that are those of the unsharded model, made a rank's.

[Note: sizes in code]
Code writes sizes: `x.view(B, T, 4, -1)`, `y.reshape(B, T, C)` with C read from an input that every rank has completely,
`qkv.split(64, -1)`. On a rank's shards they are wrong, and no attribute of the module holds them. A rule says which
calls of a module's own forward write such sizes, by function and by what is written, and what a rank writes:

    {"view(*, *, 4, *)": "*, *, /tp, *", "split(64)": "/tp"}

`*` on the left is any size, on the right what is written; `/tp` divides what is written by tp, `*tp` multiplies it; a
number takes its place. The first rule that matches a call counts; calls that match none are left alone, and so
are views that fit their tensor as written and not by the rule: of a tensor that every rank has completely.

The sizes of a slice are its bounds, a start and a stop for each `:`; `*` stands for one that is left out:

    {"getitem(*, *, *, *, 32, 64)": "*, *, *, *, /tp, /tp"}        y[:, :, 32:64]
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.functional import multi_head_attention_forward
from torch.overrides import TorchFunctionMode

from colrow.errors import PlanError
from colrow.sharding.local_view import replace_forward
from colrow.styles.fast.unflatten import holds_complete_sequences
from colrow.torch_compat import open_attention

Sizes = tuple[Any, ...]
ANY = "*"
_RULES = "_colrow_sizes"  # module attribute: (rules, tp)


@dataclass(frozen=True)
class SizeCall:
    """How a function is given sizes: as its positional arguments from number `first` on, or as one argument there.

    Attributes:
        keyword: the name of that argument.
        single: it may be a number alone, which stands for each of several results (the size of `split`).
    """

    name: str
    first: int
    keyword: str
    single: bool = False


def _calls() -> dict[Any, SizeCall]:
    """Functions to which code writes sizes: each one's form as a function of torch and as a method."""
    found: dict[Any, SizeCall] = {}
    for name, first, keyword, single in (
        ("view", 1, "size", False),
        ("reshape", 1, "shape", False),
        ("expand", 1, "size", False),
        ("broadcast_to", 1, "size", False),
        ("repeat", 1, "repeats", False),
        ("unflatten", 2, "sizes", False),
        ("split", 1, "split_size", True),
        ("narrow", 2, "start", False),
        ("new_zeros", 1, "size", False),
        ("new_ones", 1, "size", False),
        ("new_empty", 1, "size", False),
        ("new_full", 1, "size", False),
        ("zeros", 0, "size", False),
        ("ones", 0, "size", False),
        ("empty", 0, "size", False),
        ("full", 0, "size", False),
    ):
        for owner in (torch, Tensor):
            if (function := getattr(owner, name, None)) is not None:
                found[function] = SizeCall(name, first, keyword, single)
    found[Tensor.__getitem__] = SizeCall("getitem", 1, "")
    return found


CALLS = _calls()
_ATTENTION = open_attention()


class CodeMode(TorchFunctionMode):
    """A function mode that sees the calls of torch's own attention too (of nn.MultiheadAttention)."""

    separates = True
    """Whether query, key and value are three tensors although one is given: see `attention`."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is multi_head_attention_forward:
            return self.attention(*args, **kwargs)
        return self.call(func, args, kwargs)

    def attention(self, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
        """torch's function makes one product of query, key and value where they are one tensor. nn.MultiheadAttention
        as a block may have gathered each, so there are three tensors on a rank; code that calls the function itself has
        the one tensor on a rank too."""
        if self.separates:
            value = value.view_as(value) if value is key else value
            key = key.view_as(key) if key is query else key
        with self:  # torch takes a mode off while it handles a call: on again, for the calls inside
            return _ATTENTION(query, key, value, *args, **kwargs)

    def call(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """What stands in the place of `func(*args, **kwargs)`."""
        raise NotImplementedError


def sizes_written(function: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Sizes | None:
    """The sizes that a call writes; None where it writes none, or acts on a DTensor, which has global ones."""
    call = CALLS.get(function)
    if call is None or any(isinstance(x, DTensor) for x in args):
        return None
    if call.name == "getitem":
        bounds = tuple(bound for each in _slices(args[1]) for bound in (each.start, each.stop))
        return bounds if any(isinstance(bound, (int, torch.SymInt)) for bound in bounds) else None
    given = kwargs.get(call.keyword, args[call.first] if len(args) > call.first else None)
    if isinstance(given, (tuple, list)):
        return tuple(given)
    if call.single or call.keyword in kwargs:
        return None if given is None else (given,)
    rest = tuple(args[call.first :])  # x.view(B, T, -1): sizes one by one
    return rest if rest and all(isinstance(n, (int, torch.SymInt)) for n in rest) else None


def _slices(index: Any) -> list[slice]:
    return [each for each in (index if isinstance(index, tuple) else (index,)) if isinstance(each, slice)]


def _with_bounds(index: Any, bounds: Sizes) -> Any:
    if isinstance(index, slice):
        start, stop = bounds
        return slice(start, stop, index.step)
    given = iter(bounds)
    return tuple(slice(next(given), next(given), x.step) if isinstance(x, slice) else x for x in index)


def fits(function: Any, args: Sequence[Any], written: Sizes) -> bool:
    """Whether the tensor as it is can be viewed with these sizes."""
    name = CALLS[function].name
    return name in ("view", "reshape") and -1 not in written and math.prod(written) == args[0].numel()


def with_sizes(function: Any, args: Sequence[Any], kwargs: dict[str, Any], sizes: Sizes) -> Any:
    """The call with other sizes."""
    call = CALLS[function]
    if call.name == "getitem":
        return function(args[0], _with_bounds(args[1], sizes))
    if function is Tensor.unflatten:  # its own code calls super(), which torch.compile follows in a method call alone
        function, args, first = args[0].unflatten, args[1:], call.first - 1
    else:
        first = call.first
    if call.keyword in kwargs:
        old = kwargs[call.keyword]
        return function(*args, **{**kwargs, call.keyword: sizes if isinstance(old, (tuple, list)) else sizes[0]})
    if isinstance(args[first], (tuple, list)):
        return function(*args[:first], list(sizes), *args[first + 1 :], **kwargs)
    return function(*args[:first], *sizes, *args[first + len(sizes) :], **kwargs)


@dataclass(frozen=True)
class SizeRule:
    """Which sizes a call writes, and what a rank writes in their places."""

    function: str
    written: tuple[int | str, ...]
    local: tuple[int | str, ...]

    @classmethod
    def parse(cls, call: str, local: str) -> SizeRule:
        """Raises PlanError for a text that is no rule."""
        function, opened, rest = call.partition("(")
        if not opened or not rest.endswith(")"):
            raise PlanError(f"sizes: {call!r} is no call such as 'view(*, *, 4, *)'")
        written, becomes = _tokens(rest[:-1]), _tokens(local)
        known = {call.name for call in CALLS.values()}
        if function not in known or len(written) != len(becomes):
            raise PlanError(f"sizes: {call!r}: {local!r} does not fit one of {', '.join(sorted(known))}")
        return cls(function, written, becomes)

    def to_text(self) -> tuple[str, str]:
        """The key and the value that a plan holds."""
        return f"{self.function}({', '.join(map(str, self.written))})", ", ".join(map(str, self.local))

    def matches(self, function: str, written: Sizes) -> bool:
        """Whether the rule is for a call of `function` that writes these sizes."""
        return (
            function == self.function
            and len(written) == len(self.written)
            and all(mine in (ANY, its) for mine, its in zip(self.written, written, strict=True))
        )

    def apply(self, written: Sizes, tp: int) -> Sizes:
        """What a rank writes in place of the sizes."""
        return tuple(_local(mine, size, tp) for mine, size in zip(self.local, written, strict=True))


def _tokens(text: str) -> tuple[int | str, ...]:
    return tuple(part if part in (ANY, "/tp", "*tp") else int(part) for part in text.split(", "))


def _local(rule: int | str, size: Any, tp: int) -> Any:
    match rule:
        case "*":
            return size
        case "/tp":
            return size // tp
        case "*tp":
            return size * tp
    return rule


def rules_of(value: Any) -> dict[str, str] | None:
    """The option `sizes`, each of whose entries is a rule."""
    if value is None:
        return None
    for call, local in value.items():
        SizeRule.parse(call, local)
    return {str(call): str(local) for call, local in value.items()}


class LocalSizes(CodeMode):
    """Calls within write a rank's sizes."""

    def __init__(self, rules: Sequence[SizeRule], tp: int, separates: bool = True) -> None:
        super().__init__()
        self.rules, self.tp, self.separates = rules, tp, separates

    def attention(self, *args: Any, **kwargs: Any) -> Any:
        # A rank has the weights of its own heads, and their mean is not the mean of all: it takes and gives none.
        if "average_attn_weights" in kwargs:
            kwargs["average_attn_weights"] = False
        return super().attention(*args, **kwargs)[0], None

    def call(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        call = CALLS.get(func)
        if call is not None and (written := sizes_written(func, args, kwargs)) is not None:
            # sizes of complete sequences are those that the code writes: see [Note: two views of flattened tokens]
            holds_sequences = isinstance(args[0], Tensor) and holds_complete_sequences(args[0])
            for rule in () if holds_sequences else self.rules:
                if rule.matches(call.name, written):
                    local = rule.apply(written, self.tp)
                    if fits(func, args, written) and not fits(func, args, local):
                        continue  # a tensor that every rank has completely
                    return with_sizes(func, args, kwargs, local)
        return func(*args, **kwargs)


def write_local_sizes(module: nn.Module, sizes: dict[str, str], tp: int) -> None:
    """Let the module's forward write a rank's sizes: see [Note: sizes in code]."""
    rules = tuple(SizeRule.parse(*item) for item in sizes.items())
    module.__dict__[_RULES] = rules, tp
    cls: Any = type(module)
    replace_forward(module, _forward_of(cls))


@functools.cache  # one function for equal modules: see `replace_forward`
def _forward_of(cls: Any) -> Callable[..., Any]:
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        rules, tp = getattr(self, _RULES)
        with LocalSizes(rules, tp, issubclass(cls, nn.MultiheadAttention)):
            return cls.forward(self, *args, **kwargs)

    return forward


class _Apart(CodeMode):
    def call(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        return func(*args, **kwargs)


def project_apart(module: nn.MultiheadAttention) -> None:
    """Let an unsharded attention project query, key and value one by one, as one with local sizes does: so both make
    the same operators."""
    replace_forward(module, _forward_apart)


def _forward_apart(self: nn.MultiheadAttention, *args: Any, **kwargs: Any) -> Any:
    with _Apart():
        cls: Any = type(self).__bases__[-1]  # the class that `replace_forward` has put another in the place of
        return cls.forward(self, *args, **kwargs)

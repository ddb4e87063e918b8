"""Find the sizes that a model's code writes and of which a rank has less: the option `sizes` of styles.

The unsharded model is traced once more with a marker behind every call that writes sizes, which says what each call's
result is in the graph, and so which extents a rank has of it. Then the model is traced on a rank's shapes: a call that
would give other extents writes a rank's, and becomes a rule. Whether the rules do what the plan says, the trace on
local shapes decides, as for attributes.
"""

from __future__ import annotations

import contextlib
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.fx import Node

from colrow.derive.axes import atoms_in
from colrow.derive.failure import TraceError, own_code
from colrow.derive.infer import computation, facts_of, op_name
from colrow.derive.rules_pieces import PieceOfDim
from colrow.derive.trace import Label, Trace, is_boundary, label_of, operators_like
from colrow.derive.undecomposed import computing_nodes, known_shape
from colrow.styles.local_sizes import ANY, CALLS, CodeMode, SizeRule, Sizes, fits, sizes_written, with_sizes

if TYPE_CHECKING:
    from colrow.derive.local import LocalCheck

Rules = dict[str, dict[str, str]]
"""Module name to the rules of its code."""
Counts = Callable[[str], set[int]]
"""A module's name to the sizes of the classes that are sharded in its parameters."""
SIZED = "sized"
"""The direction of markers behind calls that write sizes."""


class _Calls(CodeMode):
    """Counts the calls that write sizes, module by module."""

    def __init__(self) -> None:
        super().__init__()
        self.running: list[str] = []
        self.count: Counter[str] = Counter()
        self.torchs_own: set[str] = set()

    # only torch's own attention module is entered with three tensors on a rank: see `CodeMode.attention`
    @property
    def separates(self) -> bool:  # type: ignore[override]
        return bool(self.running) and self.running[-1] in self.torchs_own

    def next_label(self) -> str | None:
        """The label of the call that is being made; None outside of modules."""
        if not self.running:
            return None
        name = self.running[-1]
        self.count[name] += 1
        return str(Label(SIZED, name, str(self.count[name])))

    @contextlib.contextmanager
    def within(self, model: nn.Module) -> Iterator[None]:
        handles = []
        for name, module in model.named_modules():
            if isinstance(module, nn.MultiheadAttention):
                self.torchs_own.add(name)
            handles.append(module.register_forward_pre_hook(lambda *_, name=name: self.running.append(name)))
            handles.append(module.register_forward_hook(lambda *_: _nothing(self.running.pop()), always_call=True))
        try:
            with self:
                yield
        finally:
            for handle in handles:
                handle.remove()


def _nothing(_: Any) -> None:
    return None


class _Marked(_Calls):
    """Marks the first result of each call."""

    def call(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        out = func(*args, **kwargs)
        with own_code():
            label = self.next_label() if func in CALLS and sizes_written(func, args, kwargs) is not None else None
        if label:
            if isinstance(out, Tensor):
                return torch.ops.colrow_plan.boundary(out, label, -1, 1, 1)
            return type(out)((torch.ops.colrow_plan.boundary(out[0], label, -1, 1, 1), *out[1:]))
        return out


class _Solved(_Calls):
    """Makes each call give the extents that a rank has, and keeps the rules."""

    def __init__(self, expected: dict[str, _Expected], counts: Counts, tp: int, literal: bool) -> None:
        super().__init__()
        self.expected, self.counts, self.tp, self.literal = expected, counts, tp, literal
        self.rules: dict[str, set[SizeRule]] = defaultdict(set)
        self.unchanged: dict[str, dict[SizeRule, Sizes]] = defaultdict(dict)
        """Calls that write the same on a rank, and what they write."""

    def call(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        with own_code():
            sizes = self._local_sizes(func, args, kwargs)
        return func(*args, **kwargs) if sizes is None else with_sizes(func, args, kwargs, sizes)

    def _local_sizes(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Sizes | None:
        """The sizes that a rank writes in the place of the call's; None where it writes these."""
        written = sizes_written(func, args, kwargs) if func in CALLS else None
        label = self.next_label() if written is not None else None
        if written is None or label is None:
            return None
        # The graph of the unsharded model has the call's result, so a rank's extents of it are known.
        if label in self.expected:
            expected = self.expected[label]
            varying = expected.varying
            if CALLS[func].name in ("getitem", "narrow"):
                wanted, varying = expected.bounds(CALLS[func].name, written), []
            else:
                wanted = _wanted(CALLS[func].name, written, expected, args, kwargs)
        else:
            # the result is in no graph (a view that only a size is read from): by its number of elements
            wanted = self._fitting(func, args, written)
            varying = [old == new for old, new in zip(written, wanted or written, strict=True)]
        # A call that writes the same on a rank needs no rule, but the rules of other calls of its module may match it:
        # `found` then adds one that keeps it as it is.
        if wanted is None or wanted == written:
            if wanted is not None and not fits(func, args, written):
                same = tuple(ANY if n is None else n for n in written)
                self.unchanged[self.running[-1]][SizeRule(CALLS[func].name, same, (ANY,) * len(same))] = written
            return None
        # A rule says by which sizes a call is known, and what a rank writes in their place. Sizes that inputs decide
        # stand as `any`: a batch of another size must match too.
        names = [_change(old, new, self.tp) for old, new in zip(written, wanted, strict=True)]
        parts = varying if len(varying) == len(written) else [False] * len(written)
        keys: list[int | str] = [
            # -1 and a bound that changes stand so in the code, whatever the inputs are
            ANY if old is None or (old != -1 and (varies or (name == ANY and not self.literal))) else old
            for old, name, varies in zip(written, names, parts, strict=True)
        ]
        self.rules[self.running[-1]].add(SizeRule(CALLS[func].name, tuple(keys), tuple(names)))
        return wanted

    def _fitting(self, func: Any, args: Any, written: Sizes) -> Sizes | None:
        """What a rank writes in a view that is not in the graph, because nothing uses its result: one count of heads or
        features divided by tp, if the tensor's elements fit so and not as they are written."""
        if CALLS[func].name not in ("view", "reshape") or math.prod(written) == args[0].numel():
            return None
        counts = self.counts(self.running[-1])
        found = [k for k, n in enumerate(written) if n in counts and math.prod(written) == args[0].numel() * self.tp]
        return tuple(n // self.tp if k == found[0] else n for k, n in enumerate(written)) if len(found) == 1 else None

    def found(self) -> Rules | None:
        """The rules; None where one call is to write different sizes in two places."""
        out: Rules = {}
        for name, rules in self.rules.items():
            for same, written in self.unchanged[name].items():
                if any(rule.matches(same.function, written) for rule in rules):
                    rules = rules | {same}
            out[name] = dict(
                rule.to_text() for rule in sorted(rules, key=lambda rule: (rule.written.count(ANY), str(rule)))
            )
            if len(out[name]) < len(rules):
                return None
        return out


@dataclass(frozen=True)
class _Expected:
    """What a rank has of the result of a call that writes sizes.

    Attributes:
        extents: of the result.
        varying: which of them the inputs decide.
        pieces: what a slice takes, to that on a rank: start, length, extent of the dim.
        parts: the extents of all results, where the call has several.
    """

    extents: list[int]
    varying: list[bool]
    pieces: dict[PieceOfDim, PieceOfDim]
    parts: list[list[int]]

    def bounds(self, name: str, written: Sizes) -> Sizes | None:
        """A rank's bounds of a slice; None where no piece is known that has these."""
        out: list[Any] = []
        for start, stop_or_length in zip(written[::2], written[1::2], strict=True):
            stop = stop_or_length
            if name == "narrow":  # (start, length), where a slice has (start, stop)
                stop = start + stop if start >= 0 or start + stop < 0 else None
            # bounds may count from the end, and be left out
            for (first, length, extent), (local_first, local_length, local_extent) in self.pieces.items():
                begins = first == (start or 0) or (start is not None and first == start + extent)
                if begins and stop in (None, first + length, first + length - extent):
                    from_end = local_extent if start is not None and start < 0 else 0
                    out.append(None if start is None else local_first - from_end)
                    out.append(local_length if name == "narrow" else stop and (local_first + local_length))
                    break
            else:
                out += [start, stop_or_length]
        return tuple(out)


def _wanted(name: str, written: Sizes, expected: _Expected, args: Any, kwargs: Any) -> Sizes | None:
    """What a rank writes to get the expected result; None where that cannot be said."""
    # Each function writes its sizes in its own way: split one size or all of them, unflatten the sizes of one dim,
    # repeat counts; all others the result's shape.
    extents = expected.extents
    if not all(type(n) is int for n in written):
        return None
    if name == "split":
        dim = kwargs.get("dim", args[2] if len(args) > 2 else 0)
        if len(written) == 1:
            return (extents[dim],)
        return tuple(part[dim] for part in expected.parts) if len(expected.parts) == len(written) else None
    if name == "unflatten":
        dim = kwargs.get("dim", args[1] if len(args) > 1 else 0)
        start = dim if dim >= 0 else len(extents) - len(written) + 1 + dim
        extents = extents[start : start + len(written)]
    if name == "repeat":
        before = [1] * (len(extents) - args[0].dim()) + list(args[0].shape)
        extents = [n // old for n, old in zip(extents, before, strict=True)]
    if len(written) != len(extents):
        return None
    return tuple(old if old == -1 else n for old, n in zip(written, extents, strict=True))


def _change(old: int, new: int, tp: int) -> int | str:
    if old == new:
        return ANY
    return "/tp" if new * tp == old else "*tp" if old * tp == new else new


def find_sizes(check: LocalCheck, local: nn.Module, *, literal: bool) -> Rules | None:
    """The rules under which `local`, the model with a rank's shapes, has the extents that `check` expects.

    Args:
        literal: the sizes that a rank writes too stand in the rules, and not any.

    Returns:
        None where the calls of the two traces cannot be told apart by what they write.
    """
    traced = check.traced
    if traced.sized is None:
        traced.sized = _sized(check.model, traced, check.inputs)
    expected: dict[str, _Expected] = {}
    for label, node in traced.sized.items():
        dims = check.flows.inference.dims.get(node)
        if isinstance(dims, list) and (extents := check.local_extents(node)) is not None:
            # batch and sequence, which have other extents once the model is used
            varying = [any((a.forbidden or "").startswith("input ") for a in atoms_in(dim)) for dim in dims]
            expected[label] = _Expected(extents, varying, dict(_pieces(node, check)), check.parts(node))
    solved = _Solved(expected, check.counts, check.choice.tp, literal)
    # A rank's code may still fail behind the last call that has a rule: whether the rules do, the caller tries.
    with contextlib.suppress(TraceError):
        operators_like(traced, local, check.inputs, check.rescale(), solved.within(local))
    rules = solved.found()
    return None if rules is None or "" in rules else rules


def _pieces(node: Node, check: LocalCheck) -> Iterator[Any]:
    """What the slices take that one call makes, the last of which is `node`."""
    at: Any = node
    while isinstance(at, Node) and facts_of(at).moves and at.op == "call_function":
        if op_name(at) == "slice" and (found := check.piece(at)) is not None:
            yield found
        elif op_name(at) != "slice" and at is not node:
            return
        at = at.args[0]


def _sized(model: nn.Module, traced: Trace, inputs: Any) -> dict[str, Node]:
    """The node of `traced` that each call which writes sizes gives."""
    recorded, _ = operators_like(traced, model, inputs, within=_Marked().within(model))
    marked = computing_nodes(recorded.graph)
    known = traced.undecomposed
    counterpart = _counterparts([n for n in marked if not _is_mark(n)], known.nodes)
    out = {}
    for node in filter(_is_mark, marked):
        source = node.args[0]
        while isinstance(source, Node) and source not in counterpart and source.op == "call_function":
            source = source.args[0]  # another mark, or a copy
        if isinstance(source, Node) and source in counterpart and (found := known.result.get(counterpart[source])):
            out[str(label_of(node))] = found
    return out


def _counterparts(own: list[Node], others: list[Node]) -> dict[Node, Node]:
    """The nodes of a trace to those of another one, up to where they differ. Behind writes in place torch.export takes
    views again, more of them where no mark stands between: a view without a counterpart is passed over."""
    found: dict[Node, Node] = {}
    at = 0
    for node in own:
        to = at
        while to < len(others) and _differ(node, others[to]) and facts_of(others[to]).moves:
            to += 1
        if to < len(others) and not _differ(node, others[to]):
            found[node], at = others[to], to + 1
        elif not facts_of(node).moves:
            break
    return found


def _differ(node: Node, other: Node) -> bool:
    return computation(node) != computation(other) or known_shape(node) != known_shape(other)


def _is_mark(node: Any) -> bool:
    return isinstance(node, Node) and is_boundary(node) and label_of(node).direction == SIZED

"""Which blocks of a model are exported: of those that are alike a few, which stand for the others.

[Note: representatives]
Of a kind of blocks (see [Note: kinds of blocks]) the first two and the last are kept: the first may start what the
others go on with (sequence shards), the last may end it, and the second stands for all between. That holds where

- the model runs without the other blocks, and those kept do the same in it;
- no class of axes joins some of them alone: in a chain of linear layers each is split by what the one before is;
- the second's styles are those of the first or of the last.

Else all blocks are exported. Blocks keep their names: the numbers in a reduced stack have gaps.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Hashable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from torch import nn

from colrow.derive.requests import Requests
from colrow.dryrun.block_kinds import BlockTraces, block_kind, trace_blocks
from colrow.dryrun.calls import Inputs
from colrow.models.blocks import BlockStack, block_stacks
from colrow.plans.patterns import is_within, with_stars
from colrow.sharding.parameter_state import copied_model

_KEPT = 3


class NotAlikeError(Exception):
    """Blocks of one kind are not split alike: what holds for some of them says nothing about the others."""


@dataclass(frozen=True)
class AlikeBlocks:
    """The names of the blocks of a kind that are kept, and of how many."""

    kept: tuple[str, str, str]
    count: int


@dataclass(frozen=True)
class Representatives:
    """A model, and what is exported in its place.

    Attributes:
        model: what is exported: a copy without the blocks that others stand for, or the model itself. It has the
            model's own parameters.
        stands: a block that is left out to the one that stands for it.
        kinds: of the blocks of which some are left out.
    """

    complete: nn.Module
    model: nn.Module
    stands: Mapping[str, str] = field(default_factory=dict)
    kinds: tuple[AlikeBlocks, ...] = ()

    @classmethod
    def of(cls, model: nn.Module, inputs: Inputs, requests: Requests) -> Representatives:
        """Those of a model; all of its blocks where it repeats little, or where it is not known which are alike."""
        everything = cls(model, model)
        stacks = [stack for stack in block_stacks(model) if stack.name and len(stack.blocks) > _KEPT]
        if not stacks:
            return everything
        traces = _traces(model, inputs)
        kinds = [kind for stack in stacks if traces.runs for kind in _kinds(model, stack, traces, requests)]
        large = [names for names in kinds if len(names) > _KEPT]
        if not large:
            return everything
        # the first and the last keep their places: the stream may enter and leave them in another way
        stands = {name: names[1] for names in large for name in names[2:-1]}
        copy = _without(model, stacks, stands)
        kept = {name: ran for name, ran in traces.runs.items() if name not in stands}
        # a model may count its blocks: then the kept ones run otherwise without the others
        if copy is None or _traces(copy, inputs).runs != kept:
            return everything
        return cls(
            model, copy, stands, tuple(AlikeBlocks((names[0], names[1], names[-1]), len(names)) for names in large)
        )

    def name(self, name: str) -> str:
        """A module or parameter of the complete model to the one that stands for it."""
        for end in (*(i for i, letter in enumerate(name) if letter == "."), len(name)):
            if (other := self.stands.get(name[:end])) is not None:
                return other + name[end:]
        return name

    def count(self, name: str, call: int = 0) -> int:
        """How many modules of the complete model one of the exported stands for; of a module that blocks use in common,
        in one of its calls, which are in the order of these blocks."""
        names = self._names.get(self.model.get_submodule(name), [name])
        called = names[min(call, len(names) - 1)]
        return 1 + sum(is_within(called, second) for second in self.stands.values())

    @cached_property
    def _names(self) -> dict[nn.Module, list[str]]:
        """All names of each exported module."""
        names: dict[nn.Module, list[str]] = {}
        for name, module in self.model.named_modules(remove_duplicate=False):
            names.setdefault(module, []).append(name)
        return names

    def volume(self, volumes: Mapping[str, int]) -> int:
        """The complete model's parameters in a class, from those of the exported parameters by their names: a class
        that joins the blocks of a kind has as many in those that are left out."""
        total = sum(volumes.values())
        for kind in self.kinds:
            by_block = [sum(n for name, n in volumes.items() if is_within(name, block)) for block in kind.kept]
            if all(by_block):
                total += by_block[1] * (kind.count - _KEPT)
        return total

    def require_separate(self, names: Collection[str]) -> None:
        """Raise NotAlikeError where a class that these parameters share joins some blocks of a kind and not all."""
        for kind in self.kinds:
            joined = sum(any(is_within(name, block) for name in names) for block in kind.kept)
            if joined not in (0, 1, _KEPT):
                raise NotAlikeError

    def spread(self, styles: Mapping[str, Any], names: Collection[str]) -> dict[str, Any]:
        """The exported modules' styles for all modules, whose names are given.

        Raises:
            NotAlikeError: the second of a kind has styles of its own.
        """
        for kind in self.kinds:
            first, second, last = (
                {n.removeprefix(b): s for n, s in styles.items() if is_within(n, b)} for b in kind.kept
            )
            if second not in (first, last):
                raise NotAlikeError
        return {name: styles[own] for name in names if (own := self.name(name)) in styles}


def _traces(model: nn.Module, inputs: Inputs) -> BlockTraces:
    """What runs in evaluation mode, as it is exported."""

    def fake_inputs(copy: nn.Module) -> Inputs:
        copy.eval()
        return inputs.like_on_cpu()

    return trace_blocks(model, fake_inputs)


def _kinds(model: nn.Module, stack: BlockStack, traces: BlockTraces, requests: Requests) -> Iterator[list[str]]:
    """The names of a stack's blocks that are alike: in what they are and run, in what shares their parameters, and in
    what a user wants of them."""
    if stack.name in traces.irregular:
        return
    names = defaultdict[int, list[str]](list)
    for name, param in model.named_parameters(remove_duplicate=False):
        names[id(param)].append(name)
    groups = defaultdict[Hashable, list[str]](list)
    for block_name, block in stack.named_blocks():
        facts: list[Hashable] = []
        for inner, param in block.named_parameters(remove_duplicate=False):
            first, *_ = all_names = names[id(param)]
            others = frozenset(with_stars(name) for name in all_names if not is_within(name, block_name))
            facts.append((inner, others, requests.kept.get(first), requests.split.get(first)))
        groups[block_kind(block, block_name, {}, traces), tuple(facts)].append(block_name)
    yield from groups.values()


def _without(model: nn.Module, stacks: list[BlockStack], left_out: Collection[str]) -> nn.Module | None:
    """A copy with the same parameters and without these blocks; None for a model that cannot be copied."""
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    try:
        copy = copied_model(model, dict(shared))
    except Exception:
        return None
    for stack in stacks:
        container = copy.get_submodule(stack.name)
        if isinstance(container, nn.ModuleList):
            # blocks keep their keys, so that parameters keep their names; ModuleList would want 0, 1, 2
            container.__class__ = type(type(container).__name__, (_WithGaps, type(container)), {})
        for key in stack.blocks:
            if f"{stack.name}.{key}" in left_out:
                del container._modules[key]
    return copy


class _WithGaps(nn.ModuleList):
    """A list whose keys are not its indices."""

    def __getitem__(self, index: int | slice) -> Any:
        found = list(self._modules.values())[index]
        return nn.ModuleList(found) if isinstance(index, slice) else found  # type: ignore[arg-type]

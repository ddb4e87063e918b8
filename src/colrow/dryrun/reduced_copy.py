"""A copy of a model on the meta device, with the same widths and only the first blocks of each kind.

The dry run needs no more: of the blocks of one kind ([Note: kinds of blocks]), the first two show everything.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from colrow.dryrun.block_kinds import BlockTraces, block_kind
from colrow.dryrun.fake_world import meta_copy
from colrow.models.blocks import block_stacks
from colrow.plans.patterns import is_within
from colrow.plans.plan import Plan
from colrow.styles.base import Style

KEPT = 2  # of each kind: the second block's input comes from a block, as for all later ones


@dataclass(frozen=True)
class ReducedCopy:
    """A model on the meta device.

    Attributes:
        original_names: a module's name in the copy to its name in the original, where they differ.
        repeats: a kept block's name in the copy to the number of blocks that it stands for.
    """

    model: nn.Module
    original_names: dict[str, str] = field(default_factory=dict)
    repeats: dict[str, int] = field(default_factory=dict)

    def original(self, name: str) -> str:
        """The original's name of a module or parameter of the copy."""
        for new, old in self.original_names.items():
            if is_within(name, new):
                return old + name[len(new) :]
        return name

    def renamed_plan(self, plan: Plan, styles: Mapping[str, Style]) -> Plan:
        """The original's plan, under the copy's names. `styles` are the plan's, by the original's names."""
        names = {name: self.original(name) for name, _ in self.model.named_modules()}
        return replace(plan, modules={new: styles[old] for new, old in names.items() if old in styles})

    def count(self, name: str) -> int:
        """How many modules of the original this module of the copy stands for."""
        return next((n for block, n in self.repeats.items() if is_within(name, block)), 1)


def reduced_copy(model: nn.Module, styles: Mapping[str, Style], traces: BlockTraces, keep: int = KEPT) -> ReducedCopy:
    """`meta_copy` with at most `keep` blocks of each kind in each regular stack of blocks."""
    model = meta_copy(model)
    original_names: dict[str, str] = {}
    repeats: dict[str, int] = {}
    for stack in block_stacks(model):
        list_name, container = stack.name, stack.container
        if not list_name or list_name in traces.irregular:
            continue  # without a name the model itself is the list, and its callers name its entries
        blocks = dict(container.named_children())
        groups: dict[Any, list[str]] = defaultdict(list)
        for key, block in blocks.items():
            groups[block_kind(block, f"{list_name}.{key}", styles, traces)].append(key)
        if all(len(keys) <= keep for keys in groups.values()):
            continue
        kept: dict[str, int] = {}  # key: number of blocks that it stands for
        for keys in groups.values():
            kept |= dict.fromkeys(keys[:keep], 1)
            kept[keys[:keep][-1]] += len(keys) - len(keys[:keep])
        for key in blocks:
            del container._modules[key]
        for i, key in enumerate(key for key in blocks if key in kept):
            new = key if isinstance(container, nn.ModuleDict) else str(i)
            container._modules[new] = blocks[key]
            if kept[key] > 1:
                repeats[f"{list_name}.{new}"] = kept[key]
            if new != key:
                original_names[f"{list_name}.{new}"] = f"{list_name}.{key}"
    return ReducedCopy(model, original_names, repeats)

"""A copy of a model on the meta device, with as few layers as show every kind.

A tower of equal blocks says everything in its first two. Blocks are equal when their classes, the shapes of their
parameters, their plain options and their styles are.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from colrow.styles.base import Style

_KEPT = 2  # layers of a kind: the second one's input comes from a layer, as all later ones' does
_POSITION = ("idx", "index", "layer_id", "layer_number")  # options that number a layer, and say nothing of its kind


@dataclass(frozen=True)
class Copy:
    """A model on the meta device.

    Attributes:
        names: a module's name in the copy to its name in the original, where they differ.
        times: a kept block's name in the copy to the number of blocks that it stands for.
    """

    model: nn.Module
    names: dict[str, str] = field(default_factory=dict)
    times: dict[str, int] = field(default_factory=dict)

    def original(self, name: str) -> str:
        """The original's name of a module or parameter of the copy."""
        for new, old in self.names.items():
            if name == new or name.startswith(new + "."):
                return old + name[len(new) :]
        return name

    def count(self, name: str) -> int:
        """How many modules of the original this module of the copy stands for."""
        return next((n for block, n in self.times.items() if name == block or name.startswith(block + ".")), 1)


def meta_copy(model: nn.Module) -> nn.Module:
    """A deep copy whose parameters and buffers are on the meta device; ties stay, no weight is copied."""
    memo: dict[int, Any] = {}
    for param in model.parameters():
        memo[id(param)] = nn.Parameter(torch.empty_like(param, device="meta"), requires_grad=param.requires_grad)
    for buffer in model.buffers():
        memo[id(buffer)] = torch.empty_like(buffer, device="meta")
    return copy.deepcopy(model, memo)


def cut_copy(model: nn.Module, styles: Mapping[str, Style], keep: int = _KEPT) -> Copy:
    """`meta_copy`, with the repeated blocks of each outermost tower taken out."""
    model = meta_copy(model)
    names: dict[str, str] = {}
    times: dict[str, int] = {}
    for tower_name, tower in towers(model):
        kinds: dict[Any, list[str]] = defaultdict(list)
        for key, block in tower.named_children():
            kinds[_kind(block, f"{tower_name}.{key}", styles)].append(key)
        if all(len(keys) <= keep for keys in kinds.values()):
            continue
        kept: list[tuple[str, int]] = []
        for keys in kinds.values():
            shown = keys[:keep]
            kept += [(key, 1) for key in shown[:-1]] + [(shown[-1], len(keys) - len(shown) + 1)]
        order = list(dict(tower.named_children()))
        kept.sort(key=lambda item: order.index(item[0]))
        blocks = dict(tower.named_children())
        for key in order:
            del tower._modules[key]
        for i, (key, n) in enumerate(kept):
            new = key if isinstance(tower, nn.ModuleDict) else str(i)
            tower._modules[new] = blocks[key]
            if n > 1:
                times[f"{tower_name}.{new}"] = n
            if new != key:
                names[f"{tower_name}.{new}"] = f"{tower_name}.{key}"
    return Copy(model, names, times)


def towers(model: nn.Module, more_than: int = _KEPT) -> list[tuple[str, nn.Module]]:
    """The outermost containers of more blocks (modules with children) than a copy keeps, by name."""
    found: list[tuple[str, nn.Module]] = []
    for name, module in model.named_modules():
        if any(name.startswith(outer + ".") for outer, _ in found):
            continue
        if isinstance(module, nn.ModuleList | nn.ModuleDict | nn.Sequential) and name:
            children = list(module.children())
            if len(children) > more_than and all(any(True for _ in child.children()) for child in children):
                found.append((name, module))
    return found


def _kind(block: nn.Module, name: str, styles: Mapping[str, Style]) -> tuple[Any, ...]:
    facts: list[Any] = []
    for inner, module in block.named_modules():
        plain = tuple(
            (key, value)
            for key, value in sorted(module.__dict__.items())
            if isinstance(value, int | float | str) and not key.startswith("_") and not _numbers_a_layer(key)
        )
        style = styles.get(f"{name}.{inner}" if inner else name)
        facts.append((inner, type(module), plain, repr(style)))
    tensors: list[tuple[str, Tensor]] = [*block.named_parameters(), *block.named_buffers()]
    facts += [(key, tuple(t.shape), t.dtype, t.requires_grad) for key, t in tensors]
    return tuple(facts)


def _numbers_a_layer(key: str) -> bool:
    return any(word in key for word in _POSITION)

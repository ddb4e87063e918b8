"""Which modules of a model are its blocks: the repeated layers that are checkpointed, compiled and gathered one by one.

[Note: blocks]
stack: a container whose entries are blocks: `model.layers`, or `encoder.block` and `decoder.block`, which are two.
block: an entry of a stack that has submodules. A Linear or a norm in a list is none.

Stacks are the outermost such containers. A list inside a block (the experts of a mixture, the sublayers of a T5
block) belongs to the block: its entries may not run at all in a step, and are too small to be worth a unit.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True)
class BlockStack:
    """One stack of a model.

    Attributes:
        name: of the container in the model; "" when the model is the container.
        blocks: by their keys in the container, in order.
    """

    name: str
    container: nn.Module
    blocks: dict[str, nn.Module]

    def named_blocks(self) -> Iterator[tuple[str, nn.Module]]:
        """Each block with its fully qualified name in the model."""
        for key, block in self.blocks.items():
            yield f"{self.name}.{key}" if self.name else key, block


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """The blocks of all stacks, in order; none for a model that repeats nothing. Entries that are None are left out."""
    return [block for stack in block_stacks(model) for block in stack.blocks.values()]


def block_stacks(model: nn.Module) -> list[BlockStack]:
    """The outermost stacks of a model, in the order of its modules."""
    return list(_stacks("", model))


def _stacks(name: str, module: nn.Module) -> Iterator[BlockStack]:
    blocks = _blocks_in(module)
    if blocks:
        yield BlockStack(name, module, blocks)
        return
    for key, child in module.named_children():
        yield from _stacks(f"{name}.{key}" if name else key, child)


def _blocks_in(module: nn.Module) -> dict[str, nn.Module]:
    """The blocks when `module` is a stack, else none.

    A ModuleList usually holds equal layers. A Sequential or a ModuleDict may also hold different modules (`embed`,
    `layers`, `head`; an encoder and a decoder), so there a class has to occur twice, under keys that end in a digit.
    """
    if not isinstance(module, nn.ModuleList | nn.Sequential | nn.ModuleDict):
        return {}
    blocks = {key: child for key, child in module.named_children() if _is_block(child)}
    if isinstance(module, nn.ModuleList):
        return blocks
    classes = Counter(type(child) for key, child in blocks.items() if key[-1].isdigit())
    return {key: child for key, child in blocks.items() if classes[type(child)] > 1}


def _is_block(module: nn.Module) -> bool:
    if isinstance(module, nn.ModuleList | nn.ModuleDict) or _blocks_in(module):
        return False
    return next(module.children(), None) is not None

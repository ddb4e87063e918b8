"""What a model puts into a checkpoint, and what one save consists of.

Tensors are stored under the names that the unsharded, uncompiled model gives them: `layers.0.mlp.up_proj.weight`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from colrow.checkpoint.manifest import Manifest, OptimizerRecord
from colrow.checkpoint.pieces import Piece, pieces_of
from colrow.errors import CheckpointError
from colrow.sharding.layout import Packed, packed_of, unwrapped_name

Model = nn.Module | Sequence[nn.Module]
"""A model, or the pipeline stages of this rank."""

OPTIMIZER_PREFIX = "optimizer."
"""The names of an optimizer's tensors begin with it (optimizer_state.py)."""


@dataclass(frozen=True)
class NamedTensor:
    """A parameter or buffer under the name it is stored by."""

    name: str
    tensor: Tensor
    packed: Packed | None

    def pieces(self, *, planned: bool = False) -> list[Piece]:
        return pieces_of(self.name, self.tensor, self.packed, planned=planned)


@dataclass(frozen=True)
class Snapshot:
    """One save: the values that training may change next are copied, or written before it goes on."""

    pieces: list[Piece]
    optimizer: OptimizerRecord | None
    """This rank's."""
    manifest: Manifest
    """All of it but the model's signature and the files."""
    extra: str
    """The text of extra.json."""
    buffers: dict[str, str]
    """A digest of each buffer that the ranks hold as copies."""


def stages_of(model: Model) -> list[nn.Module]:
    """This rank's stages; without a pipeline the model is the only one."""
    return [model] if isinstance(model, nn.Module) else list(model)


def model_tensors(model: Model, tied: Mapping[str, str] | None = None) -> list[NamedTensor]:
    """Parameters and persistent buffers of a model, or of the pipeline stages that this rank holds.

    A tensor with several names comes once, under its first. `tied` maps names that are another's copy (an output
    embedding on the last stage) to the name they are stored by: then both are loaded, and one is saved.

    Raises:
        CheckpointError: a module has state that is in no tensor, or a name is the optimizer's.
    """
    named, seen = [], set()
    for part in stages_of(model):
        require_storable(part)
        for full_name, tensor in part.state_dict(keep_vars=True).items():  # FSDP's hooks reshard its parameters here
            name = unwrapped_name(full_name)
            name = (tied or {}).get(name, name)
            if not isinstance(tensor, Tensor):
                raise CheckpointError(f"the model's state {name} is a {type(tensor).__name__}: only tensors are stored")
            if name.startswith(OPTIMIZER_PREFIX):
                raise CheckpointError(f"the model's {name} takes the optimizer's name: call that module otherwise")
            if id(tensor) not in seen:
                seen.add(id(tensor))
                named.append(NamedTensor(name, tensor, packed_of(part, full_name)))
    return named


def require_storable(model: nn.Module) -> None:
    """Raise a CheckpointError, with the name, for a module whose state is not all in parameters and buffers."""
    for name, module in model.named_modules():
        if type(module).get_extra_state is not nn.Module.get_extra_state:
            raise CheckpointError(
                f"{unwrapped_name(name) or 'the model'} ({type(module).__name__}) has an extra state "
                "(get_extra_state), and a checkpoint keeps parameters and buffers alone: register it as a buffer"
            )


def buffer_digests(named: list[NamedTensor]) -> dict[str, str]:
    """A digest of each buffer that is no DTensor, by name: all ranks that hold it must hold the same values."""
    return {
        item.name: hashlib.blake2b(_bytes(item.tensor), digest_size=16).hexdigest()
        for item in named
        if not isinstance(item.tensor, nn.Parameter | DTensor)
    }


def require_equal_buffers(digests: Sequence[Mapping[str, str]]) -> None:
    """Raise a CheckpointError, with the name, where a buffer's digest is not the same on each rank that holds it."""
    first: dict[str, tuple[int, str]] = {}
    for rank, found in enumerate(digests):
        for name, digest in found.items():
            holder, expected = first.setdefault(name, (rank, digest))
            if digest != expected:
                raise CheckpointError(
                    f"buffer {name} holds other values on rank {rank} than on rank {holder}, and a checkpoint keeps "
                    "one: make it equal on all ranks before the save (colrow.train.buffers.WrittenBuffers "
                    "averages over data ranks), or register it with persistent=False"
                )


def _bytes(tensor: Tensor) -> Any:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()

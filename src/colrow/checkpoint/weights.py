"""Weights of a model that was built on the meta device: memory for them, and their seeded initial values."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from colrow.errors import ConfigError
from colrow.models.huggingface import stored_name
from colrow.models.init import init_tensor
from colrow.parallel.layout import boxes, local_tensor, packed_of
from colrow.parallel.parallelize import tie, tied_parameters

# Wrappers put these between a module's name and its parameters': torch.compile, activation checkpointing.
_WRAPPERS = ("_orig_mod.", "_checkpoint_wrapped_module.")


def materialize(model: nn.Module, device: torch.device | str) -> nn.Module:
    """Give memory on `device` to every parameter that is on the meta device, in place; what has values is moved.

    The values are arbitrary until they are filled. Tied parameters stay tied, DTensors keep their placements, and a
    model may be wrapped by FSDP2 or not.

    Raises:
        ConfigError: a buffer is on the meta device, and nothing would fill it.
    """
    lost = [name for name, buffer in model.named_buffers() if buffer.is_meta]
    if lost:
        raise ConfigError(
            f"the values of buffer {lost[0]}{f' and {len(lost) - 1} more' if len(lost) > 1 else ''} were lost on the "
            "meta device: build the model on the CPU, or move its parameters alone to the meta device"
        )
    ties = tied_parameters(model)
    model._apply(lambda t: torch.empty_like(t, device=device) if t.is_meta else t.to(device))
    tie(model, ties)
    return model


@torch.no_grad()
def fill_seeded(model: nn.Module, seed: int) -> None:
    """Write the initial value of each parameter, of which every rank computes the part that it holds.

    A value depends on (seed, the parameter's fully qualified name, its place in the whole tensor) alone, so all meshes
    start from the same bits. A tied head takes the embedding's, also on a pipeline stage without an embedding.

    Raises:
        ConfigError: the model has no config with num_hidden_layers, or a parameter that no rule knows.
    """
    config = getattr(model, "config", None)
    if not isinstance(getattr(config, "num_hidden_layers", None), int):
        raise ConfigError(
            f"{type(model).__name__} has no config.num_hidden_layers, by which initial values are scaled: "
            "initialise the model in the callable that builds it, or start from a folder of weights"
        )
    tied = bool(getattr(config, "tie_word_embeddings", False))
    for fqn, param in model.named_parameters():
        _fill(param, stored_name(plain_name(fqn), tied), seed, config, boxes(param, packed_of(model, fqn)))


def plain_name(fqn: str) -> str:
    """A parameter's name in the model as it was built, before wrappers."""
    for wrapper in _WRAPPERS:
        fqn = fqn.replace(wrapper, "")
    return fqn


def _fill(param: Tensor, name: str, seed: int, config: object, held: list) -> None:
    local = local_tensor(param)
    for box in held:
        part = init_tensor(
            name, tuple(param.shape), seed, local.device, config, offset=box.global_offset, size=box.size
        )
        local[box.local_slices] = part

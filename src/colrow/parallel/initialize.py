"""Weights of a model that was built on the meta device: memory for them, and their seeded initial values."""

from __future__ import annotations

import torch
from torch import nn

from colrow.checkpoint.state import model_tensors
from colrow.errors import ConfigError
from colrow.models.huggingface import name_from_huggingface, stored_name
from colrow.models.init import init_tensor
from colrow.parallel.parallelize import tie, tied_parameters


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
    for one in model_tensors(model):
        if isinstance(one.tensor, nn.Parameter):
            name = stored_name(name_from_huggingface(one.name), tied)
            for piece in one.pieces():
                size, device = piece.data.shape, piece.data.device
                piece.data.copy_(init_tensor(name, piece.shape, seed, device, config, offset=piece.offset, size=size))

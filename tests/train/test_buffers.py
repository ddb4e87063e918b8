"""Stored buffers have their shapes from the start."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from colrow.errors import ConfigError
from colrow.train.buffers import WrittenBuffers


class Keeping(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("average", None)
        self.register_buffer("history", torch.zeros(1))
        self.register_buffer("mask", torch.zeros(1), persistent=False)


def test_a_stored_buffer_that_forward_makes_or_grows_is_refused_in_the_first_step() -> None:
    """A run in one process too: its checkpoints could not be loaded."""
    for name, size, shape in (("average", 3, r"\[3\].*with none"), ("history", 2, r"\[2\].*with \[1\]")):
        model = nn.Sequential(Keeping())
        buffers = WrittenBuffers([model], [])
        buffers.begin()
        setattr(model[0], name, torch.zeros(size))
        with pytest.raises(ConfigError, match=rf"forward gives the buffer 0\.{name} the shape {shape}"):
            buffers.combine()


def test_other_values_and_buffers_that_are_not_stored_pass() -> None:
    model = Keeping()
    buffers = WrittenBuffers([model], [])
    buffers.begin()
    model.history, model.mask = torch.ones(1), torch.zeros(8)
    buffers.combine()

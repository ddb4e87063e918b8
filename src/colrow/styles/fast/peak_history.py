"""Turns the steps of `fp8: delayed`, whose scales follow from the largest numbers of the last step."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from colrow.ops.float8 import HISTORY_SHAPE
from colrow.styles.fast.linear import HISTORY, multiplied


class PeakHistory:
    """The peaks of all linears with `fp8: delayed` in `modules`: see [Note: peak history] in `ops.float8`.

    It is no part of a checkpoint: the first step after a start takes the scales of its own numbers.

    Args:
        modules: the model, or a rank's pipeline stages, parallelized and on their device.
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        delayed = [
            module for model in modules for module, each in multiplied(model).items() if each.options.fp8 == "delayed"
        ]
        if not delayed:
            self._rows = torch.empty(0, *HISTORY_SHAPE)
            return
        # one tensor for all, so that a step costs a few kernels; its address stays, for CUDA graphs
        device = next(multiplied(delayed[0])[delayed[0]].linears[0].parameters()).device
        self._rows = torch.zeros(len(delayed), *HISTORY_SHAPE, device=device)
        for module, row in zip(delayed, self._rows.unbind(), strict=True):
            module.__dict__[HISTORY] = row

    @contextmanager
    def step(self) -> Iterator[None]:
        """Around forward and backward of all micro-batches of a training step. An evaluation stays outside: it rounds
        by the last step's peaks, and leaves none."""
        if not len(self._rows):
            yield
            return
        last, seen = self._rows[..., 0], self._rows[..., 1]
        with torch.no_grad():
            seen.zero_()  # what ran since the last step has left its peaks
        yield
        with torch.no_grad():
            # Zeros say nothing of the next step's numbers. After NaN or infinity the last finite peak still holds.
            last.copy_(torch.where((seen > 0) & seen.isfinite(), seen, last))

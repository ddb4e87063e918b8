"""Validation loss: always the same batches, drawn from all of the held-out text whatever the run's seed."""

from __future__ import annotations

import torch
import torch.distributed as dist

from colrow.config import RunConfig
from colrow.data.loader import BatchOrder, DataAxisSampler, Loader
from colrow.data.prepare import PreparedData
from colrow.train.step import ForwardBackward


class Evaluation:
    """Validation batches of this rank.

    Args:
        share: this rank's weight in a sum over all ranks that gives the mean: 0 where another rank reports the same.
    """

    def __init__(self, config: RunConfig, data: PreparedData, dp_rank: int, share: float, device: torch.device) -> None:
        seq_len, train = config.data.seq_len, config.train
        self.batches = config.eval.batches
        # in a fixed but mixed order: the first windows alone would be a few files
        order = BatchOrder(data.validation.windows(seq_len), train.global_batch, seed=0)
        sampler = DataAxisSampler(order, dp_rank, config.mesh.dp, train.micro_batch)
        self._loader = Loader(data.validation, seq_len, sampler, device)
        self._share, self._device = share, device

    def __call__(self, forward_backward: ForwardBackward) -> float:
        """The mean loss in nats a token over all ranks. Collective."""
        losses = [forward_backward.evaluate(list(self._loader.batches(step))) for step in range(self.batches)]
        loss = torch.stack(losses).double().mean() * self._share
        dist.all_reduce(loss)
        return loss.item()

    def close(self) -> None:
        self._loader.close()

"""Validation loss: always the same batches, drawn from all of the held-out text whatever the run's seed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import nn

from colrow.config import RunConfig
from colrow.data.loader import Batch, BatchOrder, DataAxisSampler, Loader
from colrow.data.prepare import PreparedData
from colrow.parallel.random_state import Generators, derive_seed
from colrow.train.buffers import BufferSnapshot
from colrow.train.step import ForwardBackward

IGNORED = -100
"""The target that no loss counts."""


@contextmanager
def evaluation_mode(modules: Sequence[nn.Module], device: torch.device) -> Iterator[Generators]:
    """Within, the modules compute as in evaluation. Afterwards the state of training is as it was: which of them train,
    every buffer, every generator of random numbers."""
    generators = Generators(modules, device)
    parts = [part for module in modules for part in module.modules()]
    training = [(part, part.training) for part in parts]
    buffers = BufferSnapshot(modules)
    with generators.preserved():
        for module in modules:
            module.eval()
        try:
            yield generators
        finally:
            for part, trains in training:
                part.training = trains
            buffers.restore()


class Evaluation:
    """Validation batches of this rank: each held-out window once, or the first `eval.batches` global batches of them.

    Args:
        share: this rank's weight in a sum over all ranks that gives the mean: 0 where another rank reports the same.
    """

    def __init__(self, config: RunConfig, data: PreparedData, dp_rank: int, share: float, device: torch.device) -> None:
        seq_len, train = config.data.seq_len, config.train
        self._global_batch, self._micro_batch = train.global_batch, train.micro_batch
        self._dp_rank, self._dp = dp_rank, config.mesh.dp
        windows = data.validation.windows(seq_len)
        self._windows = min(windows, config.eval.batches * train.global_batch)
        # in a fixed but mixed order: the first windows alone would be a few files
        order = BatchOrder(windows, train.global_batch, seed=0)
        sampler = DataAxisSampler(order, dp_rank, config.mesh.dp, train.micro_batch)
        self._loader = Loader(data.validation, seq_len, sampler, device)
        self._share, self._device = share, device

    def __call__(self, forward_backward: ForwardBackward, modules: Sequence[nn.Module]) -> float:
        """The mean loss in nats a token over all ranks; `modules` are the runner's. Collective."""
        losses, weights = [], []
        with evaluation_mode(modules, self._device) as generators:
            for number in range(-(-self._windows // self._global_batch)):
                generators.seed(derive_seed("evaluation", number, self._dp_rank))  # of a model that always draws
                batches = self._batches(number)
                losses.append(forward_backward.evaluate(batches))
                weights.append(len(batches) * self._micro_batch * self._dp / self._global_batch)
        # the last batch may be smaller: each loss counts by its share of windows, in fp64, since thousands are added
        weighted = torch.stack(losses).double() * torch.tensor(weights, dtype=torch.float64, device=self._device)
        # exactly 1 where every batch is full
        per_window = len(losses) * self._global_batch / self._windows
        loss = weighted.mean() * per_window * self._share
        dist.all_reduce(loss)
        return loss.item()

    def _batches(self, number: int) -> list[Batch]:
        """This rank's micro-batches of a global batch; targets of windows beyond the last do not count.

        All ranks run equally many: in the last global batch, as many as the rank that has the most windows left.
        """
        batches = list(self._loader.batches(number * self._global_batch))
        left = self._windows - number * self._global_batch
        if left >= self._global_batch:
            return batches
        per_round = self._dp * self._micro_batch
        batches = batches[: -(-left // per_round)]
        for i, (_, targets) in enumerate(batches):
            counted = left - i * per_round - self._dp_rank * self._micro_batch
            targets[max(0, counted) :] = IGNORED
        return batches

    def close(self) -> None:
        self._loader.close()

"""Which windows of tokens form a step's batch, and the tensors of them.

A step's global batch is a function of (seed, position) alone; a position is the number of windows that the run has
consumed. Each data-parallel rank takes its micro-batches from the global batch, so another mesh sees the same batches,
and a run that goes on needs to know nothing but its position: another global batch goes on there too. No randomness
has state.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType

import numpy as np
import torch
from torch import Tensor

from colrow.config import micro_batch_count
from colrow.data.permutation import Permutation
from colrow.data.shards import TokenArray
from colrow.errors import DataError

Batch = tuple[Tensor, Tensor]
"""ids and targets, int64 [micro_batch, seq_len]; targets[:, t] is the id after ids[:, t]"""


class BatchOrder:
    """The order in which `n_windows` windows are read, epoch after epoch, each once an epoch.

    A batch may begin in one epoch and end in the next, so every batch has its full size.

    Args:
        global_batch: windows in one step, over all ranks.
        seed: chooses the order; None reads the windows from the first to the last.
    """

    def __init__(self, n_windows: int, global_batch: int, seed: int | None) -> None:
        if n_windows < 1:
            raise DataError("there is no complete sequence to read: use more text, or a shorter data.seq_len")
        self.n_windows, self.global_batch, self.seed = n_windows, global_batch, seed

    def indices(self, position: int) -> np.ndarray:
        """The windows of the global batch that follows the first `position` windows: int64 [global_batch]."""
        assert position >= 0
        positions = np.arange(position, position + self.global_batch, dtype=np.int64)
        epochs, windows = np.divmod(positions, self.n_windows)
        if self.seed is None:
            return windows
        for epoch in range(int(epochs[0]), int(epochs[-1]) + 1):
            in_epoch = epochs == epoch
            windows[in_epoch] = Permutation(self.n_windows, f"windows {self.seed} {epoch}")(windows[in_epoch])
        return windows


class DataAxisSampler:
    """One data-parallel rank's share of each global batch.

    The global batch is split into micro-batches, and micro-batch i goes to rank i mod dp_degree: a micro-batch holds
    the same windows whatever the number of ranks.

    Args:
        dp_rank: this rank's place on the data axes together (dp_replicate × dp_shard). Ranks that differ in tp or pp
            alone have the same.
        dp_degree: ranks on the data axes together.

    Raises:
        ConfigError: global_batch does not divide.
    """

    def __init__(self, order: BatchOrder, dp_rank: int, dp_degree: int, micro_batch: int) -> None:
        assert 0 <= dp_rank < dp_degree
        self.accumulation = micro_batch_count(order.global_batch, micro_batch, dp_degree)
        self.order, self.dp_rank, self.dp_degree, self.micro_batch = order, dp_rank, dp_degree, micro_batch

    def micro_batches(self, position: int) -> list[np.ndarray]:
        """The windows of each micro-batch of this rank from `position` on: `accumulation` arrays, int64 [micro_batch].

        Args:
            position: windows that all ranks together have consumed before.
        """
        # [accumulation, dp, micro_batch]: micro-batch i of the global batch is at [i // dp, i % dp]
        windows = self.order.indices(position).reshape(self.accumulation, self.dp_degree, self.micro_batch)
        return list(windows[:, self.dp_rank])


class Loader:
    """A rank's batches as tensors. The next global batch is read in the background while this one is used.

    Args:
        device: where the tensors go; to a CUDA device they are copied from pinned memory without waiting.
    """

    def __init__(
        self, tokens: TokenArray, seq_len: int, sampler: DataAxisSampler, device: torch.device | str = "cpu"
    ) -> None:
        if sampler.order.n_windows > tokens.windows(seq_len):
            raise DataError(
                f"the batch order counts {sampler.order.n_windows:,} windows, but {tokens.path} has "
                f"{tokens.windows(seq_len):,} of {seq_len:,} tokens"
            )
        self._tokens, self._seq_len, self._sampler = tokens, seq_len, sampler
        self._device = torch.empty(0, device=device).device  # "cuda" becomes the current device, by its number
        self._ahead: tuple[int, Future[list[Batch]]] | None = None
        self._thread = ThreadPoolExecutor(1, "colrow-loader", initializer=self._enter_thread)

    def batches(self, position: int) -> Iterator[Batch]:
        """This rank's micro-batches of the global batch at `position`, in any order of positions: ids and targets,
        int64 [micro_batch, seq_len]."""
        if self._ahead is None or self._ahead[0] != position:
            self._ahead = (position, self._thread.submit(self._read, position))
        read = self._ahead[1].result()
        # Submitted before the first yield: it is read while the step that uses this one runs.
        following = position + self._sampler.order.global_batch
        self._ahead = (following, self._thread.submit(self._read, following))
        for ids, targets in read:
            yield ids.to(self._device, non_blocking=True), targets.to(self._device, non_blocking=True)

    def close(self) -> None:
        """End the background thread."""
        self._thread.shutdown(wait=True, cancel_futures=True)
        self._ahead = None

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, cls: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def _enter_thread(self) -> None:
        # A new thread is on device 0: pin_memory would create a second CUDA context there.
        if self._device.type == "cuda":
            torch.cuda.set_device(self._device)

    def _read(self, position: int) -> list[Batch]:
        return [self._tensors(indices) for indices in self._sampler.micro_batches(position)]

    def _tensors(self, indices: np.ndarray) -> Batch:
        windows = torch.from_numpy(self._tokens.read(indices, self._seq_len))
        ids, targets = windows[:, :-1].contiguous(), windows[:, 1:].contiguous()
        if self._device.type == "cuda":
            return ids.pin_memory(), targets.pin_memory()
        return ids, targets


def batch_fingerprint(ids: Tensor) -> int:
    """A hash of the values and the shape of `ids`, below 2^63 so that an int64 tensor holds it. Copies to the host."""
    digest = hashlib.blake2b(repr(tuple(ids.shape)).encode(), digest_size=8)
    digest.update(ids.detach().to("cpu", torch.int64).contiguous().numpy().tobytes())
    return int.from_bytes(digest.digest(), "little") & (2**63 - 1)

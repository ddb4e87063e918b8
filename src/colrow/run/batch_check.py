"""Checks, while training, that ranks which hold shards of one model read the same batch.

Nothing else would notice: with sequence parallelism and a vocabulary-parallel loss all ranks of a group report the
same loss even when each reads other tokens, and the gradients are wrong.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from colrow.data.loader import batch_fingerprint
from colrow.errors import DataError


def check_same_batch(batches: Sequence[tuple[Tensor, Tensor]], groups: Sequence[dist.ProcessGroup], step: int) -> None:
    """Compare the hash of this rank's micro-batches over each of `groups`. Collective.

    Raises:
        DataError: on every rank of a group in which they differ.
    """
    hashes = torch.tensor(
        [batch_fingerprint(torch.stack((ids, targets))) for ids, targets in batches],
        device=batches[0][0].device,
    )
    for group in groups:
        # gathered, not reduced to a minimum and a maximum: the message can name a rank that differs
        gathered = [torch.empty_like(hashes) for _ in range(dist.get_world_size(group))]
        dist.all_gather(gathered, hashes, group=group)
        for rank, other in zip(dist.get_process_group_ranks(group), gathered, strict=True):
            if not torch.equal(other, hashes):
                raise DataError(
                    f"step {step + 1}: rank {dist.get_rank()} and rank {rank} hold shards of one model and read "
                    "different batches, so their gradients would be silently wrong: a sampler must depend on the "
                    "data-parallel rank alone, and all hosts must see the same token shards"
                )

"""The largest difference of the ranks' shards from the unsharded tensor."""

from __future__ import annotations

import pytest
import torch
from torch.distributed.tensor import Replicate, Shard

from colrow.verifying.comparison import Observed, Reference, Sharded, compare


@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64, torch.complex128, torch.int64])
def test_a_difference_is_seen_in_every_part_of_a_number(dtype: torch.dtype) -> None:
    complete = torch.arange(4).to(dtype)
    shards = {0: complete[:2].clone(), 1: complete[2:].clone()}
    sharded = Sharded((4,), (Shard(0),), None, shards)
    assert sharded.error(complete, 2, 1.0) == 0
    shards[1][1] += 1j if dtype.is_complex else 1
    assert sharded.error(complete, 2, 1.0) == pytest.approx(1.0)
    assert sharded.error(complete.to(torch.promote_types(dtype, torch.float64)), 2, 1.0) == pytest.approx(1.0)


@pytest.mark.parametrize(("wrong", "error"), [(False, 0.0), (True, 1.0)])
def test_a_buffer_of_booleans_is_compared(wrong: bool, error: float) -> None:
    complete = torch.tensor([True, False, True, False])
    seen = Observed(buffers={"mask": Sharded((4,), (Replicate(),), None, {0: complete ^ wrong, 1: complete})})
    assert compare(seen, Reference(0.0, {}, {}, {"mask": complete}), 2).buffers == {"mask": error}

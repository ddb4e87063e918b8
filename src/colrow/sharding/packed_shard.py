"""The placement of a packed parameter: what torch would gather in a wrong order, it refuses to gather.

[Note: packed parameters]
A fused weight (q, k and v; gate and up) is a concatenation of segments. Tensor parallelism shards each segment on its
own, so a rank holds one shard of each. DTensor knows only one shard of the complete dim. It computes rightly on such
local tensors, but a gather puts the ranks' rows one after another, which is not the global order. (`_StridedShard` does
not express it: under FSDP2 on the same dim torch gathers it in yet another order.) So gathering raises, and
`layout.full_tensor` puts the rows where they belong.
"""

from __future__ import annotations

from typing import Any, NoReturn

from torch.distributed.tensor import Shard

from colrow.errors import PlacementError
from colrow.torch_compat import tell_specs_apart


class PackedShard(Shard):
    """`Shard(dim)` of a parameter whose `segments` along dim are sharded each on its own."""

    segments: tuple[int, ...]

    def __init__(self, dim: int, segments: tuple[int, ...]) -> None:
        super().__init__(dim)
        self.segments = tuple(segments)

    def __hash__(self) -> int:
        # Equal to Shard(dim), as DTensor demands of a shard; but not as a key of DTensor's caches: see below.
        return hash((PackedShard, self.dim, self.segments))

    def __reduce__(self) -> tuple[Any, ...]:
        return PackedShard, (self.dim, self.segments)

    def __copy__(self) -> PackedShard:
        return self

    def __deepcopy__(self, memo: Any) -> PackedShard:
        return self

    def __repr__(self) -> str:
        return f"PackedShard(dim={self.dim}, segments={self.segments})"

    def __str__(self) -> str:
        return f"S({self.dim}, packed)"

    def _to_replicate_tensor(self, *_: Any, **__: Any) -> NoReturn:
        raise PlacementError(
            f"a parameter with fused segments {list(self.segments)} is sharded segment by segment: torch would gather "
            "its rows in the order of the ranks. Use colrow.full_tensor(tensor), or colrow's checkpoints and export"
        )

    def _to_new_shard_dim(self, *_: Any, **__: Any) -> NoReturn:
        self._to_replicate_tensor()


# DTensor caches the output placements of an operation by the specs of its inputs. A plain tensor of the same shape
# must not get from there what was computed for a packed one, nor the reverse.
tell_specs_apart(PackedShard)

"""Whether copy engines are used is one decision of all ranks: an obstacle on one of them raises on every one."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from colrow.errors import ConfigError
from colrow.ops import copy_engine_cuda
from colrow.ops.carriers import carrier
from helpers.harness import Ranks

BLOCKED = "GPU 0 has no access to the memory of GPU 1"


def chosen(device: str, obstacles: dict[int, str], broken: tuple[int, ...]) -> str:
    """The error of a rank that asks for copy engines; empty if it gets one.

    `obstacles` are what a rank finds when it looks at its GPUs; on `broken` ranks memory cannot be shared.
    """
    rank = dist.get_rank()

    def driver(_: object) -> None:
        if rank in broken:
            raise RuntimeError("out of handles")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(copy_engine_cuda, "_obstacle", lambda *_: obstacles.get(rank))
        patch.setattr(copy_engine_cuda, "Cuda", driver)
        patch.setattr(copy_engine_cuda, "_side_stream", lambda *_: 0)
        patch.setattr(copy_engine_cuda, "_symmetric_ring", lambda *_: None)
        patch.setattr(copy_engine_cuda, "_ENGINES", {})
        try:
            carrier("copy_engine", str(dist.group.WORLD.group_name), torch.device(device))  # type: ignore[union-attr]
        except ConfigError as error:
            return str(error)
    return ""


@pytest.mark.distributed
def test_an_obstacle_on_one_rank_raises_on_every_rank(ranks: Ranks) -> None:
    texts = ranks(2).run(chosen, {1: BLOCKED}, ())
    assert texts[0] == texts[1]
    assert f"here rank 1 finds: {BLOCKED}" in texts[0]


@pytest.mark.distributed
def test_a_failure_on_one_rank_raises_on_every_rank(ranks: Ranks) -> None:
    texts = ranks(2).run(chosen, {}, (0,))
    assert texts[0] == texts[1]
    assert "here rank 0 finds: memory cannot be shared (out of handles)" in texts[0]


@pytest.mark.distributed
def test_what_all_ranks_find_is_reported_once(ranks: Ranks) -> None:
    for text in ranks(2).run(chosen, {0: BLOCKED, 1: BLOCKED}, ()):
        assert f"here {BLOCKED}: use" in text


@pytest.mark.distributed
def test_ranks_without_an_obstacle_get_an_engine(ranks: Ranks) -> None:
    """The negative control."""
    assert ranks(2).run(chosen, {}, ()) == ["", ""]

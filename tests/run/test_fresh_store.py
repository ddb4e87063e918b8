"""The ranks of each start share a store in which no previous start has written."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
import torch.distributed as dist

from colrow.run.fresh_store import fresh_store


@pytest.fixture
def store() -> dist.TCPStore:
    return dist.TCPStore("127.0.0.1", 0, None, is_master=True, timeout=timedelta(seconds=20), wait_for_workers=False)


def client(store: dist.TCPStore) -> dist.TCPStore:
    """A rank's own connection: blocking calls on a shared one wait for each other."""
    return dist.TCPStore("127.0.0.1", store.port, None, is_master=False, timeout=timedelta(seconds=20))


def start(store: dist.TCPStore, order: list[int]) -> list[dist.Store]:
    """What the ranks get that call in this order, by rank."""
    with ThreadPoolExecutor(len(order)) as threads:
        calls = {rank: threads.submit(fresh_store, client(store), rank, len(order)) for rank in order}
    return [calls[rank].result() for rank in sorted(order)]


def test_each_start_gets_a_part_of_the_store_that_no_previous_one_has_written_to(store: dist.TCPStore) -> None:
    for order in ([0, 1, 2], [2, 1, 0], [1, 0, 2]):
        parts = start(store, order)
        assert not parts[0].check(["address"])
        parts[1].set("address", str(order))
        assert [part.get("address").decode() for part in parts] == [str(order)] * 3
        store.set("shared", "x")
    assert client(store).check(["shared"])  # the control: in the store itself a later start finds what was written


def test_a_rank_that_died_before_the_roll_call_is_not_taken_for_its_successor(store: dist.TCPStore) -> None:
    store.set("colrow/rank/1", "dead")
    store.set("colrow/reply/dead-first/dead", "")
    with pytest.raises(TimeoutError, match="ranks 1 did not come"):
        fresh_store(client(store), 0, 2, timeout=timedelta(seconds=0.5))
    first, second = start(store, [1, 0])
    first.set("key", "value")
    assert second.get("key") == b"value"

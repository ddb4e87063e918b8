"""How ranks find each other, also after torchrun has started them anew.

torchrun's agents keep one store for a run, and each restart's ranks meet in it. What the former ranks have written is
still there: addresses of processes that are gone, and counters that are not zero. A rank that reads them connects to
nothing, or passes a barrier on its own. So the ranks of each start agree on a prefix that no other start has used.

[Note: roll call] The first rank must tell a rank that lives from what a former one left, and the others a first rank
that lives. Each writes a token of its own, drawn at random. The first rank answers each token it finds with its own; a
rank that reads this under its token replies under both, which no dead process can have done. When all have replied, the
first rank writes the prefix under each of their tokens.
"""

from __future__ import annotations

import time
import uuid
from datetime import timedelta

from torch.distributed.distributed_c10d import PrefixStore, Store

PATIENCE = timedelta(minutes=30)
"""How long the first rank waits for the others: torch's own time for joining a group."""
_POLL_SECONDS = 0.02


def meet(store: Store, rank: int, world_size: int, timeout: timedelta = PATIENCE) -> Store:
    """A part of `store` that belongs to the `world_size` ranks that call this now, and that nobody has written to.

    Collective over the ranks, each once; those of former starts must have ended. Ranks but the first wait as long as
    the store does.

    Raises:
        TimeoutError: on the first rank, when others do not come within `timeout`.
    """
    token = uuid.uuid4().hex
    if rank == 0:
        tokens = _roll_call(store, token, world_size, timeout)
        for other in tokens:
            store.set(f"colrow/prefix/{other}", token)
        return PrefixStore(f"colrow/{token}", store)
    store.set(f"colrow/rank/{rank}", token)
    first = store.get(f"colrow/first/{token}").decode()
    store.set(f"colrow/reply/{first}/{token}", "")
    return PrefixStore(f"colrow/{store.get(f'colrow/prefix/{token}').decode()}", store)


def _roll_call(store: Store, first: str, world_size: int, timeout: timedelta) -> list[str]:
    """The tokens of all other ranks, when each has replied to `first`."""
    waiting: dict[int, str] = dict.fromkeys(range(1, world_size), "")
    replied = []
    end = time.monotonic() + timeout.total_seconds()
    while waiting:
        for rank, known in list(waiting.items()):
            token = store.get(f"colrow/rank/{rank}").decode() if store.check([f"colrow/rank/{rank}"]) else ""
            if token != known:
                waiting[rank] = token
                store.set(f"colrow/first/{token}", first)
            if token and store.check([f"colrow/reply/{first}/{token}"]):
                replied.append(token)
                del waiting[rank]
        if waiting and time.monotonic() > end:
            raise TimeoutError(f"ranks {', '.join(map(str, waiting))} did not come within {timeout}")
        time.sleep(_POLL_SECONDS if waiting else 0)
    return replied

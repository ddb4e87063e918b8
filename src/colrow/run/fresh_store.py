"""A store that only the ranks of this start use, also after torchrun has restarted a failed group.

torchrun's agents keep one store for the job, and the ranks of each restart connect to it. It still holds what the
previous ranks wrote: addresses of dead processes, and counters that are not zero. A rank that reads them connects to
nothing, or passes a barrier on its own. So the ranks of each start agree on a prefix that no other start has used.

[Note: roll call] Rank 0 must tell a live rank's entry from a dead one's, and the other ranks must find a rank 0 that is
alive. Each rank writes a random token of its own. Rank 0 answers every token that it finds with its own token; a rank
that reads this answer replies under both tokens, which no dead process can have done. When all ranks have replied,
rank 0 writes the prefix under each of their tokens.
"""

from __future__ import annotations

import time
import uuid
from datetime import timedelta

from torch.distributed.distributed_c10d import PrefixStore, Store

JOIN_TIMEOUT = timedelta(minutes=30)
"""How long rank 0 waits for the others: torch's own timeout for joining a group."""
_POLL_SECONDS = 0.02


def fresh_store(store: Store, rank: int, world_size: int, timeout: timedelta = JOIN_TIMEOUT) -> Store:
    """A prefix of `store` for the `world_size` ranks that call this now, empty at first.

    Collective over the ranks, once each; the ranks of previous starts must have ended. Ranks other than 0 wait for as
    long as `store` itself does.

    Raises:
        TimeoutError: on rank 0, when ranks are missing after `timeout`.
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
    """The tokens of all ranks but 0, once each has replied to `first`, the token of rank 0."""
    missing: dict[int, str] = dict.fromkeys(range(1, world_size), "")
    replied = []
    end = time.monotonic() + timeout.total_seconds()
    while missing:
        for rank, known in list(missing.items()):
            # check() first: get() would block until the rank has written
            token = store.get(f"colrow/rank/{rank}").decode() if store.check([f"colrow/rank/{rank}"]) else ""
            if token != known:  # new, or a live rank has overwritten what a dead one left
                missing[rank] = token
                store.set(f"colrow/first/{token}", first)
            if token and store.check([f"colrow/reply/{first}/{token}"]):
                replied.append(token)
                del missing[rank]
        if missing and time.monotonic() > end:
            raise TimeoutError(f"ranks {', '.join(map(str, missing))} did not come within {timeout}")
        time.sleep(_POLL_SECONDS if missing else 0)
    return replied

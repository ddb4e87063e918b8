"""torch's flight recorder: the collectives that this process has issued, and which of them have completed.

There are two recorders in a process: one for NCCL, and one for the other backends (gloo).
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch.distributed as dist

from colrow.torch_compat.names import private

_MODULE = "torch._C._distributed_c10d"
_ENTRIES = "2000"


def record_collectives() -> None:
    """Turn the recorder on, for the last 2,000 collectives, unless the environment says how many. Call it before the
    first process group is made."""
    os.environ.setdefault("TORCH_FR_BUFFER_SIZE", _ENTRIES)


def _dump(form: str) -> Any:
    """The function that dumps the default group's recorder as `trace` (pickle) or `trace_json`."""
    name = "_dump_nccl_" if dist.get_backend() == "nccl" else "_dump_fr_"
    return private(f"{_MODULE}:{name}{form}", "to say in which collective a rank hangs")


def collective_counts() -> dict[str, tuple[int, int]]:
    """How many collectives were issued, and how many of them have completed, by process group. Takes 0.1 ms; empty
    before there is a group."""
    if not dist.is_initialized():
        return {}
    status = json.loads(_dump("trace_json")(includeCollectives=False)).get("pg_status", {})
    return {
        group: (int(each["last_enqueued_collective"]), int(each["last_completed_collective"]))
        for group, each in status.items()
    }


def recorded_collectives() -> list[dict[str, Any]]:
    """The recorded collectives, oldest first: `pg_id`, `collective_seq_id`, `profiling_name`, `input_sizes`, ... Takes
    some 0.1 s; on GPUs not while a CUDA graph is captured, for it queries events."""
    entries: list[dict[str, Any]] = json.loads(_dump("trace_json")()).get("entries", [])
    return entries


def flight_record() -> bytes:
    """The record in torch's own form, which `torchfrtrace` reads; without the stacks, which take it seconds."""
    dumped: bytes = _dump("trace")(includeStackTraces=False)
    return dumped


@contextmanager
def around_compilation(start: Callable[[], None], end: Callable[[], None]) -> Iterator[None]:
    """Within, call `start` before and `end` after torch.compile compiles something in this process."""
    handler = private("torch._dynamo.callback:callback_handler", "to know compilation from a hang")
    callbacks = (lambda _: start(), lambda _: end())
    handler.register_start_callback(callbacks[0])
    handler.register_end_callback(callbacks[1])
    try:
        yield
    finally:
        with suppress(ValueError):  # a reset of torch.compile has removed them
            handler.remove_start_callback(callbacks[0])
            handler.remove_end_callback(callbacks[1])

"""Continuing a run from the newest complete checkpoint of its folder."""

from __future__ import annotations

import torch.distributed as dist

from colrow.checkpoint.distributed import Checkpoints
from colrow.config import RunConfig
from colrow.data.prepare import PreparedData
from colrow.errors import DataError
from colrow.train.setup import Training


def resume(config: RunConfig, training: Training, data: PreparedData, checkpoints: Checkpoints) -> int:
    """Load the newest complete checkpoint of the run's folder, if there is one. Collective. Returns its step, or 0.

    Raises:
        CheckpointError: it is of another model or vocabulary.
        DataError: the corpus has changed since it was saved.
    """
    found: list[int | None] = [None]
    if dist.get_rank() == 0:
        latest = checkpoints.latest()
        found = [None if latest is None else latest.step]
    dist.broadcast_object_list(found, src=0)
    if found[0] is None:
        return 0
    extra = checkpoints.load(found[0], training.modules, training.optimizer)
    if extra.get("corpus") != data.fingerprint:
        raise DataError(
            f"corpus {config.data.corpus!r} holds other text than when the run in {config.run.dir} began: restore the "
            "previous text, or set run.dir to another folder to start a new run"
        )
    return found[0]

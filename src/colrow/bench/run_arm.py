"""Runs one arm in processes of its own, so that neither memory nor compiled code of one is left for the next."""

from __future__ import annotations

import json
import os
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from colrow.bench import JOB
from colrow.bench.measure import Job, measure
from colrow.run import preflight
from colrow.run.launch import launch
from colrow.run.process_group import RankInfo

RESULT = "result.json"


class ArmError(Exception):
    """A rank of the arm failed; the text says why."""


def run_arm(job: Job) -> dict[str, Any]:
    """What `measure` returns on the ranks, which start now on this host.

    Raises:
        ArmError: a rank failed.
        KeyboardInterrupt: a signal has ended the ranks.
    """
    ranks = 1 if job.one_rank else job.config.mesh.world_size
    # else torchrun gives each rank one thread
    os.environ.setdefault("OMP_NUM_THREADS", str(preflight.threads_for(ranks)))
    with tempfile.TemporaryDirectory(prefix="colrow-bench-") as folder:
        file = Path(folder) / "job.json"
        file.write_text(job.model_dump_json(), encoding="utf-8")
        failure = launch(["-m", "colrow", "bench", JOB, str(file)], ranks, save=False).failure
        if failure is not None:
            raise ArmError(failure.text.strip())
        result: dict[str, Any] = json.loads((Path(folder) / RESULT).read_text(encoding="utf-8"))
        return result


def run_rank(file: Path, info: RankInfo) -> None:
    """One rank of `run_arm`. Collective."""
    job = Job.model_validate_json(file.read_text(encoding="utf-8"))
    if job.one_rank:  # of a mesh whose other ranks do not run
        info = replace(info, world_size=job.config.mesh.world_size)
    result = measure(job, info)
    if info.rank == 0:
        (file.parent / RESULT).write_text(json.dumps(result), encoding="utf-8")

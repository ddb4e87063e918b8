"""What is kept of a run that hangs, in the folder `hang/` of the run's.

    message.txt              what the command says
    rank-N.json              the rank's last report, and its recorded collectives
    rank-N.stacks.txt        where its threads are in Python
    flight_recorder/rank_N   torch's own record: `torchfrtrace RUN/hang/flight_recorder --prefix rank_`

A rank that answers writes its own files. For a rank that does not, its launcher does (under torchrun, the first rank
that answers): it knows how many collectives of each group the rank had issued at its last report, and ranks that
answer have recorded which those were.
"""

from __future__ import annotations

import faulthandler
import json
import pickle
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from colrow.run.heartbeat import RankReport, last_collective

FOLDER = "hang"
REQUEST_FILE = "record-to"
"""In a rank's folder: the path of the folder to write to. The launcher leaves it, and the rank's reporter looks."""
_FLIGHT_RECORDER = "flight_recorder"


def write_record(folder: Path, report: RankReport) -> None:
    """This rank's files; `rank-N.json` last, by which it is known that all are there."""
    from colrow.torch_compat import collective_counts, flight_record, recorded_collectives

    (folder / _FLIGHT_RECORDER).mkdir(parents=True, exist_ok=True)
    with (folder / f"rank-{report.rank}.stacks.txt").open("w", encoding="utf-8") as file:
        faulthandler.dump_traceback(file, all_threads=True)
    has_group = bool(collective_counts()) and report.phase != "capture"
    if has_group:
        (folder / _FLIGHT_RECORDER / f"rank_{report.rank}").write_bytes(flight_record())
    _write(folder, report, recorded_collectives() if has_group else [], "the rank")


def write_for_silent(folder: Path, silent: Iterable[RankReport], writer: str) -> dict[int, str]:
    """The files of ranks that do not answer, from those of ranks that did. `writer`: who says so.

    Returns the last collective of each, where it is known.
    """
    (folder / _FLIGHT_RECORDER).mkdir(parents=True, exist_ok=True)
    found = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("rank-*.json"))]
    known: list[dict[str, Any]] = max((each["collectives"] for each in found), key=len, default=[])
    last = {}
    for report in silent:
        entries = [entry for entry in known if was_issued(entry, report)]
        _write(folder, report, entries, writer)
        # the version of torch's own records: torchfrtrace refuses ranks of different ones
        record = {"version": "2.10", "pg_config": {}, "pg_status": {}, "entries": [_as_torchs(e) for e in entries]}
        (folder / _FLIGHT_RECORDER / f"rank_{report.rank}").write_bytes(pickle.dumps(record))
        if entries:
            last[report.rank] = last_collective(entries)
    return last


def was_issued(entry: dict[str, Any], report: RankReport) -> bool:
    """Whether a rank had issued, by its report, a collective that another rank has recorded."""
    counts = report.groups.get(str(entry["pg_id"]))
    return counts is not None and entry["collective_seq_id"] <= counts[0]


def _write(folder: Path, report: RankReport, collectives: list[dict[str, Any]], writer: str) -> None:
    data = {"written_by": writer, "report": asdict(report), "collectives": collectives}
    partial = folder / f"rank-{report.rank}.partial"
    partial.write_text(json.dumps(data), encoding="utf-8")
    partial.replace(folder / f"rank-{report.rank}.json")


def _as_torchs(entry: dict[str, Any]) -> dict[str, Any]:
    return {**entry, "process_group": tuple(entry["process_group"]), "frames": []}

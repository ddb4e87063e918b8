"""Results of a sweep: a file of JSON lines, one a model and degree, and what tables of them begin with."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from benchmarks.models.apart import Row


def read(path: Path | None) -> dict[tuple[str, int], Row]:
    """The rows of a results file by model and degree; the last one of each counts."""
    lines = path.read_text(encoding="utf-8").splitlines() if path is not None and path.exists() else []
    return {(row["model"], row["tp"]): row for row in map(json.loads, lines)}


def by_model(rows: Sequence[Row]) -> dict[str, dict[int, Row]]:
    """The rows of each model by degree."""
    found: dict[str, dict[int, Row]] = {}
    for row in rows:
        found.setdefault(row["model"], {})[row["tp"]] = row
    return found


def verdict_counts(rows: Sequence[Row], degrees: Sequence[int], verdicts: Sequence[str]) -> list[str]:
    """The head and first lines of a Markdown table: how many models have each verdict at each degree."""
    lines = ["| | " + " | ".join(f"tp {tp}" for tp in degrees) + " |", "|---|" + "---|" * len(degrees)]
    for verdict in verdicts:
        counts = [sum(r["verdict"] == verdict for r in rows if r["tp"] == tp) for tp in degrees]
        if any(counts) or verdict == "WRONG":
            lines.append(f"| {verdict} | " + " | ".join(map(str, counts)) + " |")
    return lines

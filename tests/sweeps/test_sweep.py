"""The tables of docs/models.md and docs/models-fast.md hold what the sweep says today, for a sample of the models."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.models.examine import examine
from benchmarks.models.sweep import table
from colrow.plans.derive_options import Styles
from helpers.variants import params

pytest.importorskip("transformers")

DOCS = Path(__file__).parents[2] / "docs"
PAGES: dict[Styles, str] = {"plain": "models.md", "fast": "models-fast.md"}


def columns(text: str, model_type: str) -> tuple[str, str, str, str]:
    """Verdict at tp 2, how much is split, sequence shards and the reason, of one model's line."""
    (line,) = [line for line in text.splitlines() if line.startswith(f"| {model_type} |")]
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    return cells[1], cells[-4], cells[-3], cells[-1]


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    ("model_type", "styles"),
    params([("gpt2", "fast"), ("bert", "fast"), ("roformer", "plain")], exhaustive=lambda name, _: name != "bert"),
)
def test_the_sweep_gives_what_the_table_says(model_type: str, styles: Styles) -> None:
    rows = list(examine(model_type, [2], styles=styles))
    found = columns(table(rows, "", [], styles), model_type)
    assert found == columns((DOCS / PAGES[styles]).read_text(encoding="utf-8"), model_type)

"""The table of docs/guide/training-step.md: a sample of its cells, and that it has the command's rows and columns."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks.parity.models import MODELS
from benchmarks.parity.step import Errors
from benchmarks.parity.table import BEGIN, END, MESHES, TOLERANCE, cases, run, worst_of
from helpers.harness import Ranks
from helpers.variants import collected, params

pytestmark = pytest.mark.distributed

GUIDE = Path(__file__).parents[2] / "docs/guide/training-step.md"
SAMPLE = {("dropout", "tp 2"), ("batch norm", "dp_replicate 2")}
Results = Callable[[str, str], Errors]


@pytest.fixture(scope="module")
def results(request: pytest.FixtureRequest, ranks: Ranks, tmp_path_factory: pytest.TempPathFactory) -> Results:
    """The largest errors of a cell. All cells of a number of ranks that are collected run at once."""
    done: dict[tuple[str, str], Errors] = {}
    wanted = collected(request, "model", "mesh")

    def get(model: str, mesh: str) -> Errors:
        if (model, mesh) not in done:
            world = MESHES[mesh].world_size
            part = [(a, b) for a, b in wanted if MESHES[b].world_size == world]
            found = ranks(world).run(run, part, tmp_path_factory.mktemp("saved"))
            ranks(world).stop()
            done.update({case: worst_of([rank[case] for rank in found]) for case in part})
        return done[model, mesh]

    return get


@pytest.mark.parametrize(("model", "mesh"), params(cases(), lambda *case: case not in SAMPLE))
def test_a_cell_of_the_table(results: Results, ranks: Ranks, model: str, mesh: str) -> None:
    errors = results(model, mesh)
    if not (ranks.device == "cuda" and model == "dropout" and MESHES[mesh].tp > 1):
        assert errors.worst < TOLERANCE, errors  # on GPUs ranks draw for shards from seeds of their own
    assert errors.resumed == 0


def test_the_table_has_the_commands_rows_and_columns() -> None:
    text = GUIDE.read_text(encoding="utf-8").partition(BEGIN)[2].partition(END)[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.split("\n") if line]
    assert rows[0] == ["model", *MESHES]
    assert [row[0] for row in rows[2:]] == list(MODELS)
    filled = {(row[0], mesh) for row in rows[2:] for mesh, cell in zip(MESHES, row[1:], strict=True) if cell}
    assert filled == set(cases())

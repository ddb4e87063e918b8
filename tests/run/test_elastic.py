"""Killed processes under torchrun: the run comes back, and its metrics are those of a run that nobody disturbed."""

from __future__ import annotations

from pathlib import Path

import pytest

from colrow.config import load_config
from helpers.chaos import Chaos, Record, differences, figures, write_run
from helpers.forked import Commands
from helpers.harness import Ranks
from helpers.runs import train

pytestmark = pytest.mark.distributed
STEPS = 28


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("elastic")


@pytest.fixture(scope="module")
def undisturbed(folder: Path, request: pytest.FixtureRequest) -> list[Record]:
    """Its figures, from two ranks that nobody has started again."""
    if request.config.getoption("--device") == "cuda":
        pytest.skip("kills are the same on every device, and the runs to compare are on CPUs")
    ranks: Ranks = request.getfixturevalue("ranks")
    ranks(2).run(train, load_config(write_run(folder, "undisturbed", STEPS)))
    return figures(folder / "undisturbed")


@pytest.mark.exhaustive
def test_two_agents_bring_a_killed_worker_back_without_a_gap_or_a_repeated_step(
    folder: Path, undisturbed: list[Record], commands: Commands
) -> None:
    config, python = write_run(folder, "elastic", STEPS), f"{commands.path}/python"
    chaos = Chaos(config, folder / "elastic", agents=2, seed=11, python=python)
    (kill,) = chaos.train(1)
    assert kill.moment == "step"
    assert kill.victims == "rank 1"
    assert 0 < kill.complete <= kill.metrics < STEPS
    assert "continues  after step" in chaos.text
    assert "tp=2 spans hosts of 1 ranks" in chaos.text
    assert differences(undisturbed, figures(folder / "elastic")) == []


@pytest.mark.exhaustive  # test_killed_runs.py kills a run in its saves too, at places and not at moments
def test_killed_at_random_moments_the_metrics_are_equal_bit_for_bit(
    folder: Path, undisturbed: list[Record], commands: Commands
) -> None:
    config, python = write_run(folder, "chaos", STEPS), f"{commands.path}/python"
    kills = Chaos(config, folder / "chaos", seed=5, python=python).train(3)
    assert {kill.asynchronous for kill in kills} == {False, True}
    assert all(kill.moment == "save" for kill in kills)
    assert differences(undisturbed, figures(folder / "chaos")) == []


@pytest.mark.exhaustive
def test_a_gap_a_repeated_step_and_a_changed_bit_would_be_seen(undisturbed: list[Record]) -> None:
    """The negative control of the comparison."""
    changed = {**undisturbed[5], "loss": undisturbed[5]["loss"] * (1 + 2**-52)}
    assert differences(undisturbed, undisturbed) == []
    assert differences(undisturbed, undisturbed[:5] + undisturbed[6:]) != []
    assert differences(undisturbed, undisturbed[:5] + undisturbed[4:]) != []
    (found,) = differences(undisturbed, [*undisturbed[:5], changed, *undisturbed[6:]])
    assert found.startswith("step 6: loss is")

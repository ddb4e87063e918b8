from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest

from colrow.config_sections import TrainSection
from colrow.errors import ConfigError
from colrow.train.schedule import check_schedule, decay_steps, learning_rate


def section(**more: Any) -> TrainSection:
    return TrainSection.model_validate(
        {"steps": 100, "global_batch": 1, "micro_batch": 1, "lr": 1.0, "warmup_steps": 10, **more}
    )


@pytest.mark.parametrize("schedule", ["cosine", "linear", "wsd"])
def test_every_schedule_rises_to_the_peak_and_ends_on_the_least_rate(schedule: str) -> None:
    rates = [learning_rate(step, section(schedule=schedule)) for step in range(100)]
    assert rates[:10] == pytest.approx([0.1 * (i + 1) for i in range(10)])
    assert max(rates) == rates[9] == 1.0
    assert rates[-1] == pytest.approx(0.1)
    assert all(a >= b for a, b in pairwise(rates[9:]))


def test_cosine_and_linear_are_half_way_down_in_the_middle() -> None:
    for schedule in ("cosine", "linear"):
        middle = learning_rate(10 + 45 - 1, section(schedule=schedule, min_lr_ratio=0.0))
        assert middle == pytest.approx(0.5, abs=0.02)
    early = {s: learning_rate(30, section(schedule=s, min_lr_ratio=0.0)) for s in ("cosine", "linear")}
    assert early["cosine"] > early["linear"]


def test_wsd_holds_the_peak_until_its_last_steps() -> None:
    given = section(schedule="wsd", decay_steps=20, min_lr_ratio=0.0)
    assert {learning_rate(step, given) for step in range(10, 80)} == {1.0}
    assert [learning_rate(step, given) for step in range(80, 100)] == pytest.approx([1 - i / 20 for i in range(1, 21)])
    assert decay_steps(section(schedule="wsd")) == 10


def test_without_warmup_the_first_step_has_nearly_the_peak() -> None:
    assert learning_rate(0, section(warmup_steps=0)) == pytest.approx(1.0, abs=1e-3)


@pytest.mark.parametrize(
    ("more", "fix"),
    [
        ({"warmup_steps": 100}, "set train.warmup_steps to 99 or less"),
        ({"decay_steps": 10}, "set train.decay_steps to null, or train.schedule to wsd"),
        ({"schedule": "wsd", "decay_steps": 95}, "set train.decay_steps to 90 or less"),
    ],
)
def test_what_does_not_fit_names_the_fix(more: dict[str, Any], fix: str) -> None:
    with pytest.raises(ConfigError, match=fix):
        check_schedule(section(**more))
    check_schedule(section())

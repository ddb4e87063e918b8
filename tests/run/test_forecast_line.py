"""`forecast: off | warn | stop` of a config: the line before training, and the refusal that names what fits."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest

from colrow.config import RunConfig, parse_config
from colrow.errors import ConfigError
from colrow.forecasting.choices import options_of
from colrow.forecasting.devices import Device, device_named
from colrow.forecasting.forecast import Forecaster
from colrow.models.build import build_source
from colrow.plans.plan import Plan
from colrow.run.forecast_line import forecast_lines, lines_on

PLAN = Plan.preset("llama")


@pytest.fixture
def config(tree: dict[str, Any]) -> RunConfig:
    tree["forecast"] = "stop"
    tree["train"] |= {"compile": False, "micro_batch": 2, "global_batch": 2}
    tree["data"]["seq_len"] = 256
    return parse_config(tree)


def lines(config: RunConfig, device: Device) -> list[str]:
    return lines_on(device, 8, config, build_source(config.model, 0).model, PLAN)


def test_the_line_fits_80_columns(config: RunConfig) -> None:
    (line,) = lines(config, device_named("h100-sxm"))
    assert line.startswith("forecast   ")
    assert "GiB of 79.2" in line
    assert "tokens/s per GPU" in line
    assert len(line) <= 80


@pytest.mark.exhaustive
def test_what_cannot_fit_is_refused_with_what_does(config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    for constant in ("CONTEXT", "WORKSPACES"):  # larger than this model
        monkeypatch.setattr(f"colrow.forecasting.memory.{constant}", 0)
    full = Forecaster(build_source(config.model, 0).model, device_named("h100-sxm"))
    needed = full.row(PLAN, config.mesh, options_of(config)).memory.device
    small = replace(full.device, memory=0.96 * needed)
    with pytest.raises(ConfigError, match=r"forecast: a rank needs .* GiB of .*; forecast: warn starts all") as refused:
        lines(config, small)
    size, mode = re.findall(r"train\.micro_batch (\d+) with train\.activation_checkpoint (\w+)", str(refused.value))[0]
    train = config.train.model_copy(update={"micro_batch": int(size), "activation_checkpoint": mode})
    assert lines(config.model_copy(update={"train": train}), small)[0].startswith("forecast   ")
    (warned,) = lines(config.model_copy(update={"forecast": "warn"}), replace(small, memory=1.0))
    assert warned.startswith("warning    forecast: a rank needs")
    assert "use more GPUs" in warned


def test_nothing_is_forecast_unless_asked_for_or_without_gpus(config: RunConfig) -> None:
    model = build_source(config.model, 0).model
    assert forecast_lines(config.model_copy(update={"device": "cpu"}), model, PLAN) == []
    assert forecast_lines(config.model_copy(update={"forecast": "off"}), model, PLAN) == []

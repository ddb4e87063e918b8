"""`forecast: off | warn | stop` of a config: the line before training, the refusal, and what is kept of it."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from colrow.config import RunConfig, parse_config
from colrow.errors import ConfigError
from colrow.forecasting.choices import options_of
from colrow.forecasting.devices import Device, device_named
from colrow.forecasting.forecast import Forecaster
from colrow.models.build import build_source
from colrow.plans.plan import Plan
from colrow.run import forecast_line
from colrow.run.forecast_line import FILE, forecast_on, forecast_run, gpus_here, keep_forecast

PLAN = Plan.preset("llama")


@pytest.fixture
def config(tree: dict[str, Any]) -> RunConfig:
    tree["forecast"] = "stop"
    tree["train"] |= {"compile": False, "micro_batch": 2, "global_batch": 2}
    tree["data"]["seq_len"] = 256
    return parse_config(tree)


def lines(config: RunConfig, device: Device) -> list[str]:
    return forecast_on(device, 8, config, build_source(config.model, 0).model, PLAN).lines(config)


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
    memory = full.row(PLAN, config.mesh, options_of(config)).memory
    small = replace(full.device, memory=0.96 * (memory.device - memory.reserve))
    tight = replace(full.device, memory=memory.device - memory.reserve)
    shown, warned = lines(config, tight)  # only the allocator's reserve does not fit: it is given back
    assert shown.startswith("forecast   ")
    assert "little memory is left: if it runs out, use train.micro_batch" in " ".join(warned.split())
    with pytest.raises(ConfigError, match=r"forecast: a rank needs .* GiB of .*; forecast: warn starts all") as refused:
        lines(config, small)
    size, mode = re.findall(r"train\.micro_batch (\d+) with train\.activation_checkpoint (\w+)", str(refused.value))[0]
    train = config.train.model_copy(update={"micro_batch": int(size), "activation_checkpoint": mode})
    assert lines(config.model_copy(update={"train": train}), small)[0].startswith("forecast   ")
    (warned,) = lines(config.model_copy(update={"forecast": "warn"}), replace(small, memory=1.0))
    assert warned.startswith("warning    forecast: a rank needs")
    assert "use more GPUs" in " ".join(warned.split())


def test_nothing_is_forecast_on_cpus_or_where_it_is_off(config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    gpu = SimpleNamespace(name="NVIDIA H200", total_memory=150_000_000_000)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: gpu)
    config = config.model_copy(update={"device": "auto"})
    found = gpus_here(config)
    assert isinstance(found, tuple)
    assert (found[0].name, found[0].memory, found[1]) == ("h200", 150_000_000_000.0, 4)
    assert gpus_here(config.model_copy(update={"device": "cpu"})) is None
    assert gpus_here(config.model_copy(update={"forecast": "off"})) is None
    gpu.name = "Some GPU"
    assert forecast_run(config, torch.nn.Linear(1, 1), PLAN, gpus_here(config)) == (
        None,
        ["forecast   none: no rates are known of Some GPU"],
    )
    assert forecast_run(config, torch.nn.Linear(1, 1), PLAN, None) == (None, [])


def test_a_model_that_cannot_be_forecast_starts(config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("no rule for this operator\nmore")

    monkeypatch.setattr(forecast_line, "forecast_on", fail)
    found, shown = forecast_run(config, torch.nn.Linear(1, 1), PLAN, (device_named("h200"), 8))
    assert (found, shown) == (None, ["forecast   none: no rule for this operator"])


def test_a_start_of_the_same_run_does_not_compute_it_again(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config.model_copy(update={"run": config.run.model_copy(update={"dir": tmp_path})})
    model, gpus = build_source(config.model, 0).model, (device_named("h200"), 8)
    first, shown = forecast_run(config, model, PLAN, gpus)
    keep_forecast(config, first)
    assert (tmp_path / FILE).exists()

    class Computed(Exception):
        """It was computed again."""

    def compute(*_: Any) -> None:
        raise Computed

    monkeypatch.setattr(forecast_line, "forecast_on", compute)
    assert forecast_run(config, model, PLAN, gpus) == (first, shown)
    longer = config.model_copy(update={"data": config.data.model_copy(update={"seq_len": 128})})
    other = Plan.preset("llama-fast", "linear")
    for changed in (
        (longer, model, PLAN, gpus),
        (config, model, other, gpus),
        (config, model, PLAN, (device_named("h100-sxm"), 8)),
        (config, model.requires_grad_(False), PLAN, gpus),
    ):
        assert forecast_run(*changed)[0] is None  # the negative control: anything else is computed

"""`calibrate` on two gloo ranks: a table with every rate, equal on the ranks, which the forecast reads."""

from __future__ import annotations

import json
import os
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch

from colrow.errors import ConfigError
from colrow.forecasting.calibrate import SMALL, _Clock, _peer_copy, calibrate
from colrow.forecasting.devices import device_named
from helpers.harness import Ranks

pytestmark = pytest.mark.distributed


def measure(device: str) -> dict[str, Any]:
    return calibrate(torch.device(device), SMALL)


def without_peers(device: str) -> dict[str, float]:
    cpu = torch.device(device)
    return _peer_copy(cpu, _Clock(cpu, 2), SMALL, "copy_engine")


@pytest.mark.exhaustive
def test_ranks_agree_on_a_table_that_the_forecast_reads(ranks: Ranks, tmp_path: Path) -> None:
    first, second = ranks(2).run(measure)
    assert first == second
    rates = first["rates"]
    assert all(value > 0 for key, value in rates.items() if key != "links")
    assert [size for size, _ in rates["links"]["2"]] == list(SMALL.messages)
    path = tmp_path / "table.json"
    path.write_text(json.dumps(first), encoding="utf-8")
    device = device_named("h100-sxm", path)
    assert device.rates.matmul == rates["matmul"]
    assert device.rates.peer_copy == rates["peer_copy"]
    assert ranks(2).run(without_peers)[0] == {"peer_copy": 0.0}
    assert device.rates.links[2][0][1] == rates["links"]["2"][0][1]
    assert device.source.startswith("calibrated: 2 × ")


def test_a_table_without_peer_copies_has_those_of_the_data_sheet(tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    path.write_text(json.dumps({"rates": {"matmul": 1e12}, "band": 0.1, "source": "a test"}), encoding="utf-8")
    assert device_named("b200", path).rates.peer_copy == device_named("b200").rates.peer_copy > 0
    assert device_named("l40s", path).rates.peer_copy == 0.0


def test_a_file_without_rates_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "my table.json"
    path.write_text("{}", encoding="utf-8")
    endless = tmp_path / "pipe"
    os.mkfifo(endless)
    for table in (path, endless, Path("/dev/zero")):
        with pytest.raises(
            ConfigError, match=r"holds no table of rates: write one with `(colrow calibrate .*)`"
        ) as error:
            device_named("h100-sxm", table)
        assert shlex.split(str(error.value).split("`")[1]) == ["colrow", "calibrate", "-o", str(table)]

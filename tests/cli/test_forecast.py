"""`colrow forecast`: the table of meshes, its JSON, its page, and the longest sequence."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

import colrow.cli
from colrow.forecasting.devices import device_named, name_of, seconds_of
from colrow.mesh import AXES

FIELDS = {
    "mesh",
    "plan",
    "data_engine",
    "gather",
    "exchange",
    "micro_batch",
    "activation_checkpoint",
    "fits",
    "bottleneck",
} | {*("allocated_gib", "device_gib", "parts_gib", "step_ms", "band_ms", "parts_ms", "tokens_per_second_per_gpu")}


@pytest.fixture
def config(tmp_path: Path, tree: dict[str, Any]) -> Path:
    tree["train"] |= {"compile": False}  # compiling takes seconds
    tree["data"]["corpus"] = "hf:no-such-corpus"  # it is not read
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(tree), encoding="utf-8")
    return path


def test_rows_of_every_mesh_as_json_and_as_a_page(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "page.html"
    assert (
        colrow.cli.main(["forecast", str(config), "--gpus", "2", "--gpu", "h200", "--json", "--html", str(page)]) == 0
    )
    shown = json.loads(capsys.readouterr().out)
    assert {tuple(row["mesh"][axis] for axis in AXES) for row in shown["rows"]} == {
        (1, 1, 1, 2),
        (1, 1, 2, 1),
        (1, 2, 1, 1),
        (2, 1, 1, 1),
    }
    assert all(row.keys() == FIELDS for row in shown["rows"])
    for row in shown["rows"]:
        assert sum(row["parts_ms"].values()) == pytest.approx(row["step_ms"])
        assert 0 < row["allocated_gib"] < row["device_gib"]
        assert row["plan"].endswith(" flat") == (row["data_engine"] == "flat")
    rates = [row["tokens_per_second_per_gpu"] for row in shown["rows"] if row["fits"]]
    assert shown["chosen"] == 0
    assert rates == sorted(rates, reverse=True)
    text = page.read_text(encoding="utf-8")
    assert text.count('class="bar"') == 2 * len(shown["rows"])
    assert "prefers-color-scheme: dark" in text
    assert "http" not in text
    for keys in re.findall(r'<div class="keys">(.*?)</div>', text):
        colours = re.findall(r"#[0-9a-f]{6}", keys)
        assert len(set(colours)) == len(colours) == keys.count("<span>")


def test_the_terminal_says_which_mesh_and_why_in_80_columns(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert colrow.cli.main(["forecast", str(config), "--gpus", "1", "--gpu", "b200"]) == 0
    out = capsys.readouterr().out
    assert "rates: data sheet, not calibrated; band ± 40%" in out
    assert "chosen: 1 process, plan llama" in out
    assert max(map(len, out.splitlines())) <= 80


@pytest.mark.exhaustive
def test_every_line_of_many_meshes_and_of_the_longest_fits_80_columns(
    config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for flags in ([], ["--longest"]):
        assert colrow.cli.main(["forecast", str(config), "--gpus", "8", "--gpu", "h200", *flags]) == 0
        out = capsys.readouterr().out
        assert max(map(len, out.splitlines())) <= 80
        assert out.count("\n") >= 10


def test_an_unknown_gpu_names_the_nearest(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert colrow.cli.main(["forecast", str(config), "--gpu", "h100"]) == 2
    assert "unknown GPU 'h100'" in capsys.readouterr().err
    assert colrow.cli.main(["forecast", str(config), "--gpus", "3", "--hosts", "2"]) == 2
    assert colrow.cli.main(["forecast", str(config), "--longest", "--html", str(config.with_name("page.html"))]) == 2
    assert "--html draws the table of meshes" in capsys.readouterr().err


def test_copy_engines_of_gpus_that_do_not_reach_each_other_are_left_out(
    config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tree = yaml.safe_load(config.read_text(encoding="utf-8"))
    tree["mesh"] = {"dp_shard": 2, "data_engine": "flat"}
    tree["fsdp"] = {"gather": "copy_engine", "exchange": "copy_engine"}
    config.write_text(yaml.safe_dump(tree), encoding="utf-8")
    assert colrow.cli.main(["forecast", str(config), "--gpus", "2", "--gpu", "l40s"]) == 0  # replicas gather nothing
    assert "left out: dp_shard 2: copy engines: no rate" in capsys.readouterr().out


def test_fp8_of_the_config_is_forecast(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tree = yaml.safe_load(config.read_text(encoding="utf-8"))
    tree["train"]["fp8"] = "tensorwise"
    config.write_text(yaml.safe_dump(tree), encoding="utf-8")
    assert colrow.cli.main(["forecast", str(config), "--gpus", "2", "--gpu", "h200"]) == 2
    assert "plan llama has no style with the option fp8" in capsys.readouterr().err


def test_names_of_devices_are_those_of_the_driver() -> None:
    assert name_of("NVIDIA H100 80GB HBM3") == "h100-sxm"
    assert name_of("NVIDIA H200") == "h200"
    assert name_of("AMD Instinct MI300X") is None
    assert device_named("h200").band < device_named("b200").band


def test_a_collective_between_two_measured_sizes_takes_a_time_between() -> None:
    points = ((1e3, 1e-5), (1e6, 1e-4))
    assert seconds_of(points, 10) == 1e-5
    assert 1e-5 < seconds_of(points, 1e4) < 1e-4
    assert seconds_of(points, 2e6) == pytest.approx(2e-4)

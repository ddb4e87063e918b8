"""Small files in which a run or the cache keeps what would cost time to find again: a damaged one is found again."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from colrow.config import RunConfig
from colrow.data.digests import digest_files
from colrow.data.hub import DatasetCorpus
from colrow.errors import ConfigError, DataError
from colrow.forecasting.devices import device_named
from colrow.run import forecast_line, kept_proof, kept_start
from colrow.run.forecast_line import Forecast, kept_forecast
from colrow.run.kept_proof import KeptProof
from colrow.run.kept_start import KeptStart
from colrow.train import metrics

DAMAGED = ["", "{", "null", "7", '"x"', "[]", "[[1]]", "{}", '{"step": null}', "NaN", "[" * 100_000, "\x00"]
VALUES: list[Any] = [None, True, 7, "x", [], [1], {}, {"a": 1}]


def write_damage(file: Path, keep: Callable[[], Any], keys: list[str]) -> list[str]:
    """Texts of a file that `keep` writes with one value replaced, and of other files."""
    keep()
    good = json.loads(file.read_text())
    texts = list(DAMAGED)
    for key in keys:
        for value in VALUES:
            tree = json.loads(json.dumps(good))
            *parents, last = key.split(".")
            inner = tree
            for parent in parents:
                inner = inner[parent]
            inner[last] = value
            texts.append(json.dumps(tree))
    return texts


def test_what_a_start_kept_is_used_or_found_again(tmp_path: Path) -> None:
    depends = {"model": "x"}
    check = KeptStart(tmp_path, "check", lambda: depends)
    plan = KeptStart(tmp_path, "plan", lambda: depends)
    file = tmp_path / kept_start.FILE
    for text in write_damage(file, lambda: check.keep(["line"]), ["check", "check.depends", "check.found"]):
        file.write_text(text)
        found = check.find()
        assert found is None or found == []
        assert plan.find() is None
    plan.keep("modules: {}")
    assert plan.find() == "modules: {}"
    check.keep(["line"])
    assert check.find() == ["line"]


def test_a_damaged_proof_is_none(tmp_path: Path) -> None:
    depends = dict.fromkeys(kept_proof._CHANGED, "digest")
    proof, file = KeptProof(tmp_path, lambda: depends), tmp_path / kept_proof.FILE
    report: Any = SimpleNamespace(to_data=dict)
    for text in write_damage(file, lambda: proof.keep(report), ["depends", "depends.model"]):
        file.write_text(text)
        assert not proof.find(lambda line: None)
    proof.keep(report)
    assert proof.find(lambda line: None)


def test_a_damaged_forecast_is_made_again(
    tmp_path: Path, config: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = config(**{"run.dir": str(tmp_path)})
    monkeypatch.setattr(forecast_line, "_key", lambda *_: "k")
    forecast, gpus = Forecast("k", 1.0, 0.1, 1.0, 1.0, 2.0, {"tp": 1.0}, "tp"), (device_named("h100-sxm"), 8)
    file, nothing = tmp_path / forecast_line.FILE, SimpleNamespace()
    keep: Callable[[], Any] = lambda: file.write_text(json.dumps(asdict(forecast)))  # noqa: E731
    for text in write_damage(file, keep, ["key", "parts_ms", "fix"]):
        file.write_text(text)
        found = kept_forecast(run, nothing, nothing, gpus)  # type: ignore[arg-type]
        assert found is None or found.lines(run)
    keep()
    assert kept_forecast(run, nothing, nothing, gpus) == forecast  # type: ignore[arg-type]


def test_a_damaged_line_of_metrics_costs_that_line(tmp_path: Path) -> None:
    file = tmp_path / metrics.FILE
    for text in [*DAMAGED, '{"step": "3"}', '{"step": true}']:
        file.write_text(f'{{"step": 1}}\n{text}\n{{"step": 2, "loss": 3.0}}\n{{"step": 3}}\n', encoding="utf-8")
        assert [record["step"] for record in metrics.read_metrics(file)] == [1, 2, 3]
        metrics.truncate(file, 2)
        assert [record["step"] for record in metrics.read_metrics(file)] == [1, 2]


def test_a_damaged_digest_is_not_believed(tmp_path: Path) -> None:
    data, cache = tmp_path / "data", tmp_path / "cache"
    data.write_text("text")
    digests = digest_files([data])
    stat = data.stat()
    state = [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]
    for last in ([], [None], [7], ["x"], [digests[0][:-1]]):
        cache.write_text(json.dumps({str(data): [*state, *last]}))
        assert digest_files([data], cache) == digests
    for text in DAMAGED:
        cache.write_text(text)
        assert digest_files([data], cache) == digests
    other = "0" * 32
    cache.write_text(json.dumps({str(data): [*state, other]}))
    assert digest_files([data], cache) == [other]  # a sound entry is used


def test_a_damaged_commit_of_a_dataset_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def out_of_reach(name: str) -> str:
        raise OSError("no route")

    monkeypatch.setattr("colrow.data.hub._head_commit", out_of_reach)
    cache = tmp_path / "corpus.json"
    corpus = DatasetCorpus("name", None, "train", "text", None, cache)
    for text in [*DAMAGED, '{"commit": null}', '{"commit": ["a"]}']:
        cache.write_text(text)
        with pytest.raises(DataError, match="cannot reach dataset"):
            corpus._find_commit()
    cache.write_text('{"commit": "abc"}')
    assert corpus._find_commit() == "abc"


def test_a_damaged_table_of_rates_is_one_line(tmp_path: Path) -> None:
    good = {"rates": {"matmul": 1e14}, "band": 0.1, "source": "here"}
    table = tmp_path / "rates.json"
    bad = [{**good, key: value} for key in good for value in (None, [], [1], {"matmul": None})]
    bad += [{**good, "rates": 7}, {**good, "rates": "x"}, {**good, "band": "x"}, {**good, "source": 7}]
    bad += [{**good, "rates": {"matmul": value}} for value in (None, "x", [], {})]
    bad += [{**good, "rates": {"links": value}} for value in (7, "x", [1], {"a": []}, {"2": 7}, {"2": [[1]]})]
    for text in [*DAMAGED, *map(json.dumps, bad)]:
        table.write_text(text)
        with pytest.raises(ConfigError, match="holds no table of rates: write one with `colrow calibrate") as error:
            device_named("h100-sxm", table)
        assert "\n" not in str(error.value)
    table.write_text(json.dumps(good))
    assert device_named("h100-sxm", table).rates.matmul == 1e14

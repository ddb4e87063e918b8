from __future__ import annotations

import errno
import io
import math
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from colrow.config import RunConfig
from colrow.config_sections import LogSection
from colrow.errors import ConfigError
from colrow.forecasting.devices import peak_flops
from colrow.run.finish import plot_loss
from colrow.run.loop import Loop
from colrow.run.progress import TrainingProgress, step_line
from colrow.train import metrics
from colrow.train.metrics import Metrics, perplexity, read_metrics, truncate


def record(step: int, **more: float) -> dict[str, float]:
    return {
        "step": step,
        "loss": 8.0 / step,
        "grad_norm": 1.0,
        "lr": 1e-3,
        "tokens": step * 64,
        "tokens_per_second": 1e6,
        **more,
    }


def test_a_resumed_run_neither_repeats_nor_misses_a_step(config: Callable[..., RunConfig]) -> None:
    run = config()
    run.run.dir.mkdir()
    with Metrics(run, 0) as first:
        for step in range(1, 8):
            first.write(record(step))
    with (run.run.dir / "metrics.jsonl").open("a") as file:
        file.write('{"step": 8, "lo')  # killed while writing
    with Metrics(run, 5) as second:
        second.write(record(6, val_loss=1.0))
    assert read_metrics(run.run.dir / "metrics.jsonl") == [record(s) for s in range(1, 6)] + [record(6, val_loss=1.0)]


def test_records_are_on_the_disk_before_the_checkpoint_of_their_step(
    config: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    run, done = config(), []
    run.run.dir.mkdir()
    loop = Loop.__new__(Loop)
    loop._config, loop._data, loop._device = run, SimpleNamespace(), torch.device("cpu")  # type: ignore[assignment]
    loop._training = SimpleNamespace(step=SimpleNamespace(corruption=None), modules=[], optimizer=None)  # type: ignore[assignment]
    loop._progress = SimpleNamespace(say=lambda line: None)  # type: ignore[assignment]
    loop._checkpoints = SimpleNamespace(save=lambda *args: done.append("saved"))  # type: ignore[assignment]
    with Metrics(run, 0) as loop._metrics:
        number = loop._metrics._file.fileno()
        monkeypatch.setattr(os, "fsync", lambda handle: done.append("synced" if handle == number else "other"))
        loop._save(SimpleNamespace(step=1, to_json=lambda *args: {}))  # type: ignore[arg-type]
    assert done == ["synced", "saved"]


def test_truncating_keeps_what_a_checkpoint_holds(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    truncate(path, 0)
    assert read_metrics(path) == []


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_a_missing_logger_is_an_error_that_names_the_extra(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics.importlib.util, "find_spec", lambda module: None)
    with pytest.raises(ConfigError, match=rf"pip install 'colrow\[{name}\]'"):
        metrics.require_sinks(LogSection.model_validate({name: True}))
    metrics.require_sinks(LogSection())


def test_tensorboard_gets_every_figure(config: Callable[..., RunConfig]) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = config(**{"log.tensorboard": True})
    run.run.dir.mkdir()
    with Metrics(run, 0) as written:
        written.write(record(1, val_loss=2.5))
    events = EventAccumulator(str(run.run.dir / "tensorboard"))
    events.Reload()
    assert set(events.Tags()["scalars"]) == {*record(1), "val_loss"} - {"step"}
    assert [(e.step, e.value) for e in events.Scalars("val_loss")] == [(1, 2.5)]


def test_an_id_of_wandb_is_on_the_disk_or_not_there(
    config: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk that is full leaves no empty file, which every later start would take for the run's id."""
    ids: list[str] = []

    class Started:
        def finish(self) -> None:
            pass

    fake = SimpleNamespace(
        util=SimpleNamespace(generate_id=lambda: "abc"), init=lambda **given: ids.append(given["id"]) or Started()
    )
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.setattr(metrics, "require_sinks", lambda section: None)
    run = config(**{"log.wandb": True})
    run.run.dir.mkdir()

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        with pytest.raises(OSError, match=r"No space left on device: .*wandb\.id"):
            metrics._Wandb(run)
    assert not (run.run.dir / "wandb.id").exists()
    for _ in range(2):
        metrics._Wandb(run).close()
    assert ids == ["abc", "abc"]


def test_perplexity_and_the_table_of_gpus() -> None:
    assert perplexity(2.0) == math.exp(2.0)
    assert perplexity(1e4) == math.inf
    assert peak_flops("NVIDIA H100 80GB HBM3") == 989e12
    assert peak_flops("NVIDIA GeForce RTX 4090") is None


def test_the_loss_curve_is_drawn_or_says_what_is_missing(
    config: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib")
    run = config()
    run.run.dir.mkdir()
    with Metrics(run, 0) as written:
        for step in range(1, 4):
            written.write(record(step, **({"val_loss": 3.0} if step == 3 else {})))
    assert "loss.png" in plot_loss(run.run.dir)
    assert (run.run.dir / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert "</svg>" in (run.run.dir / "loss.svg").read_text()
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert "colrow[plot]" in plot_loss(run.run.dir)


def test_lines_fit_a_terminal_of_80_columns() -> None:
    long = record(99_999, val_loss=10.1234, perplexity=22026.5, mfu_causal=0.4321) | {
        "loss": 10.1234,
        "grad_norm": 123.4,
    }
    assert all(len(line) < 80 for line in step_line(long, 99_999).splitlines())


def test_without_a_terminal_there_is_a_line_now_and_then() -> None:
    text = io.StringIO()
    with TrainingProgress(True, 20, 5, text) as progress:
        progress.start(0)
        for step in range(1, 21):
            progress.step(record(step, **({"val_loss": 1.0, "perplexity": 2.7} if step == 7 else {})))
    assert [int(line.split()[1].split("/")[0]) for line in text.getvalue().splitlines() if line.startswith("step")] == [
        1,
        5,
        7,
        10,
        15,
        20,
    ]
    silent = io.StringIO()
    TrainingProgress(False, 20, 5, silent).step(record(5))
    assert silent.getvalue() == ""

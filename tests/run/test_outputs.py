"""The space that a run's outputs need is known before its first step, and a full disk later says what to free."""

from __future__ import annotations

import errno
import io
import math
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from matplotlib.figure import Figure

from colrow.checkpoint import weight_files
from colrow.checkpoint.distributed import Checkpoints
from colrow.checkpoint.export import export
from colrow.checkpoint.folder import format_bytes
from colrow.checkpoint.space import RunSpace, checkpoint_bytes, export_bytes, free_in, naming_a_full_disk
from colrow.cli import main
from colrow.config import RunConfig, dump_config
from colrow.config_sections import ModelSection
from colrow.data.tokenizer import Tokenizer
from colrow.errors import CheckpointError
from colrow.models.build import build_source
from colrow.models.llama import Llama
from colrow.plans.plan import Plan
from colrow.run import startup
from colrow.run.finish import plot_loss
from colrow.run.nonfinite import NonfiniteSteps
from colrow.run.outputs import output_lines, space_of, will_export
from colrow.run.run_folder import write_folder, write_plan
from colrow.train.metrics import Metrics, read_metrics
from helpers.llamas import seeded
from helpers.runs import a_run, write_text


def trained(frozen: bool = False) -> tuple[Llama, torch.optim.Optimizer]:
    """A model of 0.4 MB with its optimizer's state."""
    model = seeded(vocab_size=512, hidden_size=96)
    for param in model.layers.parameters() if frozen else ():
        param.requires_grad_(False)
    optimizer = torch.optim.AdamW(param for param in model.parameters() if param.requires_grad)
    model(torch.zeros(1, 4, dtype=torch.long)).sum().backward()
    optimizer.step()
    return model, optimizer


def size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


@pytest.mark.parametrize("frozen", [False, True], ids=["all", "some frozen"])
def test_what_is_asked_for_is_what_is_written(tmp_path: Path, frozen: bool) -> None:
    model, optimizer = trained(frozen)
    Checkpoints(tmp_path / "checkpoints").save(1, model, optimizer, {})
    tensors = sum(p.nbytes * (3 if p.requires_grad else 1) for p in model.parameters())
    assert tensors < size(tmp_path / "checkpoints") <= checkpoint_bytes(model) < tensors + 200_000
    for dtype in (torch.float32, torch.bfloat16):
        export(model, tmp_path / "out", model.config, dtype=dtype)
        assert size(tmp_path / "out") <= export_bytes(model, dtype) < size(tmp_path / "out") + (1 << 20)


@pytest.mark.parametrize(
    ("section", "count"),
    [
        ({"every": 1}, 3),
        ({"every": 1, "keep": 9}, 6),
        ({"every": 2, "keep": 4}, 3),
        ({"every": 0}, 1),
        ({"every": 0, "last": False}, 1),
    ],
)
def test_the_checkpoints_that_are_kept_and_the_one_being_saved(
    tmp_path: Path, section: dict[str, int], count: int
) -> None:
    config = a_run(tmp_path, "run", checkpoint=section)
    assert space_of(config, build_source(config.model, 0), False, []).checkpoints == count


def disk_of(free: int) -> Callable[[object], SimpleNamespace]:
    return lambda path: SimpleNamespace(free=free)


def test_a_small_disk_is_refused_before_anything_is_prepared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_text(tmp_path)
    config = a_run(tmp_path, "run", checkpoint={"every": 2})
    source = build_source(config.model, 0)
    space = space_of(config, source, True, [])
    assert space.needed == 3 * space.checkpoint + space.export
    assert space.checkpoint > 12 * sum(param.numel() for param in source.model.parameters())
    (tmp_path / "run.yaml").write_text(dump_config(config))
    monkeypatch.setattr(shutil, "disk_usage", disk_of(space.needed - 1))
    assert main(["train", str(tmp_path / "run.yaml")]) == 2
    error = capsys.readouterr().err
    assert f"is too small for this run: {space} need {format_bytes(space.needed)}" in error
    assert str(space).startswith("3 checkpoints of 14.3 MiB and an export of 5.")
    assert "set checkpoint.keep to 1, or checkpoint.export to false, or run.dir to another disk" in error
    assert len(error.splitlines()) == 1
    assert not (tmp_path / "cache").exists()
    monkeypatch.setattr(shutil, "disk_usage", disk_of(space.needed))
    (line,) = output_lines(config, source, [])
    assert " ".join(line.split()) == f"disk {space}: {format_bytes(space.needed)} of {format_bytes(space.needed)} free"


@pytest.mark.parametrize(
    ("free", "fixes"),
    [
        (25, "set checkpoint.keep to 1, or run.dir"),
        (31, "set checkpoint.keep to 1, or checkpoint.export to false, or run.dir"),
        (21, "set checkpoint.keep to 1 and checkpoint.export to false, or run.dir"),
        (15, "set run.dir to another disk"),
    ],
)
def test_what_is_advised_on_a_small_disk_fits_it(
    free: int, fixes: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    space = RunSpace(checkpoint=10, checkpoints=3, present=0, export=4)
    monkeypatch.setattr(shutil, "disk_usage", disk_of(free))
    with pytest.raises(CheckpointError, match=re.escape(fixes)):
        space.require_free(tmp_path)
    for keep, both in re.findall(r"checkpoint.keep to (\d)( and|)", fixes):
        replace(space, checkpoints=int(keep) + 1, export=0 if both else 4).require_free(tmp_path)


def test_checkpoints_that_are_there_need_no_more_space(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = a_run(tmp_path, "run", checkpoint={"every": 2})
    source = build_source(config.model, 0)
    one = space_of(config, source, False, []).checkpoint
    saved = Checkpoints(config.run.dir / "checkpoints")
    for step in (2, 4):
        saved.save(step, *trained(), {})
    space = space_of(config, source, False, saved.list())
    assert space.needed == one
    assert "3 checkpoints of 14.3 MiB (2 there)" in str(space)
    monkeypatch.setattr(shutil, "disk_usage", disk_of(one - 1))
    with pytest.raises(CheckpointError, match="too small for this run"):
        space.require_free(config.run.dir)


def test_the_free_space_is_that_of_the_disk_that_will_be_used(tmp_path: Path) -> None:
    assert abs(free_in(tmp_path / "not" / "there" / "yet") - shutil.disk_usage(tmp_path).free) < 1 << 30


def test_a_disk_that_fills_later_names_what_is_kept_and_what_could_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    state = trained()
    for step in (2, 4):
        checkpoints.save(step, *state, {})

    def full(*args: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(CheckpointError) as caught:
            checkpoints.save(6, *state, {})
    text = str(caught.value)
    assert "(No space left on device); step-4 is complete and kept: free some space, such as the older step-2 (" in text
    assert text.endswith("then start the same command again: the run continues from its newest checkpoint")
    monkeypatch.setattr(weight_files, "write_tensors", full)
    with pytest.raises(CheckpointError) as caught:
        export(state[0], tmp_path / "export", state[0].config)
    assert "too full for an export" in str(caught.value)
    assert str(caught.value).endswith("then write the export with `colrow export RUN -o DIR`, here or on another disk")
    monkeypatch.setattr(shutil, "disk_usage", disk_of(1000))
    with pytest.raises(CheckpointError, match="too full for an export"):
        export(state[0], tmp_path / "export", state[0].config)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoints"]
    assert [info.state for info in checkpoints.list(checksums=True)] == ["complete"] * 2


class Full:
    """An open file on a full disk; as the operating system's, its error names no file. A buffer fails twice."""

    def __init__(self, file: Any) -> None:
        self._file = file

    def __enter__(self) -> Full:
        return self

    def __exit__(self, *args: object) -> None:
        self._file.close()
        if not isinstance(self._file, io.RawIOBase):
            self.write("")

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def write(self, data: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def fill_the_disk(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    """For these files alone, if they are named."""
    opened = Path.open

    def open_full(path: Path, mode: str = "r", *args: Any, **options: Any) -> Any:
        file = opened(path, mode, *args, **options)
        return Full(file) if set(mode) & set("wxa") and (not names or path.name in names) else file

    monkeypatch.setattr(Path, "open", open_full)
    monkeypatch.setattr(Figure, "savefig", lambda *args, **options: Full(None).write(""))


def write_record(config: RunConfig) -> None:
    step = len(read_metrics(config.run.dir / "metrics.jsonl"))
    with Metrics(config, step) as metrics:
        metrics.write({"step": step + 1, "loss": 1.0})


WRITERS: dict[str, Callable[[RunConfig], object]] = {
    "config.yaml": lambda config: write_folder(config, Plan.preset("llama"), cast(Tokenizer, None)),
    ".lock": lambda config: write_plan(config.run.dir, Plan.preset("llama")),
    "metrics.jsonl": write_record,
    "nonfinite.jsonl": lambda config: NonfiniteSteps(config, Checkpoints(config.run.dir), 0, True, print).examine(
        {"step": 5, "loss": math.nan, "grad_norm": 1.0, "lr": 1.0, "tokens": 1}, 0
    ),
    "loss.png": lambda config: plot_loss(config.run.dir),
    "startup.json": lambda config: (startup.begin(), startup.finish(config.run.dir)),
}


@pytest.mark.parametrize("name", WRITERS)
def test_a_disk_that_is_full_for_any_file_of_a_run_names_it_and_what_could_go(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And what the file held is there."""
    config = a_run(tmp_path, "run", train={"on_nonfinite": "skip"})
    checkpoints = Checkpoints(config.run.dir / "checkpoints")
    for step in (2, 4):
        checkpoints.save(step, *trained(), {})
    write_record(config)
    file = config.run.dir / name
    file.touch()
    before = file.read_bytes()
    with monkeypatch.context() as patch:
        fill_the_disk(patch, *[name] * (name == "metrics.jsonl"))  # not its copy of the records that count
        with pytest.raises(CheckpointError) as caught, naming_a_full_disk(config.run.dir):
            WRITERS[name](config)
    text = str(caught.value)
    assert text.startswith(f"{file}: No space left on device; step-4 is complete and kept: free some space, such as")
    assert text.endswith("then start the same command again: the run continues from its newest checkpoint")
    assert file.read_bytes() == before


def test_what_a_command_has_written_before_stays_where_the_disk_is_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, link = tmp_path / "plan.yaml", tmp_path / "link.yaml"
    link.symlink_to(file)
    Plan.preset("llama").save(link)
    before = file.read_text()
    with monkeypatch.context() as patch:
        fill_the_disk(patch)
        with pytest.raises(OSError, match=re.escape(f"No space left on device: '{file}'")):
            Plan.preset("article").save(link)
    assert (link.is_symlink(), file.read_text(), len(list(tmp_path.iterdir()))) == (True, before, 2)
    Plan.preset("article").save(link)
    assert (link.is_symlink(), file.read_text() == before) == (True, False)


SIZES = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


@pytest.mark.parametrize(("family", "options"), [("Qwen3", {"head_dim": 8}), ("Mixtral", {"num_local_experts": 4})])
def test_the_export_of_a_model_without_memory_is_compared_before_the_run(
    tmp_path: Path, family: str, options: dict[str, int]
) -> None:
    """As a run compares it: the launcher and the ranks hold transformers' models on the meta device."""
    transformers = pytest.importorskip("transformers")
    model = getattr(transformers, f"{family}ForCausalLM")(getattr(transformers, f"{family}Config")(**SIZES, **options))
    model.save_pretrained(tmp_path / "folder")
    section = ModelSection(huggingface=str(tmp_path / "folder"), implementation="transformers")
    config = a_run(tmp_path, "run").model_copy(update={"model": section})
    source = build_source(section, seed=0)
    assert all(param.is_meta for param in source.model.parameters())
    assert will_export(config, source)
    (line,) = output_lines(config, source, [])
    assert "an export of" in " ".join(line.split())
    del source.model.model.layers[-1]
    assert not will_export(config, source)
    warning, _ = output_lines(config, source, [])
    assert "there will be no export" in " ".join(warning.split())

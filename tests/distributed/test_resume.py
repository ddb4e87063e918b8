"""What a run does with a config, or a version, other than the one that left its checkpoint."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from colrow.checkpoint.distributed import Checkpoints
from colrow.checkpoint.manifest import JSON
from colrow.config import RunConfig, dump_config, load_config
from colrow.config_sections import TrainSection
from colrow.data.loader import BatchOrder
from colrow.data.prepare import prepare
from colrow.errors import ConfigError
from colrow.run.resume import ResumePoint, _sequences_of_older, resume
from colrow.sharding.grad_norm import align_gradients
from colrow.sharding.layout import full_tensor
from colrow.train.schedule import learning_rate
from colrow.train.setup import set_up
from helpers.harness import Ranks
from helpers.runs import a_run, figures, model_and_plan, train, write_text

pytestmark = pytest.mark.distributed

SEQ_LEN = 32
Tensors = dict[str, Tensor]


def short(folder: Path, name: str, **train: Any) -> RunConfig:
    """Three steps of 4 sequences, in one process; in fp32, so that a parameter's gradient is its own on GPUs too."""
    section = {"steps": 3, "warmup_steps": 0, "precision": "fp32"} | train
    return a_run(folder, name, mesh={"tp": 1}, train=section, checkpoint={"export": False})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("resume")
    write_text(folder)
    return folder


@contextmanager
def reads_listed() -> Iterator[list[int]]:
    """Within, the windows of every global batch, in the order in which batches are prepared."""
    read: list[int] = []
    plain = BatchOrder.indices

    def listed(self: BatchOrder, position: int) -> np.ndarray:
        windows = plain(self, position)
        read.extend(windows.tolist())
        return windows

    BatchOrder.indices = listed  # type: ignore[method-assign]
    try:
        yield read
    finally:
        BatchOrder.indices = plain  # type: ignore[method-assign]


def windows_of(device: str, config: RunConfig) -> list[int]:
    with reads_listed() as read:
        train(device, config)
    return read


def without_position(self: ResumePoint, config: RunConfig, data: Any) -> dict[str, JSON]:
    """What checkpoints held before they stored a position."""
    return {"step": self.step, "corpus": data.fingerprint, "seed": config.run.seed}


def other_batch(device: str, folder: Path) -> list[list[int]]:
    """The windows of 7 steps of 4; of 3 steps of 4 and then 2 steps of 8; the same where no position is stored."""
    read = [windows_of(device, short(folder, "unbroken", steps=7))[: 7 * 4]]  # one batch more is read ahead
    stored = ResumePoint.to_json
    for name, to_json in (("newer", stored), ("older", without_position)):
        ResumePoint.to_json = to_json  # type: ignore[method-assign]
        first = windows_of(device, short(folder, name))[: 3 * 4]
        read.append(first + windows_of(device, short(folder, name, steps=5, global_batch=8))[: 2 * 8])
    ResumePoint.to_json = stored  # type: ignore[method-assign]
    return read


def test_another_global_batch_reads_on_without_gap_or_repeat(ranks: Ranks, folder: Path) -> None:
    ((unbroken, newer, older),) = ranks(1).run(other_batch, folder)
    assert len(unbroken) == 28
    assert newer == unbroken
    assert older == unbroken
    for name in ("newer", "older"):
        tokens = [record["tokens"] for record in figures(folder / name / "metrics.jsonl")]
        assert tokens == [sequences * SEQ_LEN for sequences in (4, 8, 12, 20, 28)]


def test_the_position_of_a_checkpoint_without_one_survives_a_start_that_saved_nothing(tmp_path: Path) -> None:
    """Such a start has left its own config in the folder: the record of the step still knows."""
    before, after = short(tmp_path, "run"), short(tmp_path, "run", global_batch=16)
    before.run.dir.mkdir()
    assert _sequences_of_older(3, before) == 12
    (before.run.dir / "config.yaml").write_text(dump_config(before))
    assert _sequences_of_older(3, after) == 12
    (before.run.dir / "config.yaml").write_text(dump_config(after))
    assert _sequences_of_older(3, after) == 48  # nothing else is known
    (before.run.dir / "metrics.jsonl").write_text('{"step": 2, "tokens": 256}\n{"step": 3, "tokens": 384}\n')
    assert _sequences_of_older(3, after) == 12


CHANGES: list[dict[str, Any]] = [
    {"weight_decay": 5.0},
    {"weight_decay": 5.0, "no_decay": ("embed_tokens",)},
    {"betas": (0.5, 0.6)},
    {"eps": 1e-4},
    {"grad_clip": 1e-3},
    {"grad_clip": None},
    {"lr": 1e-2},
    {"schedule": "linear"},
    {"steps": 9},
]


@torch.no_grad()
def adamw(weights: Tensors, state: dict[str, Tensors], grads: Tensors, section: TrainSection) -> Tensors:
    """Step 4 by the formula of Loshchilov & Hutter (2019), in fp64, with the options of `section`."""
    norm = torch.cat([grad.flatten() for grad in grads.values()]).norm()
    scale = 1.0 if section.grad_clip is None else (section.grad_clip / norm).clamp(max=1.0)
    (b1, b2), lr, updated = section.betas, learning_rate(3, section), {}
    for name, weight in weights.items():
        mean = b1 * state["exp_avg"][name] + (1 - b1) * scale * grads[name]
        square = b2 * state["exp_avg_sq"][name] + (1 - b2) * (scale * grads[name]) ** 2
        decays = weight.ndim >= 2 and not name.startswith(section.no_decay)
        decay = section.weight_decay if decays else 0.0
        moved = mean / (1 - b1**4) / ((square / (1 - b2**4)).sqrt() + section.eps)
        updated[name] = weight - lr * (decay * weight + moved)
    return updated


def resumed_steps(device: str, folder: Path) -> list[tuple[float, float]]:
    """For each change: how far the step after the resume is from the formula, with the new options and the old."""
    old = short(folder, "options", steps=6)
    mesh, data = old.mesh.build(device, 1), prepare(old.data, 4096, progress=False)
    ids = torch.randint(0, 300, (4, SEQ_LEN + 1), generator=torch.Generator().manual_seed(5)).to(device)
    batches = [(ids[:, :-1], ids[:, 1:])]
    train(device, short(folder, "options"))
    found = []
    for change in CHANGES:
        config = short(folder, "options", **{"steps": 6} | change)
        training = set_up(config, mesh, torch.device(device), *model_and_plan(config))
        checkpoints = Checkpoints(config.run.dir / "checkpoints")
        assert resume(config, training, data, checkpoints) == ResumePoint(3, 12)
        named = dict(training.modules[0].named_parameters())
        weights = {name: full_tensor(param.detach()).double() for name, param in named.items()}
        state = {
            key: {name: full_tensor(training.optimizer.state[param][key]).double() for name, param in named.items()}
            for key in ("exp_avg", "exp_avg_sq")
        }
        training.step.forward_backward(batches)
        align_gradients(named.values())
        grads = {name: full_tensor(param.grad).double() for name, param in named.items() if param.grad is not None}
        training.optimizer.zero_grad()
        training.step(3, batches)
        before = flat(weights)
        moved = flat({name: full_tensor(param.detach()).double() for name, param in named.items()}) - before
        expected = [flat(adamw(weights, state, grads, section)) - before for section in (config.train, old.train)]
        new, previous = (((moved - other).norm() / moved.norm()).item() for other in expected)
        found.append((new, previous))
    return found


def other_order(device: str, folder: Path) -> list[str]:
    """What a start says that has another seed, or sequence length, than a checkpoint beside which no config is left."""
    old = short(folder, "order", steps=1)
    train(device, old)
    mesh, data = old.mesh.build(device, 1), prepare(old.data, 4096, progress=False)
    says = []
    for section, changes in (("run", {"seed": 1}), ("data", {"seq_len": 16}), ("train", {"steps": 2})):
        changed = getattr(old, section).model_copy(update=changes)
        config = old.model_copy(update={section: changed})
        training = set_up(config, mesh, torch.device(device), *model_and_plan(config))
        try:
            says.append(repr(resume(config, training, data, Checkpoints(config.run.dir / "checkpoints"))))
        except ConfigError as error:
            says.append(str(error))
    return says


def test_another_order_of_the_text_is_refused_without_the_folders_config(ranks: Ranks, folder: Path) -> None:
    ((seed, seq_len, same),) = ranks(1).run(other_order, folder)
    assert seed.startswith("run.seed is not that of the checkpoints in")
    assert seq_len.startswith("data.seq_len is not that of the checkpoints in")
    assert same == "ResumePoint(step=1, sequences=4, skipped=0)"


def flat(tensors: Tensors) -> Tensor:
    return torch.cat([tensor.flatten() for tensor in tensors.values()])


def test_new_options_of_the_optimizer_are_used(ranks: Ranks, folder: Path) -> None:
    """Against the formula, to the rounding of fp32; with the options of the checkpoint the same comparison fails."""
    (found,) = ranks(1).run(resumed_steps, folder)
    for change, (new, old) in zip(CHANGES, found, strict=True):
        assert new < 1e-4, (change, new)
        assert old > 1e-3, (change, old)


STORED = Path(__file__).parents[1] / "checkpoint" / "old_run"


def continue_old_run(device: str, folder: Path) -> str:
    """The run that version 1b285e2 left after 4 steps of 4, two steps of 8 further."""
    shutil.copytree(STORED, folder)
    sys.path.insert(0, str(folder))
    os.chdir(folder)
    keys = {"mesh.tp": 1, "train.steps": 6, "train.global_batch": 8, "check": False, "checkpoint.export": False}
    _, _, text = train(device, load_config(folder / "run" / "config.yaml", keys))
    return text


def test_a_run_of_version_1b285e2_goes_on_where_it_stood(ranks: Ranks, tmp_path: Path) -> None:
    (text,) = ranks(1).run(continue_old_run, tmp_path / "old")
    assert "continues  after step 4: 16 sequences, 512 tokens, 0.15 epochs" in text
    tokens = [record["tokens"] for record in figures(tmp_path / "old" / "run" / "metrics.jsonl")]
    assert tokens == [128, 256, 384, 512, 768, 1024]

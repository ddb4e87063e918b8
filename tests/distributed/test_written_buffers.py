"""Buffers that forward writes: the same on every data rank after each step, and never saved as one rank's value."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from benchmarks.parity.models import MODELS, D, Mlp, Model, SmallModel
from benchmarks.parity.step import Errors, on_ranks
from colrow.checkpoint.distributed import Checkpoints
from colrow.errors import CheckpointError, ConfigError
from colrow.mesh import Mesh
from colrow.train import setup
from colrow.train.step import Step
from helpers.harness import Ranks

pytestmark = pytest.mark.distributed


class Counter(nn.Module):
    def __init__(self, **values: Any) -> None:
        super().__init__()
        for name, value in values.items():
            self.register_buffer(name, value)


class AveragingMlp(Mlp):
    """Keeps a moving average as a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.average = nn.Parameter(torch.zeros(D), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.average.mul_(0.5).add_(x.mean((0, 1)))
        out: Tensor = super().forward(x) + self.average
        return out


def written_parameter(device: str) -> tuple[str, float]:
    """What a step says of it, and how far the first loss after it is from one process where nothing looks."""
    models = {"averaging": SmallModel(lambda: Model(AveragingMlp))}
    with mock.patch.dict(MODELS, models):
        with pytest.raises(ConfigError) as error:
            on_ranks(device, "averaging", Mesh(dp_shard=2), steps=1)
        with mock.patch.object(setup, "refuse_forward_writes"):
            lost = on_ranks(device, "averaging", Mesh(dp_shard=2), steps=2).loss
    return str(error.value), lost


def test_a_parameter_that_forward_writes_is_refused_on_data_ranks(ranks: Ranks) -> None:
    for message, lost in ranks(2).run(written_parameter):
        assert "forward writes the parameter layers.0.mlp.average, which is lost" in message
        assert lost > 1e-4  # the control


def run(device: str, folder: Path) -> tuple[dict[str, Errors], str]:
    mesh = Mesh(dp_shard=2)
    found = {
        "experts": on_ranks(device, "running experts", mesh, folder / "experts"),
        "batch norm": on_ranks(device, "batch norm", mesh, steps=2),
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Step, "buffers", property(lambda _: None, lambda *_: None), raising=False)
        found["not combined"] = on_ranks(device, "batch norm", mesh, steps=1)
    rank = dist.get_rank()
    equal = {"equal": torch.tensor([1, 2]), "none": torch.zeros(0)}
    Checkpoints(folder / "equal").save(1, Counter(**equal).to(device), None, {})
    with pytest.raises(CheckpointError) as error:
        Checkpoints(folder / "other").save(1, Counter(**equal, seen=torch.tensor(rank)).to(device), None, {})
    return found, str(error.value)


def test_data_ranks_agree_on_buffers(ranks: Ranks, tmp_path: Path) -> None:
    for errors, message in ranks(2).run(run, tmp_path):
        assert errors["experts"].worst < 1e-10, errors
        assert errors["experts"].resumed == 0
        assert errors["batch norm"].worst < 1e-10, errors
        assert errors["not combined"].buffers > 0.01
        assert "buffer seen holds other values on rank 1 than on rank 0" in message
    assert not list((tmp_path / "other").glob("step-*"))

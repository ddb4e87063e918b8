"""Evaluation: which windows count, and what it leaves as it was."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from colrow.torch_compat import fake_store
from colrow.train.evaluate import IGNORED, Evaluation, evaluation_mode
from helpers.runs import a_run

CPU = torch.device("cpu")


class Windows:
    """`n` validation windows; window i holds the number 100 + i everywhere."""

    path = "validation"

    def __init__(self, n: int) -> None:
        self.n = n

    def windows(self, seq_len: int) -> int:
        return self.n

    def read(self, indices: Any, seq_len: int) -> Any:
        return np.repeat(100 + indices[:, None], seq_len + 1, axis=1)


class Runner:
    """The loss of a token is its number."""

    def __init__(self) -> None:
        self.seen: list[int] = []
        self.micro_batches: list[int] = []

    def evaluate(self, batches: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
        targets = torch.cat([targets for _, targets in batches])
        counted = targets != IGNORED
        self.seen += targets[:, 0][counted[:, 0]].tolist()
        self.micro_batches.append(len(batches))
        return torch.where(counted, targets, 0).sum() / targets.numel()


@pytest.fixture
def group() -> Iterator[None]:
    dist.init_process_group("fake", store=fake_store(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("dp", [1, 2])
@pytest.mark.parametrize("n", [1, 3, 4, 5, 7, 12, 40])
def test_each_window_counts_once_with_its_tokens(group: None, tmp_path: Path, n: int, dp: int) -> None:
    config = a_run(tmp_path, "run", mesh={"dp_shard": dp}, eval={"every": 1, "batches": 3}, train={"global_batch": 4})
    data: Any = SimpleNamespace(validation=Windows(n))
    runners: list[Any] = [Runner() for _ in range(dp)]
    total = 0.0
    for rank, runner in enumerate(runners):
        evaluation = Evaluation(config, data, rank, 1 / dp, CPU)
        total += evaluation(runner, [])
        evaluation.close()
    seen = [window for runner in runners for window in runner.seen]
    assert len(seen) == len(set(seen)) == min(n, 12)
    assert total == pytest.approx(sum(seen) / len(seen), rel=1e-12)
    assert all(runner.micro_batches == runners[0].micro_batches for runner in runners)


def test_full_batches_give_the_plain_mean_of_their_losses(group: None, tmp_path: Path) -> None:
    config = a_run(tmp_path, "run", eval={"every": 1, "batches": 3})
    losses = [torch.tensor(loss) for loss in (1 / 3, 2 / 7, 5 / 11)]
    left = iter(losses)
    runner: Any = SimpleNamespace(evaluate=lambda batches: next(left))
    data: Any = SimpleNamespace(validation=Windows(20))
    evaluation = Evaluation(config, data, 0, 1.0, CPU)
    assert evaluation(runner, []) == torch.stack(losses).double().mean().item()
    evaluation.close()


class Writing(nn.Module):
    """Writes its buffers and draws random numbers whatever its mode, and knows in which one it ran."""

    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.frozen = nn.BatchNorm1d(4), nn.Dropout(0.5)
        self.register_buffer("count", torch.zeros(3))
        self.register_buffer("cache", None)
        self.generator, self.random = torch.Generator(), random.Random(1)
        self.modes: list[tuple[bool, bool]] = []

    def forward(self, x: Tensor) -> Tensor:
        self.modes.append((self.training, self.norm.training))
        self.count += 1
        self.cache = x
        x = x + torch.rand(4, generator=self.generator) + torch.rand(4) + self.random.random() + random.random()
        return self.norm(x + np.random.random())


def state_of(model: Writing) -> list[Any]:
    return [
        [part.training for part in model.modules()],
        {name: buffer.tolist() for name, buffer in model.named_buffers()},
        torch.get_rng_state().tolist(),
        random.getstate(),
        [part.tolist() if isinstance(part, np.ndarray) else part for part in np.random.get_state()],
        model.generator.get_state().tolist(),
        model.random.getstate(),
    ]


def test_evaluation_leaves_the_state_of_training_as_it_was() -> None:
    model = Writing().train()
    model.frozen.eval()  # in training too, on purpose
    before, buffer = state_of(model), model.count
    with evaluation_mode([model], CPU) as generators:
        generators.seed(3)
        first = model(torch.ones(2, 4))
        assert state_of(model)[1:] != before[1:]
        generators.seed(3)
        assert torch.equal(model(torch.ones(2, 4)), first)
    assert model.modes == [(False, False)] * 2
    assert state_of(model) == before
    assert model.count is buffer


def test_the_negative_control_without_it_all_of_the_state_changes() -> None:
    model = Writing().train()
    before = state_of(model)
    model.eval()(torch.ones(2, 4))
    assert all(here != there for here, there in zip(state_of(model), before, strict=True))

"""The examples of `examples/library` run on two ranks, and follow the loss of the same loop on one device."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from helpers.harness import Ranks

pytestmark = pytest.mark.distributed
EXAMPLES = Path(__file__).parents[1] / "examples" / "library"
STEPS = 4


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def plain(device: str) -> list[float]:
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh

    mesh = init_device_mesh(device, (dist.get_world_size(),), mesh_dim_names=("tp",))
    return list(load("plain_loop").train(mesh, STEPS))


def fabric(device: str) -> list[float]:
    """Under Fabric's strategy as its launcher leaves it: with a process group and a mesh."""
    from lightning_fabric import Fabric
    from lightning_fabric.plugins.environments import TorchElasticEnvironment
    from lightning_fabric.strategies import ModelParallelStrategy

    example = load("fabric_loop")
    strategy = ModelParallelStrategy(example.split, data_parallel_size=1, tensor_parallel_size=2)
    runner = Fabric(accelerator=device, devices=2, strategy=strategy, plugins=[TorchElasticEnvironment()])
    runner.launch()
    return list(example.train(runner, STEPS))


def accelerate(device: str) -> list[float]:
    return list(load("accelerate_loop").train(2, STEPS))


def trainer(device: str, folder: Path) -> list[float]:
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh

    mesh = init_device_mesh(device, (dist.get_world_size(),), mesh_dim_names=("tp",))
    return list(load("trainer").train(mesh, str(folder), STEPS))


def alone(
    model: nn.Module,
    batches: Callable[[int], tuple[Tensor, Tensor]],
    lr: float,
    clip: float | None,
    decay: float = 0.01,
) -> list[float]:
    """The same loop on one device."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=decay)
    losses = []
    for step in range(STEPS):
        ids, targets = batches(step)
        out: Any = model(ids)
        loss = F.cross_entropy(getattr(out, "logits", out).flatten(0, 1), targets.flatten())
        loss.backward()
        if clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def test_a_plain_loop(ranks: Ranks) -> None:
    example = load("plain_loop")
    torch.manual_seed(0)
    want = alone(example.Gpt(), example.batch, 3e-3, 1.0)
    for losses in ranks(2).run(plain):
        assert losses == pytest.approx(want, rel=1e-4)
    torch.manual_seed(1)  # the negative control: other weights, other losses
    assert alone(example.Gpt(), example.batch, 3e-3, 1.0) != pytest.approx(want, rel=1e-4)


def test_lightning_fabric(ranks: Ranks) -> None:
    pytest.importorskip("lightning_fabric", reason="Lightning Fabric is no dependency: pip install lightning-fabric")
    example = load("fabric_loop")
    torch.manual_seed(0)
    want = alone(example.Mlp(), lambda step: example.batch(step, 0), 3e-3, None)
    for losses in ranks(2).run(fabric):
        assert losses == pytest.approx(want, rel=1e-4)


@pytest.mark.exhaustive
def test_accelerate(ranks: Ranks) -> None:
    pytest.importorskip("accelerate", reason="accelerate is no dependency: pip install accelerate")
    pytest.importorskip("transformers")
    example = load("accelerate_loop")

    def batches(step: int) -> tuple[Tensor, Tensor]:
        rows = torch.stack([example.Rows()[i] for i in range(example.BATCH * step, example.BATCH * (step + 1))])
        return rows[:, :-1], rows[:, 1:]

    want = alone(example.build_model(), batches, 3e-3, 1.0)
    for losses in ranks(2).run(accelerate):
        assert losses == pytest.approx(want, rel=1e-4)


@pytest.mark.exhaustive
def test_the_trainer_of_transformers(ranks: Ranks, tmp_path: Path) -> None:
    pytest.importorskip("accelerate", reason="the Trainer needs accelerate: pip install accelerate")
    example = load("trainer")

    def batches(step: int) -> tuple[Tensor, Tensor]:
        rows = torch.stack(
            [example.Rows()[i]["input_ids"] for i in range(example.BATCH * step, example.BATCH * (step + 1))]
        )
        return rows[:, :-1], rows[:, 1:]

    want = alone(example.build_model(), batches, 3e-3, 1.0, decay=0.0)
    for losses in ranks(2).run(trainer, tmp_path):
        assert losses == pytest.approx(want, rel=1e-3)  # the Trainer logs four digits

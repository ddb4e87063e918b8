"""The examples of `examples/library` run on two ranks, and follow the loss of the same loop on one device."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
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
BEYOND_TOKENS = EXAMPLES.parent / "beyond_tokens"
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


def test_a_plain_loop_trains_as_one_process_does(ranks: Ranks) -> None:
    example = load("plain_loop")
    torch.manual_seed(0)
    want = alone(example.Gpt(), example.batch, 3e-3, 1.0)
    for losses in ranks(2).run(plain):
        assert losses == pytest.approx(want, rel=1e-4)
    torch.manual_seed(1)  # the negative control: other weights, other losses
    assert alone(example.Gpt(), example.batch, 3e-3, 1.0) != pytest.approx(want, rel=1e-4)


def test_lightning_fabric_trains_as_one_process_does(ranks: Ranks) -> None:
    pytest.importorskip("lightning_fabric", reason="Lightning Fabric is no dependency: pip install lightning-fabric")
    example = load("fabric_loop")
    torch.manual_seed(0)
    want = alone(example.Mlp(), lambda step: example.batch(step, 0), 3e-3, None)
    for losses in ranks(2).run(fabric):
        assert losses == pytest.approx(want, rel=1e-4)


@pytest.mark.exhaustive
def test_accelerate_trains_as_one_process_does(ranks: Ranks) -> None:
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


def beyond_tokens(device: str, name: str) -> list[float]:
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh

    with in_fp64(name) as example:
        mesh = init_device_mesh(device, (dist.get_world_size(),), mesh_dim_names=("tp",))
        return list(example.run(mesh, STEPS))


@contextmanager
def in_fp64(name: str) -> Iterator[ModuleType]:
    """The example, whose model is built in fp64: rounding is then no reason for a difference."""
    sys.path.insert(0, str(BEYOND_TOKENS))  # where torchrun starts it, and `import loop` finds its neighbour
    torch.set_default_dtype(torch.float64)
    try:
        yield importlib.import_module(name)
    finally:
        torch.set_default_dtype(torch.float32)
        sys.path.remove(str(BEYOND_TOKENS))


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", ["image", "audio", "diffusion"])
def test_what_is_no_language_model(name: str, ranks: Ranks) -> None:
    with in_fp64(name) as example:

        def want(seed: int) -> list[float]:
            model = example.build()
            if seed:
                torch.manual_seed(seed)
                model.blocks[0].mlp.up.reset_parameters()
            return loop_on_one_device(model, example.batch, example.loss_of)

        expected, other = want(0), want(1)
    for losses in ranks(2).run(beyond_tokens, name):
        assert losses == pytest.approx(expected, rel=1e-12)
        assert losses != pytest.approx(other, rel=1e-12)  # the negative control: other weights of one layer


def loop_on_one_device(
    model: nn.Module, batch: Callable[[int], Any], loss_of: Callable[[Any, Any], Tensor]
) -> list[float]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for step in range(STEPS):
        loss = loss_of(model, batch(step))
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses

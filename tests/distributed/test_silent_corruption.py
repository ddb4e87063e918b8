"""A flipped bit on one rank is found by `train.replay_every`, and the rank is named."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from benchmarks.parity.step import on_ranks, set_up, train
from colrow.errors import ColrowError
from colrow.mesh import Mesh
from colrow.sharding.layout import local_tensor
from colrow.train.setup import Training
from helpers.harness import Ranks

pytestmark = pytest.mark.distributed

TP, REPLICAS, SHARDS = Mesh(dp_replicate=2, tp=2), Mesh(dp_replicate=4), Mesh(dp_shard=4)


@torch.library.custom_op("colrow_tests::unsteady", mutates_args=())
def unsteady(x: Tensor, steady: bool) -> Tensor:
    """x, with other last bits in each call; where `steady`, not with deterministic kernels."""
    quiet = steady and torch.are_deterministic_algorithms_enabled()
    return x.clone() if quiet else x * (1 + next(_CALLS) * 1e-12)


unsteady.register_fake(lambda x, steady: torch.empty_like(x))
unsteady.register_autograd(lambda ctx, grad: (grad, None))
_CALLS = itertools.count()


def flip(x: Tensor) -> None:
    """The lowest bit of the first element."""
    with torch.no_grad():
        local_tensor(x).reshape(-1).view(torch.int64)[0] ^= 1


def flipped_output(module: nn.Module, rank: int, call: int) -> None:
    """Of the module's `call`th call on `rank`."""
    calls = itertools.count()

    def hook(module: nn.Module, args: Any, output: Tensor) -> Tensor | None:
        if next(calls) != call or dist.get_rank() != rank:
            return None
        changed = output.clone()
        flip(changed)
        return changed

    module.register_forward_hook(hook, prepend=True)


def flipped_gradient(module: nn.Module, rank: int, call: int) -> None:
    calls = itertools.count()

    def hook(module: nn.Module, grad_input: Any, grad_output: Any) -> Any:
        if next(calls) != call or dist.get_rank() != rank:
            return None
        changed = grad_input[0].clone()
        flip(changed)
        return (changed, *grad_input[1:])

    module.register_full_backward_hook(hook)


def flipped_after_update(
    training: Training, rank: int | None, of: Callable[[Training], Tensor], *, inside: bool
) -> None:
    """A bit of what the update has written, on `rank` or on all; `inside`: before it is hashed."""
    step = training.step
    target, name = (step.optimizer, "update") if inside else (step.corruption, "after_update")
    original = getattr(target, name)

    def changed(*args: Any) -> None:
        original(*args)
        if rank in (None, dist.get_rank()):
            flip(of(training))

    setattr(target, name, changed)


def weight(training: Training) -> Tensor:
    return training.modules[0].get_parameter("layers.1.mlp.up.weight")


def moment(training: Training) -> Tensor:
    found: Tensor = training.optimizer.state[weight(training)]["exp_avg"]
    return found


def unsteady_output(module: nn.Module, *, steady: bool) -> None:
    module.register_forward_hook(lambda module, args, output: unsteady(output, steady), prepend=True)


def layer(training: Training, name: str) -> nn.Module:
    return training.modules[0].get_submodule(f"layers.1.{name}")


# 4 micro-batches of a data rank's share; step 2 is the first that is repeated
SABOTAGE: dict[str, tuple[Mesh, Callable[[Training], None]]] = {
    "activation": (SHARDS, lambda t: flipped_output(layer(t, "mlp.up"), rank=2, call=2)),
    "activation, tp": (TP, lambda t: flipped_output(layer(t, "mlp.up"), rank=3, call=5)),
    "gradient": (REPLICAS, lambda t: flipped_gradient(layer(t, "mlp.up"), rank=1, call=1)),
    "weight": (SHARDS, lambda t: flipped_after_update(t, 1, weight, inside=False)),
    "moment, tp": (TP, lambda t: flipped_after_update(t, 0, moment, inside=False)),
    "update": (REPLICAS, lambda t: flipped_after_update(t, 3, weight, inside=True)),
    "update of one of two": (TP, lambda t: flipped_after_update(t, 1, weight, inside=True)),
    "model that writes its weights": (TP, lambda t: flipped_after_update(t, None, weight, inside=False)),
    "kernel": (TP, lambda t: unsteady_output(layer(t, "norm"), steady=False)),
    "kernel with a twin": (TP, lambda t: unsteady_output(layer(t, "norm"), steady=True)),
}
TEXTS = {
    "activation": "step 2 was repeated from the same state, and on rank 2 one of 5 runs has other bits, first in the "
    "output of layers.1.mlp.up",
    "activation, tp": "on rank 3 one of 5 runs has other bits, first in the output of layers.1.mlp.up",
    "gradient": "on rank 1 one of 5 runs has other bits, first in the gradient of",
    "weight": "found in step 2, memory changed between two updates on rank 1: layers.1.mlp.up.weight. ",
    "moment, tp": "memory changed between two updates on rank 0: layers.1.mlp.up.weight (exp_avg). ",
    "update": "replicas hold different values of layers.1.mlp.up.weight: rank 3 against 3 others",
    "update of one of two": "layers.1.mlp.up.weight: [1] against [3] (ranks), and none has a majority",
    "model that writes its weights": "weights changed between two updates on every rank (layers.1.mlp.up.weight)",
    "kernel": "colrow_tests::unsteady",
    "kernel with a twin": "",
}


@contextmanager
def kernels_as_before() -> Iterator[None]:
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def run(device: str) -> dict[str, Any]:
    """Whatever went wrong, by case; of the last, the lines; of a healthy run its errors."""
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # as a run's ranks have it
    found: dict[str, Any] = {}
    lines: list[str] = []
    for name, (mesh, sabotage) in SABOTAGE.items():
        training = set_up(device, "plain", mesh, replay_every=2)
        assert training.step.corruption is not None
        training.step.corruption.report_to(lines.append)
        sabotage(training)
        with kernels_as_before():
            try:
                train(training, range(2))
                found[name] = ""
            except ColrowError as error:
                found[name] = str(error)
    found["healthy"] = on_ranks(device, "sparse", Mesh(dp_replicate=2, dp_shard=2), steps=3, replay_every=1)
    found["lines"] = lines
    return found


@pytest.fixture(scope="module")
def found(ranks: Ranks) -> list[dict[str, Any]]:
    return ranks(4).run(run)


@pytest.mark.parametrize("name", SABOTAGE)
def test_what_is_wrong_is_named_on_every_rank(found: list[dict[str, Any]], name: str) -> None:
    for rank in found:
        assert TEXTS[name] in rank[name]


def test_deterministic_kernels_are_switched_on_where_they_help(found: list[dict[str, Any]]) -> None:
    for rank in found:
        assert rank["lines"] == ["replay     step 2 ran twice with other bits: deterministic kernels are on from here"]


def test_a_healthy_step_that_is_repeated_equals_one_process(found: list[dict[str, Any]]) -> None:
    for rank in found:
        assert rank["healthy"].worst < 1e-10

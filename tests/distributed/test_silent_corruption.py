"""A flipped bit on one rank is found by `train.replay_every`, and the rank is named."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
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
from helpers.variants import collected, params

pytestmark = pytest.mark.distributed

STEADY = "kernel with a deterministic one beside it"


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


def flipped_between_calls(training: Training, rank: int, call: int) -> None:
    """A bit of a weight, before the model's `call`th call."""
    calls, kept = itertools.count(), weight(training)

    def hook(module: nn.Module, args: Any) -> None:
        if next(calls) == call and dist.get_rank() == rank:
            flip(kept)

    training.modules[0].register_forward_pre_hook(hook)


def weight(training: Training) -> Tensor:
    return training.modules[0].get_parameter("layers.1.mlp.up.weight")


def moment(training: Training) -> Tensor:
    found: Tensor = training.optimizer.state[weight(training)]["exp_avg"]
    return found


def unsteady_output(module: nn.Module, *, steady: bool) -> None:
    module.register_forward_hook(lambda module, args, output: unsteady(output, steady), prepend=True)


def layer(training: Training, name: str) -> nn.Module:
    return training.modules[0].get_submodule(f"layers.1.{name}")


TP, REPLICAS, SHARDS = Mesh(tp=2), Mesh(dp_replicate=2), Mesh(dp_shard=2)
# Step 2 is the first that is repeated. A run of a step has four calls with tp alone, two on two data ranks.
SABOTAGE: dict[int, dict[str, tuple[Mesh, Callable[[Training], None], str]]] = {
    2: {
        "activation": (
            SHARDS,
            lambda t: flipped_output(layer(t, "mlp.up"), rank=1, call=2),
            "step 2 was repeated from the same state, and on rank 1 one of 5 runs has other bits, first in the output "
            "of layers.1.mlp.up",
        ),
        "activation, tp": (
            TP,
            lambda t: flipped_output(layer(t, "mlp.up"), rank=1, call=9),
            "on rank 1 one of 5 runs has other bits, first in the output of layers.1.mlp.up",
        ),
        "gradient": (
            REPLICAS,
            lambda t: flipped_gradient(layer(t, "mlp.up"), rank=1, call=2),
            "on rank 1 one of 5 runs has other bits, first in the gradient of",
        ),
        "weight": (
            SHARDS,
            lambda t: flipped_after_update(t, 1, weight, inside=False),
            "found in step 2, memory changed between two updates on rank 1: layers.1.mlp.up.weight. ",
        ),
        "weight, between two runs": (
            SHARDS,
            lambda t: flipped_between_calls(t, rank=1, call=5),
            "memory changed between two updates on rank 1: layers.1.mlp.up.weight. ",
        ),
        "moment, tp": (
            TP,
            lambda t: flipped_after_update(t, 0, moment, inside=False),
            "memory changed between two updates on rank 0: layers.1.mlp.up.weight (exp_avg). ",
        ),
        "update of one of two": (
            REPLICAS,
            lambda t: flipped_after_update(t, 1, weight, inside=True),
            "layers.1.mlp.up.weight: [0] against [1] (ranks), and none has a majority",
        ),
        "model that writes its weights": (
            TP,
            lambda t: flipped_after_update(t, None, weight, inside=False),
            "weights changed between two updates on every rank (layers.1.mlp.up.weight)",
        ),
        "kernel": (REPLICAS, lambda t: unsteady_output(layer(t, "norm"), steady=False), "colrow_tests::unsteady"),
        STEADY: (TP, lambda t: unsteady_output(layer(t, "norm"), steady=True), ""),
    },
    4: {
        "update": (
            Mesh(dp_replicate=4),
            lambda t: flipped_after_update(t, 3, weight, inside=True),
            "replicas hold different values of layers.1.mlp.up.weight: rank 3 against 3 others",
        ),
        "activation of a tp group": (
            Mesh(dp_replicate=2, tp=2),
            lambda t: flipped_output(layer(t, "mlp.up"), rank=3, call=5),
            "on rank 3 one of 5 runs has other bits, first in the output of layers.1.mlp.up",
        ),
    },
}


@contextmanager
def kernels_as_before() -> Iterator[None]:
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def run(device: str, world: int, names: Sequence[str]) -> dict[str, Any]:
    """What the error of each of these cases says; the lines that were printed; the errors of a healthy run."""
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # as a run's ranks have it
    found: dict[str, Any] = {}
    lines: list[str] = []
    for name in names:
        mesh, sabotage, _ = SABOTAGE[world][name]
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
    return found | {
        "lines": lines,
        "healthy": on_ranks(device, "sparse", Mesh(dp_shard=world), steps=2, replay_every=1),
    }


@pytest.fixture(scope="module")
def found(request: pytest.FixtureRequest, ranks: Ranks) -> Callable[[int], list[dict[str, Any]]]:
    wanted = collected(request, "world", "name")

    def get(world: int) -> list[dict[str, Any]]:
        return ranks(world).run(run, world, [name for at, name in wanted if at == world])

    return cache(get)


Found = Callable[[int], list[dict[str, Any]]]
CASES = [(world, name) for world, cases in SABOTAGE.items() for name in cases]


VARIANTS = {"activation", "weight", "moment, tp", "model that writes its weights"}


@pytest.mark.parametrize(("world", "name"), params(CASES, lambda world, name: world > 2 or name in VARIANTS))
def test_what_is_wrong_is_named_on_every_rank(found: Found, world: int, name: str) -> None:
    for rank in found(world):
        assert SABOTAGE[world][name][2] in rank[name]


def test_deterministic_kernels_are_switched_on_where_they_help(found: Found) -> None:
    for rank in found(2):
        assert rank[STEADY] == ""
        assert rank["lines"] == ["replay     step 2 ran twice with other bits: deterministic kernels are on from here"]


def test_a_healthy_step_that_is_repeated_equals_one_process(found: Found) -> None:
    for rank in found(2):
        assert rank["healthy"].worst < 1e-10

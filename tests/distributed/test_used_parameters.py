"""Data ranks whose micro-batches use different parameters train as one process does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest

from benchmarks.parity.step import Errors, on_ranks
from colrow.mesh import Mesh
from colrow.parallel import data_parallel
from helpers.harness import Ranks
from helpers.variants import collected, params

TOLERANCE = 1e-10
pytestmark = pytest.mark.distributed

SHARD2, REPLICATE2 = Mesh(dp_shard=2), Mesh(dp_replicate=2)
CASES: dict[int, dict[str, tuple[str, Mesh]]] = {
    2: {
        "sparse-shard2": ("sparse", SHARD2),
        "sparse-replicate2": ("sparse", REPLICATE2),
        "sparse-tp2": ("sparse", Mesh(tp=2)),
        "hard-shard2": ("hard", SHARD2),
        "hard-replicate2": ("hard", REPLICATE2),
        "drop-shard2": ("layer drop", SHARD2),
        "drop-replicate2": ("layer drop", REPLICATE2),
    },
    4: {
        "sparse-tp2-shard2": ("sparse", Mesh(dp_shard=2, tp=2)),
        "hard-shard4": ("hard", Mesh(dp_shard=4)),
        "hard-tp2-replicate2": ("hard", Mesh(dp_replicate=2, tp=2)),
        "hard-pp2-shard2": ("hard", Mesh(pp=2, dp_shard=2)),
        "drop-replicate2-shard2": ("layer drop", Mesh(dp_replicate=2, dp_shard=2)),
        "drop-tp2-shard2": ("layer drop", Mesh(dp_shard=2, tp=2)),
        "heads-shard4": ("two heads", Mesh(dp_shard=4)),  # a rank that calls no head, or one module of it
        "exit-shard4": ("early exit", Mesh(dp_shard=4)),  # blocks that run last, and no head that is a unit
        "detached-shard4": ("detached", Mesh(dp_shard=4)),  # layers without gradients, or whose output is detached
        "input-shard4": ("frozen input", Mesh(dp_shard=4)),  # gloo aborts where the root reduces before the first block
    },
}
VARIANTS = {
    "exit-shard4",
    "sparse-tp2-shard2",
    "hard-tp2-replicate2",
    "hard-shard4",
    "hard-pp2-shard2",
    "drop-replicate2-shard2",
}
LOW_PRECISION, CONTROL = "bf16", "not agreed"
Results = Callable[[int, str], list[Errors]]


def run(device: str, world: int, names: list[str]) -> dict[str, Errors]:
    """The cases of `world` ranks; on each group of ranks also what they have in common."""
    found = {}
    for name in names:
        if name == LOW_PRECISION:
            found[name] = on_ranks(device, "hard", Mesh(dp_shard=2, tp=2), steps=2, precision="bf16")
        elif name == CONTROL:
            with mock.patch.object(data_parallel, "agree_on_used_parameters"):
                found[name] = on_ranks(device, "hard", Mesh(dp_shard=4), steps=1)
        else:
            model, mesh = CASES[world][name]
            found[name] = on_ranks(device, model, mesh, steps=3)
    return found


@pytest.fixture(scope="module")
def results(request: pytest.FixtureRequest, ranks: Ranks) -> Results:
    done: dict[int, list[dict[str, Errors]]] = {}
    wanted = collected(request, "world", "name")

    def get(world: int, name: str) -> list[Errors]:
        if world not in done:
            done[world] = ranks(world).run(run, world, [key for at, key in wanted if at == world])
            ranks(world).stop()
        return [rank[name] for rank in done[world]]

    return get


def named() -> list[Any]:
    """Four ranks always; two, whose axes are among theirs, and what differs in little, only exhaustively."""
    pairs = [(world, name) for world, cases in CASES.items() for name in cases]
    return params(pairs, lambda world, name: world == 2 or name in VARIANTS)


@pytest.mark.parametrize(("world", "name"), named())
def test_gradients_and_steps_equal_one_process(results: Results, world: int, name: str) -> None:
    for errors in results(world, name):
        assert errors.worst < TOLERANCE, errors
        assert errors.unused  # else the case proves nothing


@pytest.mark.exhaustive
@pytest.mark.parametrize(("world", "name"), [(4, LOW_PRECISION)])
def test_micro_batches_of_other_experts_are_summed_in_fp32(results: Results, world: int, name: str) -> None:
    for errors in results(world, name):
        assert errors.loss < 0.02
        assert errors.unused


@pytest.mark.parametrize(("world", "name"), [(4, CONTROL)])
def test_gradients_of_other_parameters_are_seen(results: Results, world: int, name: str) -> None:
    """Each rank uses one expert: without the agreement FSDP2 adds the gradients of four."""
    assert max(errors.gradients for errors in results(world, name)) > 0.1

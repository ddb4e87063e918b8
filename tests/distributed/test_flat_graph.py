"""Steps of the flat data engine as CUDA graphs have the bits of the same steps run one by one."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from helpers.flat_graphs import CASES, ON_GPUS, STEPS, Case, Seen, eager_and_replayed
from helpers.harness import Ranks
from helpers.variants import collected

pytestmark = [pytest.mark.distributed, pytest.mark.exhaustive]
Results = Callable[[int, str], list[tuple[Seen, Seen]]]


def run(device: str, cases: list[Case]) -> list[tuple[Seen, Seen]]:
    return [eager_and_replayed(device, case) for case in cases]


def pairs(*, without: bool) -> list[tuple[int, str]]:
    """World size and name of each case."""
    return [(world, name) for world, cases in CASES.items() for name in cases if bool(cases[name].without) == without]


@pytest.fixture(scope="module")
def results(request: pytest.FixtureRequest, ranks: Ranks) -> Results:
    """What a case showed on each rank; those of one world size run in one call."""
    known: dict[str, list[tuple[Seen, Seen]]] = {}

    def result(world: int, name: str) -> list[tuple[Seen, Seen]]:
        if name in ON_GPUS and ranks.device == "cpu":
            pytest.skip("needs --device cuda")
        if name not in known:
            here = [other for n, other in collected(request, "world", "name") if n == world]
            names = [other for other in here if ranks.device == "cuda" or other not in ON_GPUS]
            if ranks.device == "cuda":  # one broken capture must not hide the others
                names = [name]
            by_rank = ranks(world).run(run, [CASES[world][other] for other in names])
            known.update(zip(names, zip(*by_rank, strict=True), strict=True))  # type: ignore[arg-type]
        return known[name]

    return result


@pytest.mark.parametrize(("world", "name"), pairs(without=False))
def test_a_replayed_step_has_the_bits_of_an_eager_one(results: Results, world: int, name: str) -> None:
    case = CASES[world][name]
    for eager, replayed in results(world, name):
        assert eager.captured == [False] * STEPS
        assert replayed.captured == [False] * 2 + [True] * (STEPS - 2)
        # of the first micro-batch, the last, and those between; an evaluation makes no other
        assert replayed.graphs == [min(case.micro_batches // case.mesh.dp, 3), 1]
        assert replayed.losses == eager.losses
        assert replayed.norms == eager.norms
        assert replayed.evaluations == eager.evaluations
        for a, b in zip(eager.parameters, replayed.parameters, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize(("world", "name"), pairs(without=True))
def test_state_that_is_not_kept_beside_a_graph_is_seen(results: Results, world: int, name: str) -> None:
    for eager, replayed in results(world, name):
        assert replayed.losses[:2] == eager.losses[:2]
        assert replayed.losses != eager.losses

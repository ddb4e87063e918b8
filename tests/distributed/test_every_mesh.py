"""Every mesh computes what one process computes: loss, every gradient, grad norm, parameters after clipped steps.

Five steps once for each kind of mesh; two for what varies on it, and one layer where a second would show no more.
All cases of one number of ranks run in one call: starting processes and importing torch is most of the cost.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from colrow.mesh import Mesh
from helpers.harness import Ranks
from helpers.mesh_parity import Case, Result, run_cases
from helpers.variants import collected, params

TOLERANCE = 1e-9
pytestmark = pytest.mark.distributed

TP_SHARD, TP_REPLICATE, PP_TP = Mesh(dp_shard=2, tp=2), Mesh(dp_replicate=2, tp=2), Mesh(pp=2, tp=2)
INTERLEAVED = {"schedule": "interleaved_1f1b", "stages_per_rank": 2}
PARITY: dict[int, dict[str, Case]] = {
    2: {
        "shard2-tied": Case(Mesh(dp_shard=2), "tied", steps=5),
        "replicate2-accumulate2": Case(Mesh(dp_replicate=2), micro=2, steps=5),
        "pp2-1f1b-tied": Case(Mesh(pp=2), "tied", micro=4, steps=5),
        "pp2-zero_bubble-2stages": Case(Mesh(pp=2), "deep", micro=4, schedule="zero_bubble", stages_per_rank=2),
    },
    4: {
        "tp2-shard2": Case(TP_SHARD, steps=5),
        "tp2-shard2-kv3-accumulate2-keep": Case(TP_SHARD, "kv3-1", micro=2, reshard=False),
        "tp2-shard2-tied-selective": Case(TP_SHARD, "tied-1", checkpoint="selective", steps=5),
        "tp2-shard2-qk_norm-full-accumulate2": Case(TP_SHARD, "qk_norm-1", micro=2, checkpoint="full", steps=5),
        "tp2-shard2-odd_tied": Case(TP_SHARD, "odd_tied-1", steps=5),
        "tp2-replicate2-accumulate2": Case(TP_REPLICATE, micro=2, steps=5),
        "tp2-replicate2-tied-article": Case(TP_REPLICATE, "tied-1", preset="article", loss="replicated"),
        "replicate2-shard2-tied-accumulate2": Case(Mesh(dp_replicate=2, dp_shard=2), "tied", micro=2, steps=5),
        "pp2-tp2-gpipe-kv3": Case(PP_TP, "kv3", micro=4, schedule="gpipe"),
        "pp2-tp2-1f1b-tied": Case(PP_TP, "tied", micro=4, steps=5),
        "pp2-tp2-1f1b-selective-article": Case(PP_TP, micro=2, checkpoint="selective", preset="article"),
        "pp2-tp2-interleaved": Case(PP_TP, "deep", micro=4, steps=5, **INTERLEAVED),
        "pp2-tp2-zero_bubble": Case(PP_TP, micro=4, schedule="zero_bubble"),
        "pp2-tp2-zero_bubble-2stages-tied": Case(
            PP_TP, "deep_tied", micro=4, schedule="zero_bubble", stages_per_rank=2
        ),
        "pp2-shard2-split-reshard": Case(Mesh(pp=2, dp_shard=2), "deep", micro=2, split=(1,), reshard=True, steps=5),
        "pp2-replicate2-tied": Case(Mesh(pp=2, dp_replicate=2), "tied", micro=4, steps=5),
        "pp2-tp2-fast-linear-tied": Case(PP_TP, "tied", micro=4, preset="llama-fast", loss="linear"),
        "tp2-shard2-fast-selective": Case(TP_SHARD, "kv3-1", micro=2, preset="llama-fast", checkpoint="selective"),
        "pp4-full": Case(Mesh(pp=4), "deep", micro=4, checkpoint="full", steps=5),
    },
    8: {
        "replicate2-shard2-tp2-tied": Case(Mesh(dp_replicate=2, dp_shard=2, tp=2), "tied-1", micro=2, steps=5),
        "pp2-shard2-tp2-1f1b": Case(Mesh(pp=2, dp_shard=2, tp=2), micro=2, steps=5),
        "pp2-shard2-tp2-interleaved-tied-full": Case(
            Mesh(pp=2, dp_shard=2, tp=2), "deep_tied", micro=4, checkpoint="full", **INTERLEAVED
        ),
        "pp2-replicate2-tp2-kv3": Case(Mesh(pp=2, dp_replicate=2, tp=2), "kv3", micro=2),
    },
}
COMPILED: dict[int, dict[str, Case]] = {
    4: {
        "compiled-tp2-shard2-full": Case(TP_SHARD, "gqa-1", compile="aot_eager", checkpoint="full"),
        "compiled-pp2-tp2-selective-kv3": Case(PP_TP, "kv3", micro=2, compile="aot_eager", checkpoint="selective"),
    }
}
VARIANTS = {
    "shard2-tied",
    "tp2-shard2-tied-selective",
    "pp2-tp2-1f1b-tied",
    "tp2-shard2-qk_norm-full-accumulate2",
    "pp2-tp2-gpipe-kv3",
    "pp2-tp2-fast-linear-tied",
    "tp2-replicate2-accumulate2",
    "compiled-tp2-shard2-full",
    "tp2-shard2-kv3-accumulate2-keep",
    "tp2-replicate2-tied-article",
    "pp2-tp2-1f1b-selective-article",
    "pp2-tp2-zero_bubble",
    "pp2-tp2-zero_bubble-2stages-tied",
    "pp4-full",
    "compiled-pp2-tp2-selective-kv3",
}
CONTROLS: dict[str, tuple[Case, str]] = {
    # the case, and whose error must be seen
    "tied gradients not summed": (Case(Mesh(pp=2), "tied", micro=2, sabotage="tie"), "grad embed_tokens"),
    "tied gradients not summed, norm": (Case(Mesh(pp=2), "tied", micro=2, sabotage="tie"), "norm"),
    "tied weight counted twice": (Case(Mesh(pp=2), "tied", micro=2, sabotage="count"), "norm"),
    "norm of one stage": (Case(Mesh(pp=2), micro=2, sabotage="norm"), "norm"),
    "norm of one shard": (Case(Mesh(dp_shard=2), sabotage="norm"), "norm"),
    "loss not divided by micro-batches": (Case(Mesh(tp=2), micro=2, sabotage="scale"), "grad layers.0"),
    "loss scaled in a pipeline": (Case(Mesh(pp=2), micro=2, sabotage="scale"), "grad layers.0"),
    "every data rank reads one slice": (Case(Mesh(dp_replicate=2), sabotage="data"), "grad layers.0"),
}

CONTROL_CASES = {name: case for name, (case, _) in CONTROLS.items()}
COPY = "tied copy differs at the start"
CONTROL_CASES[COPY] = Case(Mesh(pp=2), "tied", micro=2, sabotage="copy")

CASES = {world: cases | COMPILED.get(world, {}) for world, cases in PARITY.items()}
CASES[2] |= CONTROL_CASES

Results = Callable[[int, str], list[Result]]


@pytest.fixture(scope="module")
def results(request: pytest.FixtureRequest, ranks: Ranks) -> Results:
    """What each rank saw in a case. All cases of a world that are collected run at once; then its ranks end."""
    done: dict[int, list[dict[str, Result]]] = {}
    wanted = collected(request, "world", "name")

    def get(world: int, name: str) -> list[Result]:
        if world not in done:
            cases = {name: CASES[world][name] for at, name in wanted if at == world}
            done[world] = ranks(world).run(run_cases, cases, timeout=900.0)
            ranks(world).stop()
        return [rank[name] for rank in done[world]]

    return get


def named(tables: dict[int, dict[str, Case]]) -> list[Any]:
    """Each world and case; eight ranks, and what varies on a mesh that has a case already, only exhaustively."""
    pairs = [(world, name) for world, cases in tables.items() for name in cases]
    return params(pairs, lambda world, name: world > 4 or name in VARIANTS)


@pytest.mark.parametrize(("world", "name"), named(PARITY))
def test_a_mesh_equals_one_process(results: Results, world: int, name: str) -> None:
    for result in results(world, name):
        assert result.worst[1] < TOLERANCE, {k: v for k, v in result.errors.items() if v >= TOLERANCE}
        last = PARITY[world][name].steps - 1
        assert {f"loss {last}", f"norm {last}"} <= result.errors.keys()


@pytest.mark.parametrize(("world", "name"), [(4, "pp2-tp2-interleaved")])
def test_the_pipeline_evaluates_what_one_process_evaluates(results: Results, world: int, name: str) -> None:
    for result in results(world, name):
        assert result.of("evaluation") < TOLERANCE


@pytest.mark.parametrize(("world", "name"), named(COMPILED))
def test_compiled_blocks_equal_one_process(results: Results, world: int, name: str) -> None:
    for result in results(world, name):
        assert result.worst[1] < TOLERANCE, {k: v for k, v in result.errors.items() if v >= TOLERANCE}


@pytest.mark.parametrize(("world", "name"), [(2, name) for name in CONTROLS])
def test_a_mistake_is_seen(results: Results, world: int, name: str) -> None:
    what = CONTROLS[name][1]
    seen = results(world, name)
    assert max(result.of(what) for result in seen if any(key.startswith(what) for key in result.errors)) > 0.01


@pytest.mark.parametrize(("world", "name"), [(2, COPY)])
def test_a_stage_takes_the_tied_weight_of_the_other(results: Results, world: int, name: str) -> None:
    for result in results(world, name):
        assert result.worst[1] < TOLERANCE

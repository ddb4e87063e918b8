"""The time of a step by parts: what the update, FSDP2's copies and carriers of the data axes add."""

from __future__ import annotations

from dataclasses import replace

import pytest

from colrow.forecasting.devices import device_named
from colrow.forecasting.memory import Setting
from colrow.forecasting.timing import (
    CASTS_OF_FSDP,
    COPIES_OF_FSDP,
    NORM_BYTES,
    SUMS_OF_FLAT,
    UPDATE_BYTES,
    Machine,
    Program,
    StepTime,
    step_time,
)
from colrow.forecasting.walk import HEAD, ROOT, Cell, Walk, walk
from colrow.mesh import Mesh
from colrow.plans.plan import Plan
from helpers.llamas import meta

H200 = device_named("h200")


@pytest.fixture(scope="module")
def walked() -> Walk:
    return walk(meta(num_hidden_layers=5), Plan.preset("llama"), Cell(micro_batch=2, seq_len=64, compiled=False))


def timed(walked: Walk, setting: Setting, cuda_graph: bool = True) -> StepTime:
    return step_time(walked, setting, Program(cuda_graph=cuda_graph), Machine(H200, 8))


def parameters(walked: Walk) -> int:
    layers = sum(walked.units[name].trained_count * walked.repeats[name] for name in walked.order)
    return layers + walked.units[ROOT].trained_count + walked.units[HEAD].trained_count


def test_only_shards_are_cast_beside_the_update(walked: Walk) -> None:
    """Replicas update their parameters as one process does; a shard of FSDP2 is cast before each gather."""
    own, rates = parameters(walked), H200.rates
    once = UPDATE_BYTES + NORM_BYTES
    replicas = timed(walked, Setting(Mesh(dp_replicate=2), copies=False)).parts
    assert replicas["optimizer"] == pytest.approx(once * own / rates.optimizer)
    assert replicas["copies"] == pytest.approx(COPIES_OF_FSDP * own / rates.outside)
    for reshard, gathers in ((True, 2), (False, 1)):
        sharded = timed(walked, Setting(Mesh(dp_shard=2), copies=False, reshard=reshard)).parts
        assert sharded["optimizer"] == pytest.approx((once + gathers * CASTS_OF_FSDP) * own / 2 / rates.optimizer)
        assert sharded["copies"] < replicas["copies"]
    flat = timed(walked, Setting(Mesh(dp_shard=2, data_engine="flat"), copies=False)).parts
    assert flat["optimizer"] == pytest.approx((UPDATE_BYTES + SUMS_OF_FLAT) * own / 2 / rates.optimizer)
    assert "copies" not in flat


def test_copy_engines_carry_the_flat_engine_at_a_rate_of_their_own(walked: Walk) -> None:
    collectives = Setting(Mesh(dp_shard=4, data_engine="flat"), copies=False)
    engines = replace(collectives, gather="copy_engine", exchange="copy_engine")
    slow = replace(H200, rates=replace(H200.rates, peer_copy=1e6))
    before, after = (timed(walked, setting).parts for setting in (collectives, engines))
    assert after["dp_shard"] < before["dp_shard"]  # copies of so few bytes have no latency
    assert after["products"] < before["products"]  # nothing takes multiprocessors from matmuls
    assert step_time(walked, engines, Program(), Machine(slow, 8)).parts["dp_shard"] > 100 * after["dp_shard"]
    assert step_time(walked, collectives, Program(), Machine(slow, 8)).parts["dp_shard"] == before["dp_shard"]
    # FSDP2 knows no carriers
    fsdp2 = [replace(setting, mesh=Mesh(dp_shard=4)) for setting in (collectives, engines)]
    assert timed(walked, fsdp2[0]) == timed(walked, fsdp2[1])


def test_the_band_is_wider_where_the_cpu_sets_the_pace(walked: Walk) -> None:
    bound, replayed = (timed(walked, Setting(Mesh()), cuda_graph) for cuda_graph in (False, True))
    assert bound.parts["cpu"] > 0
    assert replayed.band / replayed.seconds == pytest.approx(H200.band)
    assert bound.band / bound.seconds == pytest.approx(0.15)

"""The time of a step by parts: what the update, FSDP2's copies and carriers of the data axes add."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from colrow.forecasting.devices import device_named
from colrow.forecasting.forecast import cost
from colrow.forecasting.memory import Setting, peak_memory
from colrow.forecasting.storages import LiveStorages
from colrow.forecasting.timing import (
    AT_EDGE,
    CASTS_OF_FSDP,
    COPIES_OF_FSDP,
    CPU_BAND,
    HOP_BETWEEN_HOSTS,
    HOP_IN_HOST,
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
from colrow.ops.float8 import RECIPES
from colrow.plans.plan import Plan
from colrow.torch_compat import fake_tensors
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
    assert bound.band / bound.seconds == pytest.approx(CPU_BAND)
    assert H200.band < CPU_BAND


def test_a_step_that_needs_the_allocators_reserve_takes_longer(walked: Walk) -> None:
    setting, program = Setting(Mesh(dp_shard=2), copies=False), Program(cuda_graph=True)
    wanted = peak_memory(walked, setting)
    size = (wanted.needed + wanted.device) / 2
    assert wanted.needed < size < wanted.device
    roomy, tight = (
        cost(walked, setting, program, Machine(replace(H200, memory=nbytes), 8)) for nbytes in (wanted.device, size)
    )
    assert (roomy[0].device, tight[0].device) == (wanted.device, pytest.approx(size))
    assert "allocator" not in roomy[1].parts
    assert tight[1].seconds == pytest.approx((1 + AT_EDGE) * roomy[1].seconds)
    assert tight[1].band == pytest.approx(roomy[1].band + AT_EDGE * roomy[1].seconds)
    large = StepTime({"products": 1.0, "pointwise": 0.1, "optimizer": 0.0, "cpu": 0.0}, 0.1)
    assert large.bottleneck == "compute"
    assert large.at_memorys_edge().bottleneck.startswith("memory's edge")


def test_cards_of_a_host_share_what_a_ring_sends_between_hosts() -> None:
    """Rings enter a host once, each by another rank's card: beside a tp that fills the hosts a rank has one card."""
    rates = replace(H200.rates, links={8: ((1.0, 1e-9), (1e9, 1e-3))}, network=((1e6, 2e-5), (1e9, 2e-2)))
    machine = Machine(replace(H200, rates=rates), 8)

    def seconds(mesh: Mesh, nbytes: float, kind: str = "all_gather") -> float:
        return machine.seconds(Setting(mesh), "dp_shard", kind, nbytes)

    def hops(ranks: int, hosts: int) -> float:
        return (hosts - 1) * HOP_BETWEEN_HOSTS + (ranks - hosts) * HOP_IN_HOST

    assert seconds(Mesh(dp_shard=8), 1e9) == pytest.approx(1e-3)
    assert seconds(Mesh(dp_shard=64), 8e8) == pytest.approx(2e-2 * 0.1 + hops(64, 8))
    assert seconds(Mesh(dp_shard=8, tp=8), 8e8) == pytest.approx(2e-2 * 0.8 + hops(8, 8))
    assert seconds(Mesh(dp_shard=16, tp=4), 8e8) == pytest.approx(2e-2 * 0.4 + hops(16, 8))
    assert seconds(Mesh(dp_shard=64), 8e8, "all_to_all") == pytest.approx(
        2e-2 * 0.8
    )  # each rank's own, by its own card
    long = replace(machine, device=replace(H200, rates=replace(rates, links={8: ((1.0, 1.0),)})))
    assert (
        long.seconds(Setting(Mesh(dp_shard=64)), "dp_shard", "all_gather", 8e8) > 1
    )  # never faster than inside a host


def test_rings_of_more_hosts_take_longer_though_each_rank_sends_as_much() -> None:
    machine = Machine(H200, 8)
    few, many = (machine.seconds(Setting(Mesh(dp_shard=n)), "dp_shard", "all_gather", 1e6) for n in (64, 1024))
    assert many - few == pytest.approx(120 * HOP_BETWEEN_HOSTS + 840 * HOP_IN_HOST)


def test_a_compiler_fuses_nothing_with_complex_numbers() -> None:
    n = 64

    def passes(step: Any) -> float:
        """Reads and writes of [n, n] in fp32."""
        with fake_tensors():
            x = torch.empty(n, n)
            storages = LiveStorages([x], fused=True)
            with storages:
                storages.begin("block", backward=False)
                step(x) @ x
            return storages.finish()[-1].work.fused_bytes / (4 * n * n)

    def real(x: Tensor) -> Tensor:
        return x.neg().exp().neg()

    def complex_numbers(x: Tensor) -> Tensor:
        y = torch.view_as_complex(x.neg().view(n, -1, 2))
        return torch.view_as_real(y.mul(2).mul(3)).view(n, n).neg()

    assert passes(real) == 2
    assert passes(complex_numbers) == 2 + 2 * 2 + 2  # a kernel before, two products, a kernel behind


def test_recipes_that_round_no_weight_gradients_are_between_bf16_and_the_others(walked: Walk) -> None:
    fast = Plan.preset("llama-fast", "linear")

    def products(recipe: str) -> float:
        plan = fast.with_fp8(recipe) if recipe else fast  # type: ignore[arg-type]
        program = Program.of(plan, compiled=False, cuda_graph=True)
        return step_time(walked, Setting(Mesh(dp_shard=2)), program, Machine(H200, 8)).parts["products"]

    times = {recipe: products(recipe) for recipe in ("", *RECIPES)}
    assert times["tensorwise"] == times["delayed"] < times["rowwise"] == times["blockwise"] < times[""]

"""`colrow bench`: arms, what a trace says, and that a fast path which did not run is an error."""

from __future__ import annotations

import json
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.tensor import DTensor, Partial, Shard

from colrow.bench import beside_forecast
from colrow.bench.arms import ARMS, arm_config
from colrow.bench.beside_forecast import forecast_data
from colrow.bench.measure import Job, measure, missing_paths, one_rank
from colrow.bench.report import merged
from colrow.cli.bench import Flags, base_config
from colrow.config import RunConfig
from colrow.errors import ConfigError
from colrow.forecasting.devices import device_named
from colrow.ops.collectives import all_gather, reduce_scatter
from colrow.plans.plan import Plan
from colrow.run.process_group import RankInfo
from colrow.train.step_trace import StepTrace, from_events
from helpers.forked import Commands


def base(**flags: Any) -> RunConfig:
    return base_config(Flags(shape="laptop", seq_len=64, **flags))


@pytest.mark.parametrize("arm", ARMS)
def test_every_arm_is_a_config(arm: str) -> None:
    config = arm_config(base(tp=2), arm)
    assert config.mesh.tp == 2
    assert config.train.compile is (False if arm == "article" else None)


def test_an_arm_can_be_changed() -> None:
    config = arm_config(base(), "fast:train.compile=false:model.layers=3")
    assert (config.plan, config.train.compile, config.model.layers) == ("llama-fast", False, 3)


@pytest.mark.parametrize(
    ("arm", "text"), [("fst", "did you mean 'fast'"), ("fast:compile", "key=value"), ("fast:trai.compile=1", "no key")]
)
def test_a_wrong_arm_says_what_is_right(arm: str, text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        arm_config(base(), arm)


def test_flags_make_the_global_batch() -> None:
    config = base(tp=2, dp_shard=2, micro_batch=3, accumulate=4)
    assert config.train.global_batch == 24
    with pytest.raises(ConfigError, match="--shape"):
        base_config(Flags())


def event(name: str, ts: float, dur: float, cat: str = "kernel") -> dict[str, Any]:
    return {"ph": "X", "cat": cat, "name": name, "ts": ts, "dur": dur}


def test_only_what_nothing_hides_is_exposed() -> None:
    trace = from_events(
        [
            event("sm90_xmma_gemm", 0, 1000),
            event("ncclDevKernel_AllGather_RING_LL(ncclDevKernelArgsStorage<4096ul>)", 500, 1000),
            event("nccl:all_gather", 500, 1000, "gpu_user_annotation"),  # encloses the kernel: not counted
            event("Memcpy DtoD", 1400, 200, "gpu_memcpy"),
            event("Memcpy PtoP (Device -> Device)", 2500, 300, "gpu_memcpy"),  # a chunk, and nothing beside it
            event("colrow::send_copy_engine", 0, 5, "user_annotation"),
            event("colrow::send_copy_engine", 2500, 300, "gpu_user_annotation"),
            event("triton_poi_fused", 2000, 500),
            event("colrow::column_forward", 0, 5, "cpu_op"),
        ]
    )
    assert trace.span == pytest.approx(2.8)
    assert trace.busy == pytest.approx(2.4)
    assert trace.idle == pytest.approx(0.4)
    assert trace.communication == pytest.approx(1.3)
    assert trace.exposed == pytest.approx(0.7)
    assert trace.collectives == {"AllGather": 1, "Memcpy PtoP (Device -> Device)": 1}
    assert trace.operators == {"colrow::column_forward": 1, "colrow::send_copy_engine": 1}
    assert trace.kinds == pytest.approx({"product": 1.0, "communication": 1.3, "compiled pointwise": 0.5, "copy": 0.2})


def trace_of(operators: dict[str, int], names: tuple[str, ...] = (), kernels: int = 0) -> StepTrace:
    return StepTrace(None, None, None, None, {}, {}, operators, kernels, names)


RAN = {"colrow::column_forward": 4, "colrow::row_forward": 4, "linear_cross_entropy": 1}


@pytest.mark.parametrize("left_out", [None, *RAN])
def test_a_fast_path_that_did_not_run_is_seen(left_out: str | None) -> None:
    operators = {name: n for name, n in RAN.items() if name != left_out}
    missing = missing_paths(Plan.preset("llama-fast", "linear"), trace_of(operators), 2)
    assert bool(missing) == (left_out is not None), missing
    elsewhere = missing_paths(Plan.preset("llama-fast", "linear"), trace_of(operators), 2, loss=False)
    assert bool(elsewhere) == (left_out not in (None, "linear_cross_entropy")), elsewhere  # a pipeline's first stage


@pytest.mark.parametrize("sent", [None, "colrow::send_point_to_point", "colrow::send_copy_engine"])
def test_copy_engines_that_did_not_carry_are_seen(sent: str | None) -> None:
    operators = RAN | ({} if sent is None else {sent: 8})
    missing = missing_paths(Plan.preset("llama-overlap", "linear"), trace_of(operators), 2)
    assert bool(missing) == (sent != "colrow::send_copy_engine"), missing


def test_on_a_gpu_the_loss_must_run_its_kernels() -> None:
    plan = Plan.preset("llama-fast", "linear")
    assert missing_paths(plan, trace_of(RAN, ("gemm",), 9), 2)
    assert not missing_paths(plan, trace_of(RAN, ("gemm", "_loss_kernel"), 9), 2)


def test_products_that_were_not_in_8_bits_are_seen() -> None:
    plan = Plan.preset("llama-fast", "vocab_parallel").with_fp8("tensorwise")
    assert missing_paths(plan, trace_of(RAN, ("gemm",), 9), 2)
    assert not missing_paths(plan, trace_of({**RAN, "aten::_scaled_mm": 3}, ("gemm",), 9), 2)


def test_cuda_graphs_that_were_not_launched_are_seen() -> None:
    step = [event("gemm", 0, 1), event("cudaGraphLaunch", 0, 1, "cuda_runtime")]
    for events, launched in ((step, True), (step[:1], False)):
        missing = missing_paths(Plan.preset("llama"), from_events(events), 2, cuda_graph=True)
        assert bool(missing) != launched, missing
    assert not missing_paths(Plan.preset("llama"), from_events(step[:1]), 2)


def test_rounds_give_the_median() -> None:
    rounds = [[{"arm": "fast", "step_ms": ms}] for ms in (3.0, 1.0, 2.0)]
    assert merged(rounds) == [{"arm": "fast", "step_ms": 2.0, "rounds_step_ms": [3.0, 1.0, 2.0]}]


@pytest.mark.parametrize("arm", ["plain", "fast"])
def test_one_rank_of_four_is_measured_alone(arm: str) -> None:
    """All that a rank does, its collectives included: two gathers and two scatters a layer each way."""
    config = arm_config(base_config(Flags(shape="laptop", layers=1, tp=4, seq_len=32, device="cpu")), arm)
    result = measure(Job(arm=arm, config=config, warmup=1, steps=1, one_rank=True), RankInfo(0, 0, 4, 1))
    calls = result["trace"]["collectives"]
    gathers, scatters = (sum(n for name, n in calls.items() if kind in name) for kind in ("gather", "scatter"))
    assert result["one_rank"]
    assert "loss_last" not in result
    assert (gathers, scatters) == ((6, 6) if arm == "plain" else (7, 6)), calls
    assert result["tokens_per_second_per_gpu"] == pytest.approx(32 / result["step_ms"] * 1e3 / 4)


def test_what_a_rank_alone_receives_has_the_size_of_what_it_has() -> None:
    config = base(tp=4)
    with one_rank(config.model_copy(update={"device": "cpu"}), RankInfo(0, 0, 4, 1)) as (mesh, _):
        x, group = torch.randn(8, 3), mesh.get_group("tp")
        assert torch.equal(all_gather(x, group), x.repeat(4, 1))
        assert torch.equal(reduce_scatter(x, group), x[:2])
        partial = DTensor.from_local(x, mesh["tp"], [Partial()], run_check=False)
        assert torch.equal(partial.redistribute(placements=[Shard(0)]).to_local(), x[:2])


def test_one_rank_of_a_pipeline_is_refused() -> None:
    config = arm_config(base(tp=2), "fast:mesh.pp=2")
    with pytest.raises(ConfigError, match=r"--one-rank.*pp 1"):
        measure(Job(arm="fast", config=config, warmup=1, steps=1, one_rank=True), RankInfo(0, 0, 4, 1))


@pytest.mark.distributed
def test_the_command_measures_two_ranks_and_keeps_it_when_stopped(tmp_path: Path, commands: Commands) -> None:
    """The second arm would run for hours: a signal ends it, and what the first has given stays."""
    out = tmp_path / "bench.json"
    shape = ["--shape", "laptop", "--layers", "1", "--tp", "2", "--seq-len", "32", "--micro-batch", "2"]
    run = ["--device", "cpu", "--steps", "2", "--warmup", "1", "-o", str(out)]
    arms = ["--arms", "fast", "fast:train.global_batch=1000000"]
    bench = subprocess.Popen(
        ["python", "-u", "-m", "colrow", "bench", *shape, *run, *arms],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=commands.environment(),
    )
    assert bench.stdout is not None
    first = bench.stdout.readline()
    time.sleep(1.0)
    bench.send_signal(signal.SIGTERM)
    table, errors = bench.communicate(timeout=60)
    assert first.startswith("round 1: fast "), errors
    assert bench.returncode == 128 + signal.SIGTERM, errors
    assert "stopped; results of the arms before" in errors
    assert "profiler_start" not in errors  # of the first arm's trace
    assert "tok/s/GPU" in table
    tree = json.loads(out.read_text())
    (result,) = tree["results"]
    assert tree["environment"]["torch"]
    assert result["tokens_per_step"] == 64
    assert len(result["steps_ms"]) == 2
    assert result["tokens_per_second_per_gpu"] == pytest.approx(64 / result["step_ms"] * 1e3 / 2)
    assert result["trace"]["operators"]["colrow::row_forward"] == 2
    assert result["loss_first"] == pytest.approx(8.3, abs=0.5)  # log 4096, and what the logits differ by at the start


@pytest.mark.exhaustive
def test_an_arm_stands_beside_its_forecast(config: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch) -> None:
    small = config(**{"train.compile": False})
    assert set(forecast_data(small).values()) == {None}  # a CPU
    monkeypatch.setattr(beside_forecast, "gpus_here", lambda _: (device_named("h200"), 8))
    found = forecast_data(config(**{"train.compile": False, "train.micro_batch": 2}))
    assert found["forecast_ms"] > found["forecast_exposed_ms"] > 0
    assert found["forecast_allocated_gib"] > 0
    assert set(forecast_data(config(plan="derive")).values()) == {None}

"""The CPU's rates are those by which the forecast of an arm takes the time that the arm took."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from colrow.bench import cpu_rates as room
from colrow.bench.cpu_rates import SMALL, cpu_rates
from colrow.bench.measure import Job
from colrow.bench.run_arm import ArmError
from colrow.forecasting.devices import device_named
from colrow.forecasting.memory import Setting, StageLayers
from colrow.forecasting.timing import Program, cpu_rate, cpu_seconds, fsdp_units
from colrow.forecasting.work import Work
from colrow.mesh import Mesh

MEASURED = {"launch": 1e-5, "peer_copy": 1e11}
STEP_MS = 40.0


class Arms:
    """Stands in for `run_arm`: every arm takes `STEP_MS`."""

    def __init__(self, idle: float = STEP_MS / 2, failing: str = "") -> None:
        self.idle, self.failing, self.jobs = idle, failing, dict[str, Job]()

    def __call__(self, job: Job) -> dict[str, Any]:
        if self.failing and job.arm.startswith(self.failing):
            raise ArmError("no peer memory")
        self.jobs[job.arm] = job
        return {"step_ms": STEP_MS, "trace": {"idle": self.idle}}


def rates_of(monkeypatch: pytest.MonkeyPatch, arms: Arms, ranks: int = 2, **measured: float) -> tuple[dict, list[str]]:
    said: list[str] = []
    monkeypatch.setattr(room, "run_arm", arms)
    return cpu_rates(ranks, "cuda", MEASURED | measured, SMALL, said.append), said


@pytest.mark.exhaustive
def test_every_program_has_its_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    arms = Arms()
    found, said = rates_of(monkeypatch, arms)
    assert list(found) == ["operator", "kernel", "kernel_fast", "kernel_chunked", "fsdp_unit"]
    assert not said
    assert [(job.config.mesh.tp, job.config.mesh.dp_shard, job.config.plan) for job in arms.jobs.values()] == [
        (2, 1, "llama"), (2, 1, "llama"), (2, 1, "llama-fast"), (2, 1, "llama-overlap"), (1, 2, "llama"),
    ]  # fmt: skip
    # fast styles launch fewer kernels in the same time
    assert 0 < found["operator"] < found["kernel"] < found["kernel_fast"] < STEP_MS / 1e3


def test_what_cannot_be_measured_is_left_out_and_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "_rate", lambda config, step, launch, kernel: step)
    assert rates_of(monkeypatch, Arms()) == (dict.fromkeys(room.ARMS, STEP_MS / 1e3), [])
    assert list(rates_of(monkeypatch, Arms(), ranks=1)[0]) == ["operator", "kernel"]
    assert "kernel_chunked" not in rates_of(monkeypatch, Arms(), peer_copy=0.0)[0]
    found, said = rates_of(monkeypatch, Arms(failing="fast"))
    assert list(found) == ["operator", "kernel", "kernel_chunked", "fsdp_unit"]
    assert said == ["kernel_fast is left out: arm fast:train.compile=true failed: no peer memory"]
    found, said = rates_of(monkeypatch, Arms(failing="plain"))
    assert list(found) == ["kernel_fast", "kernel_chunked"]
    assert said[-1] == "fsdp_unit is left out: it needs kernel"
    found, said = rates_of(monkeypatch, Arms(idle=1.0))
    assert not found
    assert said[0] == "operator is left out: the GPU sets the pace of arm plain:train.compile=false"


@pytest.mark.parametrize("compiled", [True, False])
def test_a_rate_gives_the_step_that_it_was_measured_by(compiled: bool) -> None:
    inside, outside = Work(kernels=300, operators=900), Work(kernels=20, operators=70)
    program = Program(compiled=compiled)
    rates = replace(device_named("h200").rates, launch=1e-5)
    rate = cpu_rate(0.04, inside, outside, compiled=compiled, launch=rates.launch)
    measured = replace(rates, **{"kernel" if compiled else "operator": rate})
    assert cpu_seconds(inside, outside, program, measured) == pytest.approx(0.04)
    assert cpu_seconds(inside, outside, program, rates) != pytest.approx(0.04)


@pytest.mark.exhaustive
def test_two_ranks_of_this_host_have_rates() -> None:
    said: list[str] = []
    found = cpu_rates(2, "cpu", MEASURED, SMALL, said.append)
    assert list(found) == ["operator", "kernel", "kernel_fast", "fsdp_unit"]
    assert found.pop("fsdp_unit") < 0.1  # 0 where this host takes no longer for it
    assert all(1e-6 < rate < 0.1 for rate in found.values()), found
    assert len(said) == 1
    assert "copy_engine needs GPUs" in said[0]


def test_units_of_fsdp2_take_time_of_the_cpu_and_those_of_the_flat_engine_none() -> None:
    stage = StageLayers(("a", "a", "b"), first=True, last=True, in_flight=1)
    units = [
        fsdp_units(Setting(mesh, 1, (stage.layers,)), stage)
        for mesh in (Mesh(dp_shard=2), Mesh(dp_replicate=2), Mesh(dp_shard=2, data_engine="flat"), Mesh(tp=2))
    ]
    assert units == [5, 5, 0, 0]
    assert fsdp_units(Setting(Mesh(dp_shard=2), 1, (stage.layers,)), replace(stage, first=False, last=False)) == 3

"""`fp8: delayed` over steps of a model: scales by the last step's peaks, whatever else reads or recomputes between."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

import colrow
from colrow.config import RunConfig
from colrow.errors import ConfigError
from colrow.models.llama import Llama
from colrow.ops.execution_record import clear, recorded
from colrow.ops.kernels.rounding import HEADROOM
from colrow.parallel.activation_checkpoint import Mode, apply_activation_checkpoint
from colrow.parallel.compile import compile_forward
from colrow.parallel.loss import model_loss
from colrow.plans.plan import Plan
from colrow.sharding.layout import local_tensor
from colrow.styles.fast.linear import HISTORY
from helpers.harness import Ranks
from helpers.parity import TINY, tp_mesh
from helpers.runs import a_run, figures, train, write_text

pytestmark = pytest.mark.distributed
CONFIG = replace(TINY, hidden_size=64, intermediate_size=128, num_attention_heads=4, head_dim=16)
PLAN = Plan.preset("llama-fast", "linear")
GROWTH = 40.0  # of a parameter between two steps: numbers are cut off by the last step's scales


class Trained:
    """Two ranks of tp, in fp32."""

    def __init__(self, device: str, recipe: str, recompute: Mode = "none", backend: str = "") -> None:
        torch.manual_seed(0)
        self.device, self.plan, self.mesh = device, PLAN.with_fp8(recipe), tp_mesh(device, 2)  # type: ignore[arg-type]
        self.model = colrow.parallelize(Llama(CONFIG).to(device), self.plan, self.mesh)
        apply_activation_checkpoint(self.model.layers, recompute)
        for block in self.model.layers if backend else ():
            compile_forward(block, backend)
        self.peaks = colrow.PeakHistory([self.model])

    def loss(self, seed: int) -> Tensor:
        ids = torch.randint(64, (2, 33), generator=torch.Generator().manual_seed(seed)).to(self.device)
        return model_loss(self.model, self.plan, self.mesh, ids[:, :-1], ids[:, 1:])

    def step(self, *seeds: int) -> list[Tensor]:
        """Loss and this rank's gradients of a step of so many micro-batches; nothing is updated."""
        self.model.zero_grad()
        with self.peaks.step():
            losses = [self.loss(seed) for seed in seeds]
            for loss in losses:
                loss.backward()
        params = self.model.parameters()
        return [loss.detach() for loss in losses] + [local_tensor(p.grad).clone() for p in params if p.grad is not None]

    def grow(self) -> None:
        """Other numbers than in the last step."""
        with torch.no_grad():
            for layer in self.model.layers:
                local_tensor(layer.input_layernorm.weight).mul_(GROWTH)
                local_tensor(layer.mlp.up_proj.weight).mul_(GROWTH)

    def histories(self) -> Tensor:
        return torch.stack(list(histories(self.model)))[..., :2].clone()


def histories(model: nn.Module) -> Iterator[Tensor]:
    for module in model.modules():
        if (row := module.__dict__.get(HISTORY)) is not None:
            yield row


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(map(torch.equal, a, b))


def steps_of(device: str) -> dict[str, object]:
    """What each way of running two steps gives, against the plain one."""
    clear()
    found: dict[str, object] = {}
    plain, own = Trained(device, "delayed"), Trained(device, "tensorwise")
    found["the first step has its own scales"] = same(plain.step(1, 2), own.step(1, 2))
    first = plain.histories()
    found["every peak is known"] = bool((first[..., 0] > 0).all()) and len(first) == 4 * CONFIG.num_hidden_layers
    plain.grow()
    own.grow()
    want, fresh = plain.step(3, 4), own.step(3, 4)
    found["the second step has others"] = not same(want, fresh)
    second = plain.histories()
    found["nothing is infinite"] = all(bool(x.isfinite().all()) for x in want)
    found["recorded"] = recorded("fp8")

    alone = []
    for seed in (3, 4):
        model = Trained(device, "delayed")
        model.grow()
        model.step(seed)
        alone.append(model.histories()[..., 0])
    # the input of the first linear depends on no scale: its peak is the larger of the micro-batches'
    found["micro-batches share a peak"] = torch.equal(second[0, 0, 0], torch.maximum(*alone)[0, 0])

    evaluated = Trained(device, "delayed")
    evaluated.step(1, 2)
    evaluated.grow()
    with torch.no_grad():
        evaluated.loss(7)
    found["an evaluation changes nothing"] = same(evaluated.step(3, 4), want)

    weight = local_tensor(plain.model.layers[0].mlp.up_proj.weight)
    with torch.no_grad():
        weight[0, 0] = torch.nan
    broken = plain.step(5)
    found["NaN is seen"] = not broken[0].isfinite()
    found["the last finite peaks stay"] = bool(plain.histories()[..., 0].isfinite().all())
    return found


def other_ways(device: str) -> dict[str, object]:
    """The second step, recomputed and compiled, against the plain one."""
    results = {}
    ways: dict[str, tuple[Mode, str]] = {"plain": ("none", ""), "selective": ("selective", ""), "full": ("full", "")}
    for way, (recompute, backend) in {**ways, "compiled": ("none", "aot_eager")}.items():
        model = Trained(device, "delayed", recompute, backend)
        model.step(1, 2)
        model.grow()
        results[way] = [*model.step(3, 4), model.histories()]
    want, compiled = results["plain"], results.pop("compiled")
    found: dict[str, object] = {way: same(got, want) for way, got in results.items()}
    found["compiled"] = max(((a - b).norm() / b.norm()).item() for a, b in zip(compiled, want, strict=True))
    return found


def test_scales_are_those_of_the_last_step(ranks: Ranks) -> None:
    for found in ranks(2).run(steps_of):
        assert found.pop("recorded") == ["delayed", "gathers", "tensorwise"]
        assert all(found.values()), found


@pytest.mark.exhaustive
def test_recomputation_and_compiled_blocks_round_alike(ranks: Ranks) -> None:
    for found in ranks(2).run(other_ways):
        assert found.pop("compiled") < 1e-4
        assert all(found.values()), found


def nobody_turns_steps(device: str) -> str:
    torch.manual_seed(0)
    plan, mesh = PLAN.with_fp8("delayed"), tp_mesh(device, 2)
    model = colrow.parallelize(Llama(CONFIG).to(device), plan, mesh)
    ids = torch.randint(64, (2, 33), device=device)
    loss = model_loss(model, plan, mesh, ids[:, :-1], ids[:, 1:])
    try:
        loss.backward()
    except ConfigError as error:
        return str(error)
    return ""


def test_a_loop_that_turns_no_steps_is_told(ranks: Ranks) -> None:
    assert all("colrow.PeakHistory" in text for text in ranks(2).run(nobody_turns_steps))


def run_cut_off(device: str, config: RunConfig, stop_after: int | None = None) -> Any:
    """A run whose scales show: a step that takes those of the last one cuts off all but the small numbers. Otherwise
    powers of two differ in what the smallest numbers become, and in nothing else."""
    with mock.patch.dict(HEADROOM, dict.fromkeys(HEADROOM, 2.0**-6)):
        return train(device, config, stop_after)


@pytest.mark.exhaustive
def test_a_run_that_continues_takes_its_own_scales_for_a_step(ranks: Ranks, tmp_path: Path) -> None:
    """With evaluations and repeated steps between."""
    write_text(tmp_path)

    def config(name: str, recipe: str) -> RunConfig:
        keys = {"steps": 6, "fp8": recipe, "compile": False, "replay_every": 2, "global_batch": 4, "micro_batch": 2}
        sections: dict[str, Any] = {"mesh": {"tp": 2}, "eval": {"every": 2, "batches": 1}, "train": keys}
        return a_run(tmp_path, name, plan="llama-fast", loss="linear", **sections)

    group = ranks(2)
    group.run(run_cut_off, config("whole", "delayed"))
    group.run(run_cut_off, config("own", "tensorwise"))
    for name in ("parts", "own parts"):
        group.run(run_cut_off, config(name, "delayed"), 3)
    group.run(run_cut_off, config("parts", "delayed"))
    group.run(run_cut_off, config("own parts", "tensorwise"))
    names = ("whole", "own", "parts", "own parts")
    whole, own, parts, own_parts = (figures(tmp_path / name / "metrics.jsonl") for name in names)
    assert [record["step"] for record in parts] == [1, 2, 3, 4, 5, 6]
    assert whole[0] == own[0]
    assert whole[1]["grad_norm"] != pytest.approx(own[1]["grad_norm"], rel=1e-2)
    assert parts[:3] == whole[:3]
    assert (parts[3]["loss"], parts[3]["grad_norm"]) == (own_parts[3]["loss"], own_parts[3]["grad_norm"])
    assert parts[4]["grad_norm"] != pytest.approx(own_parts[4]["grad_norm"], rel=1e-2)

"""Verify judges what training does: train mode, buffers, auxiliary losses, the user's own inputs and loss."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from colrow.checking.check import check
from colrow.cli import main
from colrow.derive.derivation import derive
from colrow.dryrun import paired_runs
from colrow.dryrun.calls import Inputs, default_loss, example_inputs
from colrow.errors import PlanError
from colrow.mesh import Mesh
from colrow.plans.plan import Plan
from colrow.verifying.report import Report
from colrow.verifying.step import Task
from colrow.verifying.verify import verify
from helpers import broken_models as m
from helpers.broken_plans import gpt_plan
from helpers.unproven_plans import OLD_TORCH


def judged(model: nn.Module, plan: Plan, backend: Any = "local", **options: Any) -> Report:
    return verify(model, plan, 2, backend=backend, **options)


class Normalised(m.MLP):
    """Divides by a norm over the features, which a shard has not: in one mode alone."""

    def __init__(self, mode: bool) -> None:
        super().__init__()
        self.mode = mode

    def forward(self, x: Tensor) -> Tensor:
        h = F.gelu(self.up(x))
        return self.down(h / h.norm(dim=-1, keepdim=True) if self.training is self.mode else h)


@pytest.mark.parametrize("mode", [pytest.param(True, marks=pytest.mark.exhaustive), False])
def test_both_modes_are_judged(mode: bool) -> None:
    wrong = judged(m.Gpt(mlp=lambda: Normalised(mode), layers=1), gpt_plan())
    assert wrong.verdict == "wrong"
    assert wrong.modes == ("train", "eval")
    assert wrong.max_grad_rel_err > 1e-3


def test_a_model_that_computes_the_same_in_both_modes_is_judged_once() -> None:
    assert judged(m.Gpt(layers=1), gpt_plan()).modes == ("train",)


class Dropping(m.MLP):
    """Dropout as a module, as a function, and in attention."""

    def __init__(self) -> None:
        super().__init__(dropout=0.5)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.dropout(x, 0.5, self.training))


@pytest.mark.parametrize(
    "backend", ["local", pytest.param("gloo", marks=(pytest.mark.distributed, pytest.mark.exhaustive))]
)
@pytest.mark.parametrize("sequence", [pytest.param(False, marks=pytest.mark.exhaustive), True])
def test_dropout_is_that_of_the_unsharded_model(sequence: bool, backend: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    of_attention = 0.0 if OLD_TORCH else 0.3  # torch 2.11 cannot follow the heads through attention written out
    model = m.Gpt(lambda: m.Attention("heads", dropout=of_attention), Dropping, layers=1)
    report = judged(model, gpt_plan(sequence=sequence), backend)
    assert report.ok, report
    assert report.modes == ("train", "eval")
    assert not report.dropout_off
    assert report.max_grad_rel_err < 1e-12
    assert [mod.p for mod in model.modules() if isinstance(mod, nn.Dropout)] == [0.5], "the user's model is as it was"
    if backend == "local":  # the negative control: each rank draws for its shard alone
        monkeypatch.setattr("colrow.verifying.step.arrange_draws", lambda *_: None)
        assert judged(model, gpt_plan(sequence=sequence), backend).verdict == "wrong"


class NoisyAndDropping(Dropping):
    def forward(self, x: Tensor) -> Tensor:
        h = F.gelu(self.up(x))
        return self.down(self.drop(h) + 0.0 * torch.poisson(h.exp()))


class TimeFirst(nn.Module):
    """Attention [T, B, D] in a model [B, T, D], and dropout of what it gives, which lies in memory as [T, B, D]."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.attention, self.drop = nn.LayerNorm(16), Permuted(), nn.Dropout(0.5)
        self.head = nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(x + self.drop(self.attention(x)[0])))


class Permuted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.MultiheadAttention(16, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = x.transpose(0, 1)
        y, weights = self.inner(x, x, x)
        return y.transpose(0, 1), weights


def test_dropout_of_a_permuted_tensor_is_that_of_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model, inputs = TimeFirst().double(), (torch.randn(3, 6, 16, dtype=torch.float64),)
    plan = derive(model, 2, inputs=inputs).plan()
    assert "attention.inner" in plan.modules
    assert judged(model, plan, inputs=inputs).verdict == "proved"
    monkeypatch.setattr(paired_runs, "memory_order", lambda shape, stride: None)
    assert judged(model, plan, inputs=inputs).verdict == "wrong"


def test_dropout_beside_other_random_numbers_on_a_shard_is_off_and_said() -> None:
    report = judged(m.Gpt(mlp=NoisyAndDropping, layers=1), gpt_plan())
    assert report.ok, report
    assert report.dropout_off
    assert report.to_data()["dropout_off"] is True
    assert not judged(m.Gpt(layers=1), gpt_plan()).dropout_off


@pytest.mark.parametrize(
    ("block", "backend"),
    [
        (m.AveragingBlock, "local"),
        pytest.param(m.AveragingBlock, "gloo", marks=[pytest.mark.distributed, pytest.mark.exhaustive]),
        (m.BatchNormBlock, "local"),
        pytest.param(m.BatchNormBlock, "gloo", marks=[pytest.mark.distributed, pytest.mark.exhaustive]),
    ],
)
def test_buffers_that_forward_writes_are_compared(block: Any, backend: Any) -> None:
    right = judged(m.Gpt(block=block, layers=1), gpt_plan(), backend)
    assert right.ok, right
    assert right.max_buffer_rel_err < 1e-12
    styles = {"bn": "grad_sum"} if block is m.BatchNormBlock else {}
    wrong = judged(m.Gpt(block=block, layers=1), gpt_plan(sequence=True, **styles), backend)
    assert wrong.verdict == "wrong"
    assert wrong.max_buffer_rel_err > 0.01
    if block is m.AveragingBlock:  # nothing else is wrong
        assert wrong.max_grad_rel_err < 1e-12
        assert "average" in wrong.cause


class KeptScale(m.MLP):
    """Divides its features by their size in the forward before, or by the number of forwards."""

    def __init__(self, counts: bool) -> None:
        super().__init__()
        self.counts, self.kept = counts, 1.0

    def forward(self, x: Tensor) -> Tensor:
        h = F.gelu(self.up(x))
        y: Tensor = self.down(h / self.kept)
        self.kept = self.kept + 1 if self.counts else 0.5 + h.detach().abs().mean()
        return y


def test_what_an_attribute_keeps_for_the_next_forward_is_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    assert judged(m.Gpt(mlp=lambda: KeptScale(counts=True), layers=1), gpt_plan()).ok
    of_a_shard = m.Gpt(mlp=lambda: KeptScale(counts=False), layers=1)
    wrong = judged(of_a_shard, gpt_plan())
    assert wrong.verdict == "wrong"
    assert wrong.next_loss_rel_err > 1e-6
    assert wrong.max_step_rel_err < 1e-12
    assert "attribute" in wrong.cause
    # the negative control: one step does not show it
    monkeypatch.setattr("colrow.verifying.verify.Task", partial(Task, next_forward=False))
    assert judged(of_a_shard, gpt_plan()).ok


class Noisy(m.MLP):
    """Adds noise in training, to the complete input and to a shard, and draws a mask by a shard's values; or draws
    numbers of which a shard's values decide how many the generator gives."""

    def __init__(self, poisson: bool) -> None:
        super().__init__()
        self.poisson = poisson

    def forward(self, x: Tensor) -> Tensor:
        h = F.gelu(self.up(x + 0.1 * torch.empty_like(x).exponential_()))
        if self.poisson:
            return self.down(h * torch.poisson(h.exp()))
        return self.down((h + 0.1 * torch.empty_like(h).exponential_()) * torch.bernoulli(h.sigmoid()))


@pytest.mark.parametrize(
    "backend", ["local", pytest.param("gloo", marks=[pytest.mark.distributed, pytest.mark.exhaustive])]
)
def test_random_numbers_are_those_of_one_process_unless_a_shards_values_say_how_many(backend: str) -> None:
    assert judged(m.Gpt(mlp=lambda: Noisy(False), layers=1), gpt_plan(), backend).ok
    assert judged(m.Gpt(mlp=lambda: Noisy(True), layers=1), gpt_plan(), backend).verdict == "wrong"


@dataclass
class Output:
    logits: Tensor
    extra: Tensor | None = None


class Auxiliary(m.Gpt):
    """Returns a loss beside its logits: of complete hidden states, or of a rank's features."""

    def __init__(self, form: str, local: bool = False) -> None:
        super().__init__(layers=1)
        self.form, self.local = form, local

    def forward(self, ids: Tensor) -> Any:
        x = self.blocks[0](self.embed(ids))
        first: Any = self.blocks[0].mlp
        extra = (first.up(x) if self.local else x).square().mean()
        logits = self.head(self.norm(x))
        if self.form == "tuple":
            return logits, (extra,)
        return {"logits": logits, "extra": extra} if self.form == "dict" else Output(logits, extra)


@pytest.mark.parametrize(
    "form", ["tuple", *(pytest.param(form, marks=pytest.mark.exhaustive) for form in ("dict", "dataclass"))]
)
def test_auxiliary_losses_count(form: str) -> None:
    right = judged(Auxiliary(form), gpt_plan())
    assert right.ok, right
    wrong = judged(Auxiliary(form, local=True), gpt_plan())
    assert wrong.verdict == "wrong"
    assert [f.code for f in check(Auxiliary(form), gpt_plan(), Mesh(tp=2), seq_len=16) if f.severity == "error"] == []


def test_the_default_loss_has_the_auxiliary_losses_gradient() -> None:
    logits, extra = torch.randn(1, 4, 3, requires_grad=True), torch.tensor(2.0, requires_grad=True)
    ids = torch.zeros(1, 4, dtype=torch.long)
    default_loss({"extra": extra, "logits": logits}, (ids,)).backward()
    assert extra.grad is not None
    assert extra.grad == 1
    assert torch.equal(
        default_loss(logits, {"mask": torch.ones(1, 4).long(), "input_ids": ids}), default_loss(logits, (ids,))
    )


class TwoInputs(nn.Module):
    """Takes features and a gate, by position or by name."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp = m.MLP()

    def forward(self, x: Tensor, gate: Tensor) -> dict[str, Tensor]:
        return {"y": self.mlp(x) * gate.sigmoid()}


def squared(output: dict[str, Tensor], inputs: Any) -> Tensor:
    x = inputs["x"] if isinstance(inputs, dict) else inputs[0]
    return (output["y"] - x).square().sum()


MLP_PLAN = Plan({"mlp.up": "colwise", "mlp.down": "rowwise"})
PAIR = {"x": torch.randn(2, 6, m.D), "gate": torch.randn(2, 6, m.D)}


@pytest.mark.parametrize(
    "backend", ["local", pytest.param("gloo", marks=[pytest.mark.distributed, pytest.mark.exhaustive])]
)
@pytest.mark.parametrize("inputs", [PAIR, {"gate": PAIR["gate"], "x": PAIR["x"]}, tuple(PAIR.values())])
def test_inputs_and_loss_of_the_user(inputs: Any, backend: Any) -> None:
    report = judged(TwoInputs(), MLP_PLAN, backend, inputs=inputs, loss=squared)
    assert report.ok, report
    assert [str(f) for f in check(TwoInputs(), MLP_PLAN, Mesh(tp=2), inputs=inputs, loss=squared)] == []
    broken = Plan({"mlp.up": "colwise", "mlp.down": {"style": "rowwise", "output": "partial"}})
    assert judged(TwoInputs(), broken, backend, inputs=inputs, loss=squared).verdict == "wrong"


def test_derive_takes_inputs_by_name() -> None:
    inputs = {"gate": torch.randn(3, 34, m.D), "x": torch.randn(3, 34, m.D)}
    plan = derive(TwoInputs(), 2, inputs=inputs).plan()
    assert judged(TwoInputs(), plan, inputs=inputs).ok
    assert any(layout.placement.is_shard() for layout in plan.parameters(TwoInputs(), 2).values())


def test_what_a_model_takes_is_not_guessed() -> None:
    for judge in (judged, lambda model, plan: derive(model, 2)):
        with pytest.raises(PlanError, match=r"TwoInputs takes x, gate: pass example inputs with inputs="):
            judge(TwoInputs(), MLP_PLAN)
    found = check(TwoInputs(), MLP_PLAN, Mesh(tp=2))
    assert any("takes x, gate" in f.message for f in found)


class Named(nn.Module):
    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> Tensor:
        return x


class Pixels(Named):
    def forward(self, pixel_values: Tensor) -> Tensor:
        return pixel_values


class States(Named):
    def forward(self, hidden_states: Tensor, scale: float = 1.0) -> Tensor:
        return hidden_states * scale


@pytest.mark.parametrize(
    ("model", "shape", "floating"),
    [
        (m.Gpt(), (2, 8), False),
        (Named(nn.Linear(5, 6)), (2, 8, 5), True),
        (Named(nn.Conv2d(3, 4, 2), nn.Embedding(7, 4)), (2, 3, 32, 32), True),
        (Pixels(nn.Linear(5, 6)), (2, 3, 32, 32), True),
        (Named(nn.Conv1d(4, 6, 3), nn.Linear(6, 6)), (2, 4, 8), True),
        (States(nn.Embedding(7, 4), nn.Linear(5, 6)), (2, 8, 5), True),
        (Named(nn.Linear(5, 6), nn.Embedding(7, 4)), (2, 8), False),
    ],
)
def test_the_model_says_what_it_takes(model: nn.Module, shape: tuple[int, ...], floating: bool) -> None:
    (x,) = example_inputs(model, 2, 8)
    assert tuple(x.shape) == shape
    assert x.is_floating_point() is floating


def test_the_size_of_pixels_stands_in_the_config() -> None:
    model = Pixels(nn.Conv2d(1, 4, 2))
    model.config = type("Config", (), {"image_size": 8, "num_channels": 1})()  # type: ignore[assignment]
    assert tuple(example_inputs(model, 2, 8)[0].shape) == (2, 1, 8, 8)


def test_token_ids_of_a_large_model_fit_the_reduced_one() -> None:
    inputs = Inputs.of({"ids": torch.tensor([[1, 99]]), "x": torch.ones(1)}).within(64)
    assert inputs.given["ids"].tolist() == [[1, 35]]
    assert inputs.names == ("ids", "x")


def pair() -> dict[str, Tensor]:
    return PAIR


def test_inputs_on_the_command_line(tmp_path: Any, capsys: pytest.CaptureFixture[str]) -> None:
    plan = tmp_path / "plan.yaml"
    MLP_PLAN.save(plan)
    model = ["verifying.test_training_conditions:TwoInputs", "--tp", "2", "--plan", str(plan)]
    here = ["--inputs", "verifying.test_training_conditions:pair"]
    assert main(["verify", *model, *here, "--backend", "local"]) == 0
    assert "in train mode" in capsys.readouterr().out
    assert main(["check", *model, *here]) == 0
    assert main(["verify", *model]) == 2
    assert main(["check", *model, "--inputs", "verifying.test_training_conditions:no"]) == 2


class OwnNoise(m.MLP):
    def forward(self, x: Tensor) -> Tensor:
        h = self.up(x)
        return self.down(h * torch.rand(h.shape, generator=torch.Generator().manual_seed(0)))


@pytest.mark.exhaustive  # a rare generator; simulated ranks draw from one, one after another
def test_noise_of_a_generator_of_the_models_own_is_drawn_for_shards() -> None:
    assert judged(m.Gpt(mlp=OwnNoise, layers=1), gpt_plan(), backend="gloo").ok

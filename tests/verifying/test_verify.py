"""Verify: sound plans agree with one process, broken ones do not, and the report says what it usually is."""

from __future__ import annotations

import multiprocessing
import socket
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from colrow.checking.check import check
from colrow.dryrun.reduced_model import reduced_model, shrink_heads, shrink_width
from colrow.errors import PlanError
from colrow.mesh import Mesh
from colrow.models.llama import Llama
from colrow.models.shapes import SHAPES
from colrow.plans.plan import Plan
from colrow.run.decision import decide
from colrow.verifying.comparison import Reference
from colrow.verifying.report import Report
from colrow.verifying.verify import verify
from helpers import broken_models as m
from helpers.broken_plans import gpt_plan, preset
from helpers.parity import MODELS
from helpers.variants import params


def build(name: str = "gqa") -> nn.Module:
    return Llama(replace(MODELS[name], num_hidden_layers=1))


def local(model: nn.Module, plan: Plan, tp: int = 2, **options: Any) -> Report:
    return verify(model, plan, tp, backend="local", **options)


@pytest.mark.parametrize("name", params(["gqa", "kv3", "tied", "bias", "qk_norm"], lambda name: name != "tied"))
def test_the_llama_preset_holds(name: str) -> None:
    report = local(build(name), preset(), tp=4)
    assert report.ok, report
    assert report.max_grad_rel_err < 1e-12
    assert report.max_step_rel_err < 1e-12
    assert report.parameters == len(list(build(name).named_parameters()))
    assert report.control is not None
    assert report.control.rel_err > 0.01


@pytest.mark.parametrize("sequence", [False, True])
def test_a_module_of_ones_own_holds(sequence: bool) -> None:
    report = local(m.Gpt(layers=2), gpt_plan("vocab_parallel", sequence=sequence))
    assert report.ok, report


def test_a_fused_weight_split_by_segments_is_proved() -> None:
    plan = gpt_plan(attn__qkv={"style": "packed_colwise", "segments": [m.D] * 3, "input": "replicate"})
    assert local(m.Gpt(lambda: m.Attention("parts")), plan).ok


@pytest.mark.parametrize(
    ("model", "plan", "worst", "cause"),
    [
        (lambda: build(), lambda: preset(drop="layers.*.input_layernorm"), "input_layernorm", "ranks differ"),
        (lambda: build("qk_norm"), lambda: preset(drop="layers.*.self_attn.q_norm"), "q_norm", "grad_sum"),
        (lambda: build("qk_norm"), lambda: preset("article", self_attn__k_norm="grad_sum"), "k_norm", "too large"),
        (lambda: m.Gpt(lambda: m.Attention("parts")), gpt_plan, "blocks", "fused weight"),
        (lambda: m.Gpt(m.HeadCount), lambda: gpt_plan(attn__qkv=None, attn__q="colwise", attn__k="colwise",
                                                      attn__v="colwise"), "blocks", "head count"),
    ],
)  # fmt: skip
def test_a_broken_plan_is_seen(model: Any, plan: Any, worst: str, cause: str) -> None:
    report = local(model(), plan())
    assert not report.ok
    assert report.max_grad_rel_err > 0.01
    assert worst in report.worst[0].name
    assert cause in report.cause


def test_an_exception_of_the_sharded_model_is_reported() -> None:
    report = local(build(), preset(drop="layers.*.self_attn.q_proj"))
    assert not report.ok
    assert "DTensor" in report.failure
    assert not torch.distributed.is_initialized()
    assert local(m.Gpt(), gpt_plan()).ok  # nothing is left behind


@pytest.mark.distributed
@pytest.mark.parametrize("name", ["llama", "llama-overlap"])
def test_processes_agree_with_the_simulation(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Copy engines, which CPUs have not, are stood in for by the process group. No other process can take the ranks'
    port: somebody listens on it before the first of them starts."""
    process = multiprocessing.get_context("forkserver").Process
    start, ports = process.start, []

    def start_if_taken(self: Any) -> None:
        ports.append(self._args[2])
        with socket.socket() as other, pytest.raises(OSError, match="in use"):
            other.bind(("127.0.0.1", ports[-1]))
        start(self)

    monkeypatch.setattr(process, "start", start_if_taken)
    report = verify(build("kv3"), Plan.preset(name, "linear"), 2, backend="gloo")
    assert report.ok, report
    assert report.backend == "gloo"
    assert report.max_grad_rel_err < 1e-12
    assert ports


def test_a_big_model_is_reduced() -> None:
    with torch.device("meta"):
        model = Llama(SHAPES["llama3-8b"])
    small, changes = reduced_model(model, 8)
    assert changes is not None
    assert "num_hidden_layers 32 → 2" in changes
    assert {type(mod) for mod in small.modules()} == {type(mod) for mod in model.modules()}
    assert small.config.num_attention_heads % 8 == small.config.num_key_value_heads % 8 == 0
    assert sum(p.numel() for p in small.parameters()) < 1_000_000


@pytest.mark.parametrize(
    ("query", "kv", "tp"), [(32, 8, 8), (32, 8, 4), (12, 3, 4), (64, 8, 16), (48, 48, 8), (6, 2, 4)]
)
def test_the_reduced_models_heads_divide_alike(query: int, kv: int, tp: int) -> None:
    small_query, small_kv = shrink_heads(query, kv, tp)
    assert (small_query % tp == 0, small_kv % tp == 0) == (query % tp == 0, kv % tp == 0)
    assert small_query * kv == query * small_kv


@pytest.mark.parametrize(("extent", "tp"), [(14336, 8), (11008, 6), (50257, 4), (30, 4)])
def test_the_reduced_models_widths_divide_alike(extent: int, tp: int) -> None:
    assert shrink_width(extent, tp, 12 * tp) % tp == extent % tp


def test_what_cannot_be_shrunk_is_refused() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Embedding(100_000, 4096), nn.Linear(4096, 100_000))
    with pytest.raises(PlanError, match="pass a function that builds a smaller one"):
        verify(model, Plan({}), 2)


class OnlySingle(nn.Module):
    """An operation that knows no fp64, as grouped products of experts do."""

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype == torch.float64:
            raise RuntimeError("Expected mat_a to be Float32, got Double")
        return x


class SingleMLP(m.MLP):
    def __init__(self) -> None:
        super().__init__()
        self.only = OnlySingle()

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.only(x))


def test_what_knows_no_fp64_is_verified_in_fp32() -> None:
    report = local(m.Gpt(mlp=SingleMLP), gpt_plan())
    assert report.ok, report
    assert report.tolerance == 1e-5
    assert 1e-12 < report.max_grad_rel_err < 1e-5
    with pytest.raises(PlanError, match=r"Gpt itself does not run on the CPU, .*: pass inputs="):
        local(m.Gpt(), gpt_plan(), inputs=(torch.zeros(2, 16),))


def test_noise_of_a_zero_gradient_is_measured_by_the_largest_one() -> None:
    gradients = {"weight": torch.tensor([-2.0]), "bias": torch.tensor([1e-10])}
    for rounds, size in ((False, 2e-5), (True, 2e-3)):
        reference = Reference(0.0, gradients, {}, rounds=rounds)
        assert (reference.size("weight"), reference.size("bias")) == (2.0, size)


@pytest.mark.exhaustive
def test_the_bias_of_keys_of_a_model_that_rounds_to_fp32_is_right() -> None:
    """Its gradient is zero but for rounding, which is not the same where ranks add up in another order."""
    from transformers import XGLMConfig, XGLMForCausalLM

    sizes = XGLMConfig(d_model=64, ffn_dim=128, num_layers=2, attention_heads=4, vocab_size=256)
    plan = Plan.derive(XGLMForCausalLM(sizes), tp=2)
    report = verify(lambda: XGLMForCausalLM(sizes), plan, 2)
    assert (report.verdict, report.tolerance) == ("proved", 1e-5)


def test_one_rank_proves_nothing() -> None:
    with pytest.raises(PlanError, match="tp of 2 or more"):
        verify(m.Gpt(), gpt_plan(), 1)


class Alone(nn.Module):
    """One parameter, in no module of its own: there is nothing that a plan could break."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(m.D))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight


class Up(nn.Module):
    """A single column linear."""

    def __init__(self, width: int = 4 * m.D) -> None:
        super().__init__()
        self.up = nn.Linear(m.D, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.up(x)


@pytest.mark.parametrize(
    ("model", "plan", "change"),
    [
        (m.MLP, {"up": "colwise", "down": "rowwise"}, "down: the sum over tp of its output left out"),
        (Up, {"up": {"style": "colwise", "output": "replicate"}}, "up.weight: the shards of ranks 0 and 1 exchanged"),
        (
            lambda: Up(4 * m.D + 1),
            {"up": {"style": "colwise", "output": "replicate"}},
            "up.weight: the shards of ranks 0 and 1 exchanged",
        ),
    ],
)
def test_a_model_without_bias_or_norm_is_proved_by_another_control(model: Any, plan: Any, change: str) -> None:
    """Every parameter is sharded: no gradient is summed over ranks, or could be."""
    report = local(model(), Plan(plan))
    assert report.verdict == "proved", report
    assert report.control is not None
    assert report.control.change == change
    assert 0.01 < report.control.rel_err < float("inf")


def test_a_model_that_no_change_breaks_is_inconclusive() -> None:
    report = local(Alone(), Plan({}), inputs=(torch.randn(2, 4, m.D),))
    assert report.verdict == "inconclusive"
    assert not report.ok
    assert report.max_grad_rel_err == report.loss_rel_err == 0.0


def test_a_tolerance_of_zero_is_zero() -> None:
    report = local(m.Gpt(layers=1), gpt_plan(), tolerance=0.0)
    assert report.tolerance == 0.0
    assert report.verdict == "wrong"
    assert 0 < report.max_grad_rel_err < 1e-12


def test_a_config_without_hidden_size_is_taken_as_it_is() -> None:
    plan = gpt_plan(attn__qkv=None, attn__q_proj="colwise")
    model = m.Gpt(lambda: NamedHeads())
    model.config = SimpleNamespace(num_attention_heads=m.H)  # type: ignore[assignment]
    assert [str(f) for f in check(model, plan, Mesh(tp=2), seq_len=16)] == []
    assert local(model, plan).ok


class NamedHeads(nn.Module):
    """A projection under the name whose heads are counted."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.out = nn.Linear(m.D, m.D, bias=False), nn.Linear(m.D, m.D, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.q_proj(x).tanh())


def asking_for_ranks(base: type[nn.Module]) -> nn.Module:
    """A model of a class that cannot be pickled, whose forward asks for real ranks."""

    class AsksForRanks(base):  # type: ignore[misc, valid-type]
        def forward(self, *args: Any) -> Any:
            if any(isinstance(p, torch.distributed.tensor.DTensor) for p in self.parameters()):
                assert torch.distributed.get_backend() == "gloo"
            return super().forward(*args)

    return AsksForRanks(replace(MODELS["gqa"], num_hidden_layers=1))


def test_a_plan_for_which_no_ranks_can_be_had_is_inconclusive() -> None:
    report = verify(asking_for_ranks(Llama), preset(), 2)
    assert (report.verdict, report.control) == ("inconclusive", None)
    assert "AsksForRanks" in report.failure
    assert "simulated ranks" in report.failure
    decision = decide(asking_for_ranks(Llama), preset(), Mesh(tp=2), 2, 16, verify="always", stop_on_errors=False)
    assert not decision.accepted
    assert "is not proved" in decision.refusal
    assert "could not be verified" in decision.refusal


def test_a_parametrized_module_cannot_be_sent_to_processes_and_the_error_says_so() -> None:
    model = build()
    torch.nn.utils.parametrizations.weight_norm(model.get_submodule("layers.0.mlp.down_proj"))
    with pytest.raises(PlanError, match=r"^backend gloo sends the model.*: use backend local, or") as raised:
        verify(model, Plan({}), 2, backend="gloo")
    assert "\n" not in str(raised.value)


def _verify_here(queue: Any) -> None:
    try:
        queue.put(verify(build(), preset(), 2, backend="gloo"))
    except Exception as error:
        queue.put(str(error))


def test_where_no_processes_may_be_started_the_error_says_so() -> None:
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    process = context.Process(target=_verify_here, args=(queue,), daemon=True)
    process.start()
    assert "daemonic processes are not allowed to have children" in queue.get(timeout=120)
    process.join()

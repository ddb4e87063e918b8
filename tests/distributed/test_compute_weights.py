"""Copies that the model computes with: gradients of the unsharded model in fp64, and those of FSDP2 in bf16."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from colrow.config_sections import TrainSection
from colrow.parallel.compile import compile_forward
from colrow.parallel.compute_weights import ComputeWeights
from colrow.parallel.data_parallel import apply_data_parallel
from colrow.parallel.parallelize import parallelize
from colrow.plans.plan import Plan
from colrow.sharding.grad_norm import align_gradients
from colrow.sharding.layout import full_tensor, local_tensor
from colrow.train.cuda_graph import GraphedFunction
from colrow.train.optimizer import build_optimizer
from colrow.train.step import SingleStageModel
from helpers.harness import Ranks
from helpers.parity import batch, build, cross_entropy, optimizer_of, relative, tp_mesh, train_reference
from helpers.runs import a_run, figures, train, write_text
from helpers.variants import params

pytestmark = pytest.mark.distributed
STEPS = 2
RATE = TrainSection(steps=1, global_batch=1, micro_batch=1, lr=2**-7)
RATE_AS_TENSOR = RATE.model_copy(update={"cuda_graph": True})
CASES = [("gqa", "llama"), ("tied", "llama"), ("kv3", "llama-fast"), ("qk_norm", "llama-fast"), ("bias", "llama-fast")]


class Graphed(ComputeWeights):
    """Sums as a CUDA graph needs them."""

    def __init__(self, model: nn.Module, dtype: torch.dtype) -> None:
        super().__init__(model, dtype, graphed=True)


class Overwrites(ComputeWeights):
    def _add(self, param: nn.Parameter, grad: Tensor) -> None:
        self._has_sum.discard(param)
        super()._add(param, grad)


class CarriesOver(ComputeWeights):
    def _add(self, param: nn.Parameter, grad: Tensor) -> None:
        if self._optimizer_has_read:
            self._has_sum.add(param)
        super()._add(param, grad)

    def drop_gradients(self) -> None:
        super().drop_gradients()
        self._optimizer_has_read = True

    _optimizer_has_read = False


def micro_batches(device: str, step: int, parts: int = 2) -> list[tuple[Tensor, Tensor]]:
    ids, targets = batch(device, seed=step)
    return list(zip(ids.chunk(parts), targets.chunk(parts), strict=True))


def in_fp64(
    device: str,
    kind: type[ComputeWeights],
    cases: list[tuple[str, str]],
    parts: int = 2,
    *,
    writes: bool = True,
    says_so: bool = True,
) -> dict[str, dict[str, float]]:
    """Relative errors against one process, by case: the first gradients, the last parameters, the last evaluation.

    Args:
        writes, says_so: what the optimizer does to the copies.
    """
    errors: dict[str, dict[str, float]] = {}
    for name, preset in cases:
        want = train_reference(name, device, STEPS, size=4)
        plan = Plan.preset(preset, "vocab_parallel" if preset == "llama" else "linear")
        mesh, here = tp_mesh(device, 2), torch.device(device)
        model = parallelize(build(name, device), plan, mesh)
        weights = kind(model, torch.float64)
        runner = SingleStageModel(model, plan, mesh, here, weights)
        params = list(model.parameters())
        optimizer, found = optimizer_of(params), {}
        for step in range(STEPS):
            loss = runner(micro_batches(device, step, parts))
            assert (
                loss.item() == pytest.approx(want.losses[step], rel=1e-6)
                or kind in (Overwrites, CarriesOver)
                or not writes
            )
            holders = {param: weights.grad_holder(param) for param in params}
            kept = [
                local_tensor(p.grad).numel() - local_tensor(p.detach()).numel() for p in params if p.grad is not None
            ]
            found["elements of sums beyond the shards"] = float(sum(kept))
            align_gradients(holders.values())
            gradients = {param: holder.grad for param, holder in holders.items() if holder.grad is not None}
            for key, param in model.named_parameters():
                assert param in gradients, f"{key} has no gradient"
                if step == 0:
                    found[f"gradient {key}"] = relative(full_tensor(gradients[param]), want.gradients[key])
            if writes:
                optimizer.update(gradients, copies=weights.copies)
            else:
                for group in optimizer.param_groups:
                    group["fused"] = False
                for param, grad in gradients.items():
                    param.grad = grad
                optimizer.step()
            if says_so:
                weights.mark_current(params)
            optimizer.zero_grad()
            weights.drop_gradients()
        for key, param in model.named_parameters():
            found[f"parameter {key}"] = relative(full_tensor(param.detach()), want.parameters[key])
        ids, targets = batch(device, seed=9)
        expected = cross_entropy(want.model(ids), targets).item()
        found["evaluation"] = abs(runner.evaluate([(ids, targets)]).item() / expected - 1) * 1e-4  # its sum is fp32
        errors[f"{name} {preset}"] = found
    return errors


@pytest.mark.parametrize(
    ("kind", "parts"),
    params(
        [(ComputeWeights, 2), (ComputeWeights, 1), (Graphed, 2)],
        exhaustive=lambda kind, parts: kind is ComputeWeights and parts == 1,
    ),
)
def test_gradients_and_parameters_are_those_of_the_unsharded_model(
    ranks: Ranks, kind: type[ComputeWeights], parts: int
) -> None:
    for errors in ranks(2).run(in_fp64, kind, CASES, parts):
        assert len(errors) == len(CASES)
        for case, found in errors.items():
            assert max(found.values()) < 1e-10, (case, found)


def test_a_parameter_that_somebody_else_changes_is_copied_again(ranks: Ranks) -> None:
    for errors in ranks(2).run(partial(in_fp64, writes=False, says_so=False), ComputeWeights, CASES[:1]):
        (found,) = errors.values()
        assert max(found.values()) < 1e-10, found


@pytest.mark.parametrize(
    ("kind", "way", "wrong"),
    [
        (Overwrites, {}, "gradient"),
        (CarriesOver, {}, "parameter"),
        (ComputeWeights, {"writes": False}, "parameter"),
        (ComputeWeights, {"writes": False}, "evaluation"),
    ],
)
def test_a_wrong_sum_or_a_stale_copy_is_seen(
    ranks: Ranks, kind: type[ComputeWeights], way: dict[str, bool], wrong: str
) -> None:
    for errors in ranks(2).run(partial(in_fp64, **way), kind, CASES[:1]):
        (found,) = errors.values()
        assert max(error for key, error in found.items() if key.startswith(wrong)) > 1e-6


def gradients(device: str, name: str, way: str, parts: int) -> dict[str, Tensor]:
    """Of one step of micro-batches over fp32 weights, and the losses of this step and the next."""
    plan, mesh, here = Plan.preset("llama-fast", "linear"), tp_mesh(device, 2), torch.device(device)
    model = parallelize(build(name, device, torch.float32), plan, mesh)
    if way == "compiled":
        for block in model.layers:
            compile_forward(block, backend="aot_eager")
    if way == "fsdp":
        apply_data_parallel(model, mesh, list(model.layers), param_dtype=torch.bfloat16)
    dtype = torch.float32 if way == "fp32" else torch.bfloat16
    weights = None if way == "fsdp" else ComputeWeights(model, dtype)
    runner = SingleStageModel(model, plan, mesh, here, weights)
    named = dict(model.named_parameters())
    matrices = {param for param in named.values() if param.ndim >= 2}
    optimizer = build_optimizer(model.parameters(), RATE if way == "fsdp" else RATE_AS_TENSOR, matrices)
    out = {}
    for step in range(STEPS):
        out[f"loss {step}"] = runner(micro_batches(device, step, parts))
        holders = {param: weights.grad_holder(param) if weights else param for param in named.values()}
        align_gradients(holders.values())
        found = {param: holder.grad for param, holder in holders.items() if holder.grad is not None}
        assert len(found) == len(named)
        if step == 0:
            out |= {key: full_tensor(found[param]).float().clone() for key, param in named.items()}
            kept = {key for key, param in named.items() if found[param].dtype == torch.bfloat16}
            norms = {key for key in named if "norm" in key}  # sums over tp stay in fp32
            assert kept == (named.keys() - norms if parts == 1 and weights and way != "fp32" else set())
        optimizer.update(found, copies=weights.copies if weights else None)
        optimizer.zero_grad()
        if weights:
            weights.drop_gradients()
    return out


def differences(device: str, name: str, way: str, parts: int = 2) -> dict[str, float]:
    """Between a way and FSDP2 with bf16 compute."""
    want, got = gradients(device, name, "fsdp", parts), gradients(device, name, way, parts)
    assert got.keys() == want.keys()
    return {key: relative(got[key], want[key]) for key in want}


@pytest.mark.parametrize("name", params(["gqa-1", "tied-1"], lambda name: name == "gqa-1"))
def test_in_bf16_the_gradients_are_those_of_fsdp(ranks: Ranks, name: str) -> None:
    for parts in (1, 2):
        for found in ranks(2).run(differences, name, "copies", parts):
            for key, error in found.items():
                # FSDP2 reduces the norms' sums over tp in bf16 where it has nothing to add up; and AdamW in one pass
                # rounds otherwise than torch's, which the second loss may tell
                exact = ranks.device == "cpu" and key != "loss 1" and not (parts == 1 and "norm" in key)
                assert error <= (0.0 if exact else 2**-6), (parts, key, error)
    for found in ranks(2).run(differences, name, "fp32"):
        assert found["lm_head.weight" if name == "gqa-1" else "embed_tokens.weight"] > 1e-4


@pytest.mark.exhaustive
def test_compiled_blocks_compute_with_the_copies(ranks: Ranks) -> None:
    for found in ranks(2).run(differences, "gqa-1", "compiled"):
        assert max(found.values()) <= 2**-6, found


class Uncaptured(GraphedFunction):
    """Stands for a CUDA graph: it runs the function, on arguments that lie where the first ones lay."""

    def __init__(self, function: Callable[..., Tensor], *_: object, **__: object) -> None:
        self._function, self._args = function, ()  # no stream and no pool, which need a GPU
        self._graphs, self._declined, self.obstacle = {}, False, None

    def __call__(self, *args: Tensor | int) -> Tensor:
        self._args = self._args or tuple(arg.clone() if isinstance(arg, Tensor) else arg for arg in args)
        for own, given in zip(self._args, args, strict=True):
            if isinstance(own, Tensor) and isinstance(given, Tensor):
                own.copy_(given)
        return self._function(*self._args).clone()

    @property
    def captured(self) -> bool:
        return bool(self._args)


def runs(device: str, folder: Path) -> None:
    """One run as ever, one with copies, and one with copies in two parts, each with evaluations and a sample."""
    from colrow.train import setup, step

    kept = setup.check_cuda_graph, step.GraphedFunction
    setup.check_cuda_graph, step.GraphedFunction = lambda *_: None, Uncaptured
    more = {"mesh": {"tp": 2}, "eval": {"every": 3, "batches": 1}, "sample": {"prompt": "row", "tokens": 2}}
    try:
        for name, copies, stop_after in (
            ("plain", False, None),
            ("copies", True, None),
            ("parts", True, 3),
            ("parts", True, None),
        ):
            section = {"cuda_graph": copies, "compile": False, "precision": "fp32"}
            train(device, a_run(folder, name, train=section, **more), stop_after)
    finally:
        setup.check_cuda_graph, step.GraphedFunction = kept


@pytest.mark.exhaustive
def test_a_run_evaluates_saves_and_continues_with_copies(ranks: Ranks, tmp_path: Path) -> None:
    write_text(tmp_path)
    ranks(2).run(runs, tmp_path)
    plain, copies, parts = (figures(tmp_path / name / "metrics.jsonl") for name in ("plain", "copies", "parts"))
    assert [record["step"] for record in plain if "val_loss" in record] == [3, 6]
    assert parts == copies
    for one, record in zip(plain, copies, strict=True):
        assert record == pytest.approx(one, rel=1e-5)

"""Derive and prove one causal language model: what the sweep says of it."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.models.tiny import classes, tiny
from colrow.derive.derivation import UNUSED
from colrow.derive.judged import derive_judged
from colrow.derive.result import Derivation
from colrow.derive.trace import Trace, default_inputs, trace
from colrow.dryrun.calls import default_loss
from colrow.errors import PlanError
from colrow.plans.derive_options import DeriveOptions, Styles
from colrow.verifying.backends import RankFailure
from colrow.verifying.comparison import Errors, Reference
from colrow.verifying.step import Task, reference_step
from colrow.verifying.verify import parity

TOLERANCE = 1e-9
"""Relative, for a model that computes in fp64 from end to end."""
TOLERANCE_FP32 = 1e-5
"""For models that compute norms or a router in fp32 whatever their weights are."""
LARGEST_ROUNDING = 1e-2
"""A relative error above this is never taken for rounding."""
Row = dict[str, Any]


def examine(
    model_type: str, degrees: Sequence[int], phase: Callable[[str], None] = lambda _: None, styles: Styles = "plain"
) -> Iterator[Row]:
    """One row for each degree: the verdict, how much is split, the worst errors, and the reason for what is not split.

    `phase` is called with what comes next, so that a caller with a time limit can say what took too long.
    """
    rows: list[Row] = [{"model": model_type, "tp": tp} for tp in degrees]
    phase("building")
    try:
        model, inputs = build(model_type, max(degrees))
    except Exception as error:
        yield from (row | {"verdict": "not built", "reason": short(error)} for row in rows)
        return
    phase("tracing")
    try:
        traced = trace(model, inputs)
    except PlanError:
        traced = None  # `derive` may find the modules that cannot be traced, and leave them unsharded
    for row in rows:
        yield row | judged(model, inputs, traced, row["tp"], phase, styles)


def build(model_type: str, tp: int) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """The tiny model, in fp64 where it runs so, and token ids. Raises whatever the model raises."""
    try:
        return _build(model_type, tp)
    except Exception as error:
        try:
            return _build(model_type, tp, num_key_value_heads=8)  # latent attention has as many as query heads
        except Exception:
            raise error from None


def _build(model_type: str, tp: int, **sizes: int) -> tuple[nn.Module, tuple[Tensor, ...]]:
    return prepared(tiny(*classes(model_type), **sizes), tp)


def prepared(model: nn.Module, tp: int) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """A model with a vocabulary of 200 at least, in fp64 where it runs so (grouped products do not), and token ids."""
    shape = default_inputs(model, tp)[0].shape
    inputs = (torch.randint(3, 200, shape, generator=torch.Generator().manual_seed(0)),)
    config: Any = getattr(model, "config", None)
    if config is not None:
        config.use_cache = False  # as in training; a cache of a model without attention layers has no length
    with torch.no_grad():
        model(input_ids=inputs[0], use_cache=False)
        try:
            model = model.double()
            model(input_ids=inputs[0], use_cache=False)
        except Exception:
            model = model.float()
    return model, inputs


def judged(
    model: nn.Module,
    inputs: tuple[Tensor, ...],
    traced: Trace | None,
    tp: int,
    phase: Callable[[str], None] = lambda _: None,
    styles: Styles = "plain",
) -> Row:
    """The verdict at one degree, from a proof on simulated ranks."""
    phase(f"deriving tp={tp}")
    try:
        # checked in training mode, as a run would
        with in_training(model):
            options = DeriveOptions(styles=styles)
            derivation = derive_judged(model, tp, inputs=inputs, traced=traced, options=options)
    except PlanError as error:
        if styles != "plain":
            return {"verdict": "refused", "reason": str(error).partition("end of a model to the other: ")[2][:220]}
        return {"verdict": "untraceable", "reason": short(error)}
    row: Row = {
        "share": round(derivation.share, 3),
        "sequence_parallel": derivation.sequence_parallel,
        "loss": derivation.loss,
        "legal": derivation.legal,
        "fp32": narrow(derivation.trace) if derivation.trace is not None else not in_fp64(model),
    }
    if derivation.judgement is not None:
        found = [f for f in derivation.judgement.findings if f.severity == "error" or f.code == "CR414"]
        row |= {"findings": [f"{f.code} {f.where}: {f.message}" for f in found]}
    phase(f"proving tp={tp}")
    try:
        proof = parity(model, derivation.plan(), tp, inputs)
    except Exception as error:
        return row | {"verdict": "fails", "reason": short(error)}
    gradient = max(proof.gradients.values())
    row |= {"loss_error": proof.loss, "gradient_error": gradient}
    if not within(proof, row["fp32"], model, inputs):
        worst = max(proof.gradients, key=lambda n: proof.gradients[n])
        return row | {"verdict": "WRONG", "reason": f"{worst} {gradient:.1e}, loss {proof.loss:.1e}"}
    verdict, reason = judge(derivation, model)
    return row | {"verdict": verdict, "reason": reason}


@contextlib.contextmanager
def in_training(model: nn.Module) -> Iterator[None]:
    training = model.training
    try:
        model.train()
        yield
    finally:
        model.train(training)


def within(proof: Errors, fp32: bool, model: nn.Module, inputs: tuple[Tensor, ...]) -> bool:
    """Whether the errors are rounding.

    In fp32 a gradient that is zero by mathematics (of a key's bias before softmax) is nothing but rounding, and no
    fixed tolerance fits. Such a gradient may differ by a few times what it changes in the unsharded model when each
    weight moves by half a unit in its last place.
    """
    if not fp32 or proof.worst <= TOLERANCE_FP32:
        return proof.worst <= (TOLERANCE_FP32 if fp32 else TOLERANCE)
    if max(proof.loss, *proof.parameters.values()) > TOLERANCE_FP32:
        return False
    large = {name: error for name, error in proof.gradients.items() if error > TOLERANCE_FP32}
    if max(large.values()) > LARGEST_ROUNDING:
        return False
    noise = rounding(model, inputs)
    return all(error <= 4 * noise[name] for name, error in large.items())


def rounding(model: nn.Module, inputs: tuple[Tensor, ...], trials: int = 3) -> dict[str, float]:
    """The largest relative change of each gradient when weights move by up to 2^-24, relative, at random."""

    def gradients(seed: int | None) -> Reference:
        moved = copy.deepcopy(model).eval()
        if seed is not None:
            generator = torch.Generator().manual_seed(seed)
            with torch.no_grad():
                for param in moved.parameters():
                    param.mul_(1 + 2**-24 * (2 * torch.rand(param.shape, generator=generator) - 1).to(param.dtype))
        return reference_step(Task(moved, inputs, default_loss, 1), moved)

    still = gradients(None)
    worst = dict.fromkeys(still.gradients, 0.0)
    for seed in range(trials):
        for name, moved in gradients(seed).gradients.items():
            change = (moved - still.gradients[name]).abs().max().item()
            worst[name] = max(worst[name], change / still.size(name))
    return worst


def in_fp64(model: nn.Module) -> bool:
    return all(p.dtype == torch.float64 for p in model.parameters() if p.is_floating_point())


def narrow(traced: Trace) -> bool:
    """Whether something that depends on a parameter is computed in less than fp64."""
    found = set()
    for node in traced.nodes:
        if node.name in traced.parameters or any(n in found for n in node.all_input_nodes):
            value = node.meta.get("val")
            if isinstance(value, Tensor):
                if value.is_floating_point() and value.dtype != torch.float64:
                    return True
                if not value.is_floating_point() and not value.is_complex():
                    continue  # an index or a mask carries no rounding
            found.add(node)
    return False


def judge(derivation: Derivation, model: nn.Module) -> tuple[str, str]:
    """full, partial or unsharded, and why not full."""
    unused = {name for name, why in derivation.replicated.items() if why == UNUSED}  # cross-attention, no encoder
    matrices = {
        n: p.numel()
        for n, p in model.named_parameters()
        if n not in unused and p.dim() >= 2 and any(c.isdigit() for c in n.split("."))
    }
    split = sum(size for name, size in matrices.items() if name in set(derivation.sharded))
    parts: dict[str, set[str]] = {}  # by layer: which of its modules hold matrices
    for name in matrices:
        path = name.split(".")
        end = [c.isdigit() for c in path].index(True) + 1
        parts.setdefault(".".join(path[:end]), set()).add(path[end])
    inner = sum(count for name, count in derivation.reductions.items() if "*" in name)
    share = split / max(1, sum(matrices.values()))
    # attention and MLP have one reduction each; a layer of a single mixer has one
    if share >= 0.7 and inner >= max(1, sum(min(2, len(found)) for found in parts.values())):
        return "full", ""
    reasons = [n for n in derivation.notes if not n.startswith("no sequence shards")]
    if not reasons:
        largest = sorted((n for n in derivation.replicated if n in matrices), key=lambda n: -matrices[n])
        reasons = [f"{n}: {derivation.replicated[n]}" for n in largest]
    if derivation.unknown:
        reasons.insert(1, "no rule for " + ", ".join(sorted(derivation.unknown)[:4]))
    reason = "; ".join(dict.fromkeys(reasons[:2])) or f"{inner} reductions in {len(parts)} layers"
    return ("partial" if derivation.sharded else "unsharded"), reason[:220]


def short(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or [""]
    return lines[0][:160] if isinstance(error, RankFailure) else f"{type(error).__name__}: {lines[0][:160]}"

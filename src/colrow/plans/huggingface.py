"""A plan from the tensor-parallel plan of a Hugging Face model.

`base_model_tp_plan` of a config and `_tp_plan` of a class map parameter or module names to names of styles. Their plans
leave things open that make training wrong, and that are put right here: tied embeddings get one placement, norms on
local heads get their gradients summed, and so do the routing weights of split experts.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from colrow.errors import PlanError
from colrow.plans.patterns import with_stars
from colrow.styles.packed import is_transposed

STYLES: dict[str, dict[str, Any] | None] = {
    "colwise": {"style": "colwise"},
    "rowwise": {"style": "rowwise"},
    # _rep: the older name of the style of the line before, which configs may still have
    "colwise_gather_output": {"style": "colwise", "output": "replicate"},
    "colwise_rep": {"style": "colwise", "output": "replicate"},
    "rowwise_split_input": {"style": "rowwise", "input": "replicate"},
    "rowwise_rep": {"style": "rowwise", "input": "replicate"},
    "embedding_rowwise": {"style": "rowwise", "input": "replicate"},
    "embedding_colwise": {"style": "colwise", "input": "replicate", "output": "replicate"},
    "sequence_parallel": {"style": "sequence"},
    "replicate": None,
    "replicated_with_grad_allreduce": {"style": "grad_sum"},
    "packed_colwise": {"style": "packed_colwise"},
    "packed_rowwise": {"style": "packed_rowwise", "output": "replicate"},
    "moe_tp_experts": None,
}
"""Hugging Face's names and what they are here; None needs no entry of its own."""

NO_EQUIVALENT = {
    "mla_kv_a_proj": "one section of its output has a gradient that is a sum over ranks, another has not",
    "moe_identity_expert": "experts that pass tokens through are not split by tensor parallelism",
    "local_params": "the parameters are used as local tensors by code that communicates itself",
    "all_reduce": "the module's own code decides what is summed",
    "ep_router": "expert parallelism is not a part of tensor parallelism",
    "grouped_gemm": "expert parallelism is not a part of tensor parallelism",
    "moe_experts_allreduce": "expert parallelism is not a part of tensor parallelism",
}


def huggingface_modules(model: nn.Module) -> dict[str, Any]:
    """Patterns to styles of the plan that a Hugging Face model states for itself.

    Raises:
        PlanError: the model states none, or one with a style that cannot be mapped; the text names the keys and the
            way that is open (`Plan.derive`).
    """
    stated = stated_plan(model)
    if not stated:
        raise PlanError(
            f"{type(model).__name__} states no tensor-parallel plan: use Plan.derive(model, tp=N), which the "
            "command line calls derive (or derive-fast, for loss: linear)"
        )
    modules, unmapped = map_styles(model, stated)
    if unmapped:
        listed = "; ".join(f"{key}: {why}" for key, why in unmapped.items())
        raise PlanError(
            f"the plan of {type(model).__name__} has styles without an equivalent ({listed}): "
            "use Plan.derive(model, tp=N)"
        )
    return modules


def stated_plan(model: nn.Module) -> dict[str, str]:
    """Name pattern to Hugging Face style, with the base model's prefix."""
    found = getattr(model, "tp_plan", None) or {}
    return {str(key): str(value) for key, value in dict(found).items()}


def map_styles(model: nn.Module, stated: Mapping[str, str]) -> tuple[dict[str, Any], dict[str, str]]:
    """Module patterns to styles, and each key that cannot be mapped with the reason."""
    names = {name for name, _ in model.named_modules(remove_duplicate=False) if name}
    patterns = {with_stars(name) for name in names}
    parameters = {with_stars(name): name for name, _ in model.named_parameters(remove_duplicate=False)}
    out: dict[str, dict[str, Any]] = {}
    unmapped: dict[str, str] = {}
    experts: dict[str, dict[str, Any]] = {}
    for key, name in stated.items():
        if name in NO_EQUIVALENT:
            unmapped[key] = f"{name}: {NO_EQUIVALENT[name]}"
        elif name not in STYLES:
            unmapped[key] = f"{name}: unknown to this release of colrow"
        elif key in parameters and key not in patterns:
            _expert(model, key, parameters[key], name, experts, unmapped)
        elif key not in patterns and key not in names:
            continue  # a module that this configuration does not have
        elif (options := STYLES[name]) is not None:
            out[key] = _with_segments(model, key, options)
    for key, shards in experts.items():
        # forward(hidden_states, top_k_index, top_k_weights): the routing weights meet partial sums
        layouts = ["replicate", "none", "replicate"]
        out[key] = {"style": "local_block", "input": layouts, "shards": shards, "output": ["replicate"]}
    _tie(model, out)
    return out, unmapped


def _expert(
    model: nn.Module, key: str, name: str, style: str, experts: dict[str, dict[str, Any]], unmapped: dict[str, str]
) -> None:
    """A key that names a parameter: stacked experts [E, out, in]."""
    parent, _, leaf = key.rpartition(".")
    param = model.get_parameter(name)
    transposed = is_transposed(model.get_submodule(name.rpartition(".")[0]))
    if param.dim() != 3 or style not in ("packed_colwise", "colwise", "rowwise", "packed_rowwise"):
        unmapped[key] = f"{style} on a parameter of shape {tuple(param.shape)}"
        return
    out, into = (2, 1) if transposed else (1, 2)
    dim = out if style.endswith("colwise") else into
    half = int(param.shape[dim]) // 2  # gate and up, one after the other
    experts.setdefault(parent, {})[leaf] = (
        {"dim": dim, "segments": [half, half]} if style.startswith("packed") else {"dim": dim}
    )


def _with_segments(model: nn.Module, key: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a style; of a packed one with its two segments, gate and up, which transformers cuts in halves."""
    if not options["style"].startswith("packed_"):
        return dict(options)
    module = next(m for name, m in model.named_modules(remove_duplicate=False) if key in (name, with_stars(name)))
    weight: Any = module._parameters["weight"]
    out, into = (1, 0) if is_transposed(module) else (0, 1)
    half = int(weight.shape[out if options["style"] == "packed_colwise" else into]) // 2
    return {**options, "segments": [half, half]}


def _tie(model: nn.Module, out: dict[str, dict[str, Any]]) -> None:
    """Give a tied head and its embedding one placement: rows of the table, which are the head's output features."""
    embedding, head = _name_of(model, "get_input_embeddings"), _name_of(model, "get_output_embeddings")
    if embedding is None or head is None:
        return
    if model.get_submodule(embedding).weight is not model.get_submodule(head).weight:
        return
    if head in out or embedding in out:
        out[embedding] = {"style": "rowwise", "input": "replicate"}
        out[head] = {"style": "colwise", "output": "replicate"}


def _name_of(model: Any, getter: str) -> str | None:
    module = getattr(model, getter)() if hasattr(model, getter) else None
    return next((name for name, m in model.named_modules() if m is module and module is not None), None)

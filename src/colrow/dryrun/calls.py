"""How to call a model of unknown signature: its input, its output, and its loss.

A causal language model takes token ids [B, T] and gives logits [B, T, V], bare or as `.logits` of what Hugging Face's
models return. A model without an embedding takes hidden states [B, T, D].
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from colrow.errors import PlanError
from colrow.plans.plan import Plan
from colrow.styles.linear_head import PendingTargets, expect_targets
from colrow.torch_compat import tree_leaves

Loss = Callable[[Tensor, tuple[Any, ...]], Tensor]
"""A scalar from the model's output and its inputs."""


def is_huggingface(model: nn.Module) -> bool:
    """Whether the model is one of the `transformers` library."""
    return any(cls.__module__.startswith("transformers.") for cls in type(model).__mro__)


def vocabulary(model: nn.Module) -> int | None:
    """The number of token ids that the model's first embedding knows; None for a model without one."""
    return next((m.num_embeddings for m in model.modules() if isinstance(m, nn.Embedding)), None)


def example_input(model: nn.Module, batch_size: int, seq_len: int) -> Tensor:
    """Token ids [B, T], or hidden states [B, T, D] for a model without an embedding, drawn from torch's generator.

    Raises:
        PlanError: the model has neither an embedding nor a linear layer.
    """
    vocab = vocabulary(model)
    if vocab is not None:
        return torch.randint(0, vocab, (batch_size, seq_len))
    width = getattr(getattr(model, "config", None), "hidden_size", None)
    linears = (module.in_features for module in model.modules() if isinstance(module, nn.Linear))
    width = width or next(linears, None)
    if width is None:
        raise PlanError(
            f"{type(model).__name__} has neither an embedding nor a linear layer that shows its input: "
            "pass example inputs with inputs=(...)"
        )
    param = next(model.parameters())
    dtype = param.dtype if param.is_floating_point() else torch.get_default_dtype()
    return torch.randn(batch_size, seq_len, int(width), dtype=dtype)


def call_model(model: nn.Module, inputs: tuple[Any, ...]) -> Tensor:
    """The model's output as one tensor: logits where it gives some, else the first tensor.

    A single input is passed as `input_ids` where the model takes that name; no key-value cache is kept.
    """
    known = inspect.signature(model.forward).parameters
    kwargs: dict[str, Any] = {"use_cache": False} if "use_cache" in known else {}
    if "input_ids" in known and len(inputs) == 1:
        out = model(input_ids=inputs[0], **kwargs)
    else:
        out = model(*inputs, **kwargs)
    logits = getattr(out, "logits", None)
    if isinstance(logits, Tensor):
        return logits
    tensor = next((leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)), None)
    if tensor is None:
        raise PlanError(f"{type(model).__name__} returns no tensor, but {type(out).__name__}: wrap it in one that does")
    return tensor


def default_loss(output: Tensor, inputs: tuple[Any, ...]) -> Tensor:
    """Next-token cross entropy for logits of token ids; otherwise a fixed weighted sum of the complete output.

    The weights differ from element to element: behind a norm, a mean or a square has a zero gradient.
    """
    ids = inputs[0] if inputs else None
    if isinstance(ids, Tensor) and not ids.is_floating_point() and output.ndim == 3:
        targets = ids.roll(-1, dims=1)
        return F.cross_entropy(output.flatten(0, 1), targets.flatten())
    if isinstance(output, DTensor):
        output = output.full_tensor()
    weights = torch.arange(output.numel(), dtype=output.dtype, device=output.device).cos().view(output.shape)
    return (output * weights).sum() / output.numel() ** 0.5


def give_targets(model: nn.Module, plan: Plan, inputs: tuple[Any, ...]) -> None:
    """Give a head that computes the loss itself (`loss: linear`) the targets of `default_loss`."""
    if plan.loss == "linear":
        expect_targets(model, [PendingTargets(inputs[0].roll(-1, dims=1), None, -100)])

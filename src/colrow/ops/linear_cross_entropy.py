"""Head and loss in one, for a head sharded over the vocabulary: no rank ever holds the logits of all tokens.

    forward   H = all_gather(h)                             only where h is a shard of the tokens
              for each chunk of C tokens:
                  Z = H_C W_v^T                             [C, v]
                  S = all_gather(statistics(Z))             one collective a chunk, of 4 C numbers a rank
                  loss += terms(S); Z <- d loss / d Z       in place
                  dH_C = Z W_v                              a partial sum over ranks
                  dW_v += Z^T H_C                           in fp32
              dh = reduce_scatter(dH)                       all_reduce where h is replicated
    backward  dh, dW_v times the incoming gradient

Forward computes the gradients, while it has the chunk's logits: three matmuls, and none is computed again. That is why
the reduction must be a sum or a mean: the gradient of each token's loss has to be known by then.

Legend: T tokens, t this rank's tokens, D hidden size, V vocabulary, v this rank's classes, n ranks, C chunk.
"""

from __future__ import annotations

import functools
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard

from colrow.errors import ConfigError
from colrow.ops import gpu_shapes
from colrow.ops.collectives import all_gather, group_of, reduce_scatter
from colrow.ops.execution_record import record
from colrow.ops.kernels import cross_entropy as kernels
from colrow.ops.kernels.cross_entropy import LossTerms
from colrow.ops.kernels.optional_triton import UNAVAILABLE
from colrow.ops.products import add_product, sum_dtype

Implementation = Literal["auto", "triton", "torch"]


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    mesh_or_group: DeviceMesh | dist.ProcessGroup | None = None,
    sequence_dim: int | None = None,
    vocab_size: int | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    reduction: Literal["mean", "sum"] = "mean",
    num_valid: int | float | Tensor | None = None,
    chunk: int | None = None,
    implementation: Implementation = "auto",
) -> Tensor:
    """Cross entropy of `hidden @ weight.T` against `targets`, without ever holding the logits.

    Args:
        hidden: [..., D]; replicated, or this rank's shard of dim `sequence_dim`. A DTensor's placement says which.
        weight: [V, D]. Split over the vocabulary it is a DTensor with placement Shard(0), or a plain [v, D] (rows as
            torch.chunk cuts them) together with `mesh_or_group` and `vocab_size`.
        targets: [...], class numbers of all tokens, the same on each rank of the group.
        mesh_or_group: the tensor-parallel mesh or group; unless given, a DTensor weight's mesh.
        sequence_dim: the dim of which `hidden` is a shard; None if replicated. 0 for flattened tokens ([T/n, D]).
        vocab_size: V, for plain shards of the weight.
        ignore_index: targets that do not count.
        label_smoothing: as in torch's cross_entropy, in [0, 1].
        z_loss: factor of log(sum(exp(logits)))^2, added to each token's loss (PaLM, section 5).
        reduction: `mean` over the targets that count, or `sum`.
        num_valid: the mean's divisor instead: the number of targets that count in the whole batch, say.
        chunk: tokens whose logits exist at one time: [chunk, v] in hidden's dtype. Unless given, 4,096 on GPUs and
            1,024 elsewhere.
        implementation: `triton` on GPUs, `torch` on CPUs, or by `auto` the one that fits the device.

    Returns:
        A scalar in fp32 (fp64 for fp64 `hidden`), the same on each rank; 0 when no target counts. A target outside the
        vocabulary makes it nan on a GPU.

    Raises:
        ConfigError: shapes, dtypes, placements or options that do not fit together, with the fix.
    """
    chunk = _chunk_for(hidden) if chunk is None else chunk
    _check_options(reduction, chunk, label_smoothing)
    if isinstance(weight, DTensor) and mesh_or_group is None:
        mesh_or_group = weight.device_mesh
    group = None if mesh_or_group is None else group_of(mesh_or_group)
    n, rank = (1, 0) if group is None else (group.size(), group.rank())
    weight, vocab_size = _local_weight(weight, vocab_size, n, rank)
    hidden, sequence_dim = _local_hidden(hidden, sequence_dim)
    h_tD, y_T = _tokens(hidden, targets, sequence_dim, n)
    _require_equal_width(hidden, weight)
    if type(y_T) is Tensor and y_T.device.type == "cpu":  # a GPU would be waited for, a fake tensor has no values
        _refuse_unknown_classes(y_T, vocab_size, ignore_index)
    first_class = rank * -(-vocab_size // n)  # torch.chunk gives each rank ceil(V / n) rows, and the last what is left
    plan = _Plan(
        terms=LossTerms(vocab_size, first_class, ignore_index, label_smoothing, z_loss),
        group=group if n > 1 else None,
        gather=n > 1 and sequence_dim is not None,
        chunk=chunk,
        triton=_use_triton(implementation, h_tD.device),
        gradients=torch.is_grad_enabled(),  # inside an autograd Function's forward it is off
    )
    scale = _scale(y_T, ignore_index, reduction, num_valid, sum_dtype(h_tD.dtype))
    loss: Tensor = _LinearCrossEntropy.apply(h_tD, weight, y_T, scale, plan)
    return loss


@dataclass(frozen=True)
class _Plan:
    """How the loss is computed; the same on all ranks, but for `terms.first`."""

    terms: LossTerms
    group: dist.ProcessGroup | None
    gather: bool
    chunk: int
    triton: bool
    gradients: bool


def _functions(plan: _Plan) -> tuple[Callable[..., Tensor], Callable[..., Tensor], Callable[..., None]]:
    """The functions for a chunk's statistics, for its loss and gradient, and for the sum of weight gradients."""
    if gpu_shapes.is_as_on_gpu():
        return gpu_shapes.statistics_shape, gpu_shapes.loss_shape, gpu_shapes.add_product_shape
    if plan.triton:
        return kernels.statistics_triton, kernels.loss_triton, add_product
    return kernels.statistics_reference, kernels.loss_reference, add_product


def chunk_gradients(
    dZ_Cv: Tensor, x_CD: Tensor, w_vD: Tensor, dH_CD: Tensor | None, dW_vD: Tensor | None, add_to: Callable[..., None]
) -> None:
    """Write dH = dZ W, and add dZ^T X to dW, where they are given. By this function the dry run tells these products
    from those of forward, in which they run."""
    if dH_CD is not None:
        torch.mm(dZ_Cv, w_vD, out=dH_CD)
    if dW_vD is not None:
        add_to(dW_vD, dZ_Cv.t(), x_CD)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, h_tD: Tensor, w_vD: Tensor, y_T: Tensor, scale: Tensor, plan: _Plan) -> Tensor:
        group = plan.group
        record("loss", "triton" if plan.triton else "torch")
        need_dh, need_dw = (plan.gradients and needed for needed in ctx.needs_input_grad[:2])
        H_TD = all_gather(h_tD, group) if plan.gather and group is not None else h_tD
        T = H_TD.shape[0]
        loss = torch.zeros((), dtype=scale.dtype, device=H_TD.device)
        dH_TD = torch.empty_like(H_TD) if need_dh else None
        dW_vD = torch.zeros(w_vD.shape, dtype=scale.dtype, device=w_vD.device) if need_dw else None
        statistics, loss_and_gradient, add_to = _functions(plan)
        for start in range(0, T, plan.chunk):
            x_CD, y_C = H_TD[start : start + plan.chunk], y_T[start : start + plan.chunk]
            z_Cv = x_CD @ w_vD.t()
            stats_nKC = statistics(z_Cv, y_C, plan.terms)[None]
            if group is not None:
                stats_nKC = all_gather(stats_nKC, group)
            # In place: from here on z_Cv holds d loss / d logits. A copy would be the largest tensor of the step.
            loss += loss_and_gradient(z_Cv, y_C, stats_nKC, scale, plan.terms, need_dh or need_dw).sum()
            chunk_gradients(
                z_Cv, x_CD, w_vD, None if dH_TD is None else dH_TD[start : start + plan.chunk], dW_vD, add_to
            )
        if dH_TD is not None and group is not None:  # each rank's dH comes from its own classes alone: a partial sum
            if plan.gather:
                dH_TD = reduce_scatter(dH_TD, group)
            else:
                dist.all_reduce(dH_TD, group=group)
        # gradients and no activations: backward only multiplies them by the gradient of the loss
        ctx.save_for_backward(dH_TD, None if dW_vD is None else dW_vD.to(w_vD.dtype))
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        dh, dw = ctx.saved_tensors
        scaled = (None if d is None else d * grad.to(d.dtype) for d in (dh, dw))
        return *scaled, None, None, None


def _chunk_for(hidden: Tensor) -> int:
    """Tokens in a chunk: its logits are large enough for full matmuls, and small beside the logits of all tokens."""
    return 4096 if hidden.device.type == "cuda" or gpu_shapes.is_as_on_gpu() else 1024


def _check_options(reduction: str, chunk: int, label_smoothing: float) -> None:
    if reduction not in ("mean", "sum"):
        raise ConfigError(
            f"reduction={reduction!r}: linear_cross_entropy makes its gradients in forward and needs a scalar loss: "
            "use mean or sum"
        )
    if chunk < 1 or not 0.0 <= label_smoothing <= 1.0:
        raise ConfigError(f"chunk={chunk}, label_smoothing={label_smoothing}: chunk is positive, smoothing in [0, 1]")


def _require_equal_width(hidden: Tensor, weight: Tensor) -> None:
    if hidden.shape[-1] != weight.shape[1] or hidden.dtype != weight.dtype:
        raise ConfigError(
            f"hidden is {list(hidden.shape)} {hidden.dtype}, weight {list(weight.shape)} {weight.dtype}: "
            "their last dimensions and dtypes must be equal; cast one, as autocast does not reach in here"
        )


def _local_weight(weight: Tensor, vocab_size: int | None, n: int, rank: int) -> tuple[Tensor, int]:
    """This rank's rows, and V."""
    if isinstance(weight, DTensor):
        if weight.device_mesh.ndim != 1 or weight.placements != (Shard(0),):
            raise ConfigError(
                f"weight has placements {weight.placements} on a mesh with axes {weight.device_mesh.mesh_dim_names}: "
                "it must be Shard(0) on the tensor-parallel mesh alone; under FSDP2 call this inside the forward of "
                "the module that owns the weight, where it is gathered"
            )
        vocab_size, weight = weight.shape[0], weight.to_local()
    elif n == 1:
        vocab_size = weight.shape[0]
    elif vocab_size is None:
        raise ConfigError(
            f"weight is a plain tensor and the group has {n} ranks: give vocab_size, which determines "
            "the classes of each rank, or a DTensor"
        )
    rows = -(-vocab_size // n)
    if (n - 1) * rows >= vocab_size:
        raise ConfigError(f"vocab_size={vocab_size} leaves the last of {n} ranks without a class: use fewer ranks")
    expected = min(rows, vocab_size - rank * rows)
    if weight.shape[0] != expected:
        raise ConfigError(
            f"rank {rank} of {n} holds {weight.shape[0]} rows of the weight; of vocab_size={vocab_size} it should hold "
            f"{expected}, as torch.chunk cuts them"
        )
    return weight, vocab_size


def _local_hidden(hidden: Tensor, sequence_dim: int | None) -> tuple[Tensor, int | None]:
    """This rank's hidden states, and the dim of which they are a shard; None if replicated."""
    if not isinstance(hidden, DTensor):
        return hidden, sequence_dim
    placement = hidden.placements[0]
    if hidden.device_mesh.ndim != 1 or not isinstance(placement, Shard | Replicate):
        raise ConfigError(
            f"hidden has placements {hidden.placements}: redistribute it to Shard(1) or Replicate() on the "
            "tensor-parallel mesh"
        )
    return hidden.to_local(), placement.dim if isinstance(placement, Shard) else None


def _tokens(hidden: Tensor, targets: Tensor, sequence_dim: int | None, n: int) -> tuple[Tensor, Tensor]:
    """Hidden states as [t, D] and targets as [T], in the order of the gathered tokens.

    An all-gather of dim 0 orders tokens by rank first. Shards of another dim then come out in another order than the
    targets, which are reordered in their place: they are smaller, and the loss, a sum, is the same in any order.
    """
    shape = list(hidden.shape[:-1])
    if sequence_dim is not None:
        if not 0 <= sequence_dim < len(shape):
            raise ConfigError(f"sequence_dim={sequence_dim} is no dim of tokens in hidden {list(hidden.shape)}")
        shape[sequence_dim] *= n
    if list(targets.shape) != shape:
        shard = "" if sequence_dim is None else f", a shard of dim {sequence_dim} on {n} ranks"
        raise ConfigError(
            f"hidden is {list(hidden.shape)}{shard}, targets {list(targets.shape)}: targets must be unsharded, {shape}"
        )
    if sequence_dim:
        targets = targets.unflatten(sequence_dim, (n, -1)).movedim(sequence_dim, 0)
    return hidden.flatten(0, -2), targets.reshape(-1)


def _scale(y_T: Tensor, ignore_index: int, reduction: str, num_valid: Any, dtype: torch.dtype) -> Tensor:
    """The factor of each token's loss, as a tensor: a number would make the CPU wait for the device."""
    if num_valid is None:
        if reduction == "sum":
            return torch.ones((), dtype=dtype, device=y_T.device)
        num_valid = (y_T != ignore_index).sum().clamp(min=1)
    elif reduction == "sum":
        raise ConfigError("num_valid is the divisor of a mean: leave it out, or use reduction='mean'")
    if isinstance(num_valid, Tensor):
        return num_valid.to(y_T.device, dtype).reciprocal()
    return torch.full((), 1.0 / num_valid, dtype=dtype, device=y_T.device)


def _refuse_unknown_classes(y_T: Tensor, vocab_size: int, ignore_index: int) -> None:
    counting = y_T[y_T != ignore_index]
    if counting.numel() and not 0 <= int(counting.min()) <= int(counting.max()) < vocab_size:
        raise ConfigError(
            f"targets reach from {int(counting.min())} to {int(counting.max())}: classes are 0 to {vocab_size - 1}, "
            f"and ignore_index={ignore_index} for those that do not count"
        )


def _use_triton(implementation: Implementation, device: torch.device) -> bool:
    if implementation == "triton" and (reason := UNAVAILABLE or _not_on_a_gpu(device)):
        raise ConfigError(f"implementation='triton' cannot be used: {reason}")
    if implementation != "auto":
        return implementation == "triton"
    if device.type == "cuda" and UNAVAILABLE:
        _warn_once(UNAVAILABLE)
    return device.type == "cuda" and not UNAVAILABLE


def _not_on_a_gpu(device: torch.device) -> str:
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    return "" if device.type == "cuda" or interpreted else f"the tensors are on {device.type}, and Triton needs a GPU"


@functools.cache
def _warn_once(reason: str) -> None:
    warnings.warn(
        f"linear_cross_entropy runs its plain torch form, which is slower, on a GPU: Triton is missing ({reason})",
        stacklevel=4,
    )

"""Which dtype each part of a step computes in, and who casts."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from colrow.config import RunConfig


@dataclass(frozen=True)
class Precision:
    """[Note: precision]

    Parameters, the optimizer's state and its update are fp32 always, and so are the loss and the gradient norm. The
    model computes in `compute_dtype`, in which activations and their gradients are also sent over tp and pp. Gradients
    of parameters are summed over micro-batches and reduced over data axes in fp32; only a step of one micro-batch on a
    mesh of tp alone passes them to the optimizer in `compute_dtype`, since there is nothing to sum.

    Who casts the parameters: FSDP2 casts what it gathers (`fsdp_param_dtype`). With tp alone it gathers nothing,
    and its hooks and its fp32 copy of every gradient would only cost time: there `ComputeWeights` keeps copies. A CUDA
    graph needs the copies whatever the dtype, since they never move.
    """

    compute_dtype: torch.dtype
    keeps_copies: bool
    """Whether the model computes with `ComputeWeights`."""

    @property
    def fsdp_param_dtype(self) -> torch.dtype | None:
        """`param_dtype` of FSDP2's policy; None to compute with the fp32 parameters themselves."""
        return None if self.compute_dtype == torch.float32 else self.compute_dtype


def choose_precision(config: RunConfig, device: torch.device) -> Precision:
    """The precision that `train.precision` names; `auto` is bf16 on GPUs and fp32 elsewhere."""
    bf16 = device.type == "cuda" if config.train.precision == "auto" else config.train.precision == "bf16"
    keeps_copies = config.train.is_graphed or (bf16 and config.mesh.tp_alone)
    return Precision(torch.bfloat16 if bf16 else torch.float32, keeps_copies)

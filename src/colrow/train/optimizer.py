"""AdamW over DTensors: weight decay on matrices only, one fused kernel where there is one."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from colrow.config import TrainSection


def build_optimizer(params: Iterable[nn.Parameter], section: TrainSection) -> torch.optim.AdamW:
    """AdamW (Loshchilov & Hutter 2019) over the trainable ones of `params`, which must be on their final meshes.

    Matrices decay; vectors (norms, biases) do not. A fused or foreach kernel takes tensors of one mesh only, so
    parameters on different meshes (or on none) are in groups of their own. For a CUDA graph the rate is a tensor.
    """
    params = list(params)
    groups: dict[tuple[bool, Any], list[nn.Parameter]] = defaultdict(list)
    for param in params:
        if param.requires_grad:
            groups[param.ndim >= 2, param.device_mesh if isinstance(param, DTensor) else None].append(param)
    ordered = sorted(groups.items(), key=lambda item: (not item[0][0], str(item[0][1])))
    return torch.optim.AdamW(
        [
            {"params": members, "weight_decay": section.weight_decay if decays else 0.0}
            for (decays, _), members in ordered
        ],
        lr=torch.tensor(section.lr, device=params[0].device) if section.cuda_graph else section.lr,
        betas=section.betas,
        eps=section.eps,
        fused=True,
        capturable=section.cuda_graph,
    )


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Use `lr` in the next step."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(lr)
        else:
            group["lr"] = lr

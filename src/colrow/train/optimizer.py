"""AdamW over DTensors: weight decay in groups; clipping, update and rounding in one kernel on GPUs."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Container, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from colrow.config_sections import TrainSection
from colrow.ops.kernels.adamw import FusedAdamW, ParamUpdate
from colrow.ops.kernels.optional_triton import UNAVAILABLE
from colrow.sharding.layout import local_tensor
from colrow.torch_compat import foreach


class AdamW(torch.optim.AdamW):
    """torch's AdamW, with an update that also clips and writes the low-precision copies of `WeightCopies`.

    Its state is torch's: checkpoints of one load into the other.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._kernels: dict[tuple[int, int], FusedAdamW] = defaultdict(FusedAdamW)  # by group and part of an update

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._kernels = defaultdict(FusedAdamW)

    @torch.no_grad()
    def update(
        self,
        gradients: Mapping[nn.Parameter, Tensor],
        scale: Tensor | None = None,
        copies: Mapping[nn.Parameter, Tensor] | None = None,
        first: Container[nn.Parameter] = (),
        between: Callable[[], None] | None = None,
    ) -> None:
        """One step.

        Args:
            gradients: by the parameter that they change, in its placements; in its dtype or a lower one.
            scale: a scalar tensor on their device, by which all gradients are multiplied first.
            copies: by parameter: tensors that get the new value too, rounded to their dtype.
            first: parameters to update before all others.
            between: called after them, with copies.
        """
        if not gradients:
            if between is not None:
                between()
            return
        device = local_tensor(next(iter(gradients))).device
        # torch's kernel does all that is wanted where there are no copies to write, and runs without Triton.
        if copies is None and (device.type != "cuda" or UNAVAILABLE):
            self._update_by_torch(gradients, scale)
            return
        factor = torch.ones((), device=device) if scale is None else scale
        # What the next forward gathers first is updated first: `between` starts that gather beside the rest.
        if between is not None:
            self._update_some({p: grad for p, grad in gradients.items() if p in first}, factor, copies, 1)
            between()
            gradients = {p: grad for p, grad in gradients.items() if p not in first}
        self._update_some(gradients, factor, copies, 0)

    def _update_some(
        self,
        gradients: Mapping[nn.Parameter, Tensor],
        scale: Tensor,
        copies: Mapping[nn.Parameter, Tensor] | None,
        part: int,
    ) -> None:
        """Update the parameters of one part of an update; each part has kernels of its own, which keep their tables."""
        for number, group in enumerate(self.param_groups):
            params = [param for param in group["params"] if param in gradients]
            if not params:
                continue
            states = [self._state_of(param) for param in params]
            # on the device and before the kernel, which reads the counts for the bias correction
            foreach("add_", [state["step"] for state in states], 1)
            lr = group["lr"]
            rate = lr if isinstance(lr, Tensor) else torch.full((), lr, device=scale.device, dtype=torch.float64)
            updates = [
                _update_of(param, gradients[param], state, copies.get(param) if copies else None)
                for param, state in zip(params, states, strict=True)
            ]
            betas, eps, decay = group["betas"], group["eps"], group["weight_decay"]
            self._kernels[number, part](updates, rate, scale, betas=betas, eps=eps, weight_decay=decay)

    def _update_by_torch(self, gradients: Mapping[nn.Parameter, Tensor], scale: Tensor | None) -> None:
        grads = [local_tensor(grad) for grad in gradients.values()]
        if scale is not None:
            foreach("mul_", grads, scale.to(grads[0].dtype))
        for param, grad in gradients.items():
            param.grad = grad
        self.step()

    def _state_of(self, param: nn.Parameter) -> dict[str, Any]:
        state: dict[str, Any] = self.state[param]
        if not state:
            # as torch's fused AdamW has it: the count is an fp32 scalar on the device, so that no kernel waits for it
            state["step"] = torch.zeros((), device=local_tensor(param).device)
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(param), torch.zeros_like(param)
        return state


def _update_of(param: nn.Parameter, grad: Tensor, state: Mapping[str, Tensor], copy: Tensor | None) -> ParamUpdate:
    local, grad = local_tensor(param), local_tensor(grad)
    return ParamUpdate(
        local,
        # the kernel walks all tensors in the order of memory; autograd may give a transposed gradient
        grad if grad.stride() == local.stride() else grad.clone(memory_format=torch.contiguous_format),
        local_tensor(state["exp_avg"]),
        local_tensor(state["exp_avg_sq"]),
        state["step"],
        None if copy is None else local_tensor(copy),
    )


def build_optimizer(params: Iterable[nn.Parameter], section: TrainSection, decaying: Container[nn.Parameter]) -> AdamW:
    """AdamW (Loshchilov & Hutter 2019) over the trainable ones of `params`, which must be on their final meshes.

    A fused or foreach kernel takes tensors of one mesh only, so parameters on different meshes (or on none) are in
    groups of their own. For a CUDA graph the rate is a tensor.

    Args:
        decaying: those of `params` that weight decay applies to (`weight_decay.decay_by_name`).
    """
    params = list(params)
    groups: dict[tuple[bool, Any], list[nn.Parameter]] = defaultdict(list)
    for param in params:
        if param.requires_grad:
            groups[param in decaying, param.device_mesh if isinstance(param, DTensor) else None].append(param)
    ordered = sorted(groups.items(), key=lambda item: (not item[0][0], str(item[0][1])))
    return AdamW(
        [
            {"params": members, "weight_decay": section.weight_decay if decays else 0.0}
            for (decays, _), members in ordered
        ],
        lr=torch.tensor(section.lr, device=params[0].device) if section.is_graphed else section.lr,
        betas=section.betas,
        eps=section.eps,
        fused=True,
        capturable=section.is_graphed,
    )


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Use `lr` in the next step."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(lr)
        else:
            group["lr"] = lr

"""Private interfaces of FSDP2's units: gradients before their reduction, and a unit whose forward is not called."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule


class FsdpUnit:
    """What FSDP2, or a replica, gathers and reduces as one.

    Args:
        state: FSDP2's own, of `module`.
    """

    def __init__(self, module: nn.Module, state: Any) -> None:
        self.module, self._state = module, state
        # torch 2.11 keeps one group, 2.13 a list; a unit without parameters of its own has none
        groups = getattr(state, "_fsdp_param_groups", None)
        self._group = state._fsdp_param_group if groups is None else next(iter(groups), None)

    def parameters(self) -> list[nn.Parameter]:
        """The sharded parameters that are trained, always in the same order."""
        return [param.sharded_param for param in self._trainable()]

    def before_reduction(self, hook: Callable[[FsdpUnit], None]) -> None:
        """Call `hook` where a backward, or a pipeline schedule, is about to reduce this unit's gradients."""
        group = self._group
        if group is None:
            return
        post_backward = group.post_backward

        def hooked(*args: Any) -> None:
            if group.reduce_grads:
                hook(self)
            post_backward(*args)

        group.post_backward = hooked  # on the instance: FSDP2 calls it through the group, from hooks and schedules

    def at_end_of_backward(self, before: Callable[[], None], after: Callable[[], None]) -> None:
        """Call both around FSDP2's end of each backward that begins in this unit, or of a pipeline's."""
        end = self._state._root_post_backward_final_callback

        def hooked() -> None:
            # torch 2.11 lists a unit once a module of it, and would reduce its gradients as often
            states = self._state._state_ctx.all_states
            states[:] = dict.fromkeys(states)
            before()
            end()
            after()

        self._state._root_post_backward_final_callback = hooked

    def reduce_if_left(self) -> None:
        """At the end of a backward that has not reached this unit's input; FSDP2's own end does it in another order."""
        # post_backward sets this state first: a unit that has reduced in this backward is in it
        if self._group is not None and self._group._training_state.name != "POST_BACKWARD":
            self._group.post_backward()

    def unreduced_gradients(self, *, fill: bool) -> list[Tensor | None]:
        """Before a reduction: this rank's gradient of each of `parameters`, None for those that have none.

        Afterwards all have one dtype, which the reduction requires: after micro-batches that used different parameters
        some are kept in the reduction's dtype and some in the parameter's.

        Args:
            fill: give zeros to those that have none, after they have been looked at.
        """
        # FSDP2 makes the unsharded parameter at the first gather, and keeps sums over micro-batches beside its `.grad`
        params = [param for param in self._trainable() if hasattr(param, "_unsharded_param")]
        for param in params:
            param.accumulate_unsharded_grad_if_needed()
        upcast = any(param.unsharded_accumulated_grad is not None for param in params)
        found: dict[Any, Tensor | None] = {}
        for param in params:
            if upcast:
                param.to_accumulated_grad_if_needed()
            grad, kept = param._unsharded_param.grad, param.unsharded_accumulated_grad
            found[param] = grad if kept is None else kept
            if fill and found[param] is None:
                dtype = param.reduce_dtype if upcast else None
                param.unsharded_accumulated_grad = torch.zeros_like(param._unsharded_param, dtype=dtype).detach()
        return [found.get(param) for param in self._trainable()]

    def run_without_forward(self, x: Tensor, *, trained: bool) -> Tensor:
        """Gather, free and (in backward) gather and reduce this unit as a call of its module does, between which `x`
        passes unchanged.

        Args:
            x: a scalar.
            trained: whether the output requires a gradient although `x` does not, as that of trained parameters would.
        """
        args, _ = self._state._pre_forward(self.module, (x,), {})
        # the sum with a zero that requires a gradient stands for the module's computation with its parameters
        y = args[0] + torch.zeros((), dtype=args[0].dtype, device=x.device, requires_grad=trained)
        out: Tensor = self._state._post_forward(self.module, args, y)
        return out

    def run_backward_alone(self, x: Tensor, *, trained: bool) -> Tensor:
        """Gather and reduce this unit in a backward that will not reach its output; `x` passes unchanged between them.

        Args:
            x: a scalar.
            trained: whether the output requires a gradient although `x` does not, as that of trained parameters would.
        """
        if self._group is None:
            return x
        # backward runs from `out` to `x`: it gathers at the hook that is made last, and reduces at this one
        (y,), _ = self._group._register_post_backward_hook((x,), {})
        y = y + torch.zeros((), dtype=x.dtype, device=x.device, requires_grad=trained)
        out: Tensor = self._state._register_pre_backward_hook(y)
        return out

    def finish_forward(self, output: Any) -> Any:
        """Before the root's forward ends: do what follows on the last of this unit's modules, where it has called only
        some. torch 2.13 does it behind the root, in another order than where all were called, 2.11 not at all.

        Returns:
            `output`, at whose gradient the backward of this unit begins.
        """
        left = self._state._modules_to_run_forward
        if not left:
            return output
        left.clear()
        return self._state._post_forward(self.module, (), output)

    def _trainable(self) -> list[Any]:
        params = self._group.fsdp_params if self._group is not None else []
        return [param for param in params if param.sharded_param.requires_grad]


def fsdp_units(model: nn.Module) -> list[FsdpUnit]:
    """The units of `model`, each once, in the order of its modules."""
    states: dict[Any, nn.Module] = {}
    for module in model.modules():
        if isinstance(module, FSDPModule):
            states.setdefault(module._get_fsdp_state(), module)
    return [FsdpUnit(module, state) for state, module in states.items()]

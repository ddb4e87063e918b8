"""Other values to compare an unproven plan with: weights and tokens with which a model's code takes other ways.

[Note: what one batch does not show]
Numbers that are wrong on a shard need not matter on one batch: a limit that no norm reaches, a branch that is not
taken, a mask that hides nothing. Where rules prove every operator, that is no question: they hold for all values. Where
they do not, the sharded model is compared with large weights too, which reach limits, and with small ones, whose
sequences end in padding: large or small in the first half of each matrix's rows, so that ranks differ. With small
parameters, vectors too, no tanh of a large sum is 1 on every rank. Such numbers may be ill-conditioned: an error counts
only where it is far above what a change of the weights in their last digits makes of the unsharded model itself.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import Replicate

from colrow.dryrun.calls import Inputs
from colrow.sharding.parameter_state import copied_model
from colrow.verifying.comparison import Errors, Observed, Reference, Sharded, compare
from colrow.verifying.double_casts import Rounding
from colrow.verifying.step import Task, reference_step

LARGE, SMALL = (1e3, 30.0), (1e-4,)
"""Factors of half of the rows; of several, the first with which the unsharded model's numbers are finite."""
ALL_SMALL = (1e-3,)
"""Factor of all parameters: the biases of norms alone make large sums."""
_LAST_DIGITS = 1e-13
TOLERATED = 1e-6
"""Relative error, and so many times larger than the model's own it has to be: `_ILL`. A wrong operator's is near 1."""
_ILL = 1e4


@dataclass(frozen=True)
class OtherValues:
    """The task with other values, and the step of the unsharded model."""

    name: str
    task: Task
    reference: Reference

    def refute(self, errors: Errors, tolerance: float) -> bool:
        """Whether the errors of a sharded model, of which `tolerance` is rounding, show that it is wrong."""
        return errors.worst > max(TOLERATED, tolerance) and errors.worst > _ILL * self._own_error

    @property
    def _own_error(self) -> float:
        changed = copied_model(self.task.model)
        generator = torch.Generator().manual_seed(self.task.seed)
        with torch.no_grad():
            for param in changed.parameters():
                noise = torch.randn(param.shape, generator=generator, dtype=param.dtype)
                param.mul_(1 + _LAST_DIGITS * noise)
        return compare(_observed(reference_step(self.task, changed)), self.reference, 1).worst


def other_values(task: Task) -> Iterator[OtherValues]:
    """With large weights, with small ones, and with small parameters, in fp64, also where code casts to fp32; none with
    which the unsharded model does not run so, or not to finite numbers."""
    if any(param.dtype != torch.float64 for param in task.model.parameters() if param.is_floating_point()):
        return
    task = replace(task, double_casts=True)
    ways = {"large weights": LARGE, "small weights and padding": SMALL, "small parameters": ALL_SMALL}
    for name, factors in ways.items():
        for factor in factors:
            inputs = _padded(task) if factors is SMALL else task.inputs
            changed = replace(
                task,
                model=_scaled(task.model, factor, halves=factors is not ALL_SMALL),
                inputs=inputs,
                next_forward=False,
            )
            with Rounding() as rounding:
                found = with_reference(name, changed)
            if found is not None and not rounding.seen:
                yield found
                break


def with_reference(name: str, task: Task) -> OtherValues | None:
    """With the unsharded model's step; None where it raises, as code may with such values, or is not finite."""
    try:
        reference = reference_step(task, copied_model(task.model))
    except Exception:
        return None
    found = OtherValues(name, replace(task, written_buffers=reference.written), reference)
    return found if _is_finite(reference) else None


def _scaled(model: nn.Module, factor: float, *, halves: bool) -> nn.Module:
    """A copy in which the first half of each matrix's rows, or everything, is multiplied."""
    scaled = copied_model(model)
    with torch.no_grad():
        for param in scaled.parameters():
            if not halves:
                param.mul_(factor)
            elif param.ndim > 1:
                param[: -(-len(param) // 2)].mul_(factor)
    return scaled


def _padded(task: Task) -> Inputs:
    """Token ids [B, T] whose last quarter is the padding token of the model's config, or token 0."""
    token = getattr(getattr(task.model, "config", None), "pad_token_id", None)
    padding = token if isinstance(token, int) and token >= 0 else 0

    def ended(x: Any) -> Any:
        if not isinstance(x, Tensor) or x.dtype not in (torch.int32, torch.int64) or x.ndim != 2:
            return x
        x = x.clone()
        x[:, x.shape[1] - x.shape[1] // 4 :] = padding
        return x

    return Inputs.of(task.inputs).map(ended)


def _observed(step: Reference) -> Observed:
    """An unsharded step as if one rank had made it."""
    gradients, parameters, buffers = (
        {name: Sharded(tuple(x.shape), (Replicate(),), None, {0: x}) for name, x in kind.items()}
        for kind in (step.gradients, step.parameters, step.buffers)
    )
    return Observed({0: step.loss}, {}, gradients, parameters, buffers)


def _is_finite(reference: Reference) -> bool:
    tensors = [*reference.gradients.values(), *reference.buffers.values()]
    return math.isfinite(reference.loss) and all(bool(tensor.isfinite().all()) for tensor in tensors)

"""What a model draws in training, and of which tensors' shards: found on fake tensors."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from colrow.dryrun.calls import GivenInputs, Inputs, Loss, call_model, default_loss, example_inputs
from colrow.dryrun.code_caches import caches_forgotten
from colrow.dryrun.fake_world import materialize_fake, meta_copy
from colrow.dryrun.lockstep import draws_by_module
from colrow.dryrun.planned_step import PlannedStep
from colrow.errors import first_line
from colrow.plans.plan import Plan
from colrow.sharding.draws import Draw, draws
from colrow.sharding.local_layout import REPLICATED
from colrow.torch_compat import TorchDispatchMode, fake_tensors

_DRAW_NOTHING = (nn.Linear, nn.Embedding, nn.RMSNorm, nn.LayerNorm, nn.ModuleList)


@dataclass(frozen=True)
class RandomDraws:
    """What a model draws in a forward.

    Attributes:
        any: it draws anything; None: unknown.
        modules: what each module's own code draws by element in one call, in order; empty where each rank draws as one
            process does.
        unknown: modules that draw for a shard of which nothing says what it is a shard of, and why.
    """

    any: bool | None = None
    modules: Mapping[str, tuple[Draw, ...]] = field(default_factory=dict)
    unknown: Mapping[str, str] = field(default_factory=dict)

    @property
    def on_shards(self) -> list[str]:
        """The modules that draw for a shard."""
        return [name for name, found in self.modules.items() if any(d.layout != REPLICATED for d in found)]


def model_draws(
    model: nn.Module,
    batch_size: int,
    seq_len: int,
    *,
    inputs: GivenInputs | None = None,
    dtype: torch.dtype | None = None,
) -> bool | None:
    """Whether a forward of the model, in the modes of its modules, draws random numbers; None where it does not run
    without values."""
    if all(type(m).__module__.startswith("colrow.models.") or type(m) in _DRAW_NOTHING for m in model.modules()):
        return False
    copy, seen = meta_copy(model), DrawsSeen()
    try:
        with caches_forgotten(model), fake_tensors(), torch.no_grad():
            materialize_fake(copy, dtype)
            given = example_inputs(copy, batch_size, seq_len) if inputs is None else Inputs.of(inputs)
            with seen:
                call_model(copy, given.like_on_cpu())
    except Exception:
        # code that needs values does not run to its end here; what it drew before counts
        return True if seen.drew else None
    return seen.drew


def random_draws(
    model: nn.Module,
    plan: Plan,
    tp: int,
    batch_size: int,
    seq_len: int,
    *,
    inputs: GivenInputs | None = None,
    loss: Loss = default_loss,
    dtype: torch.dtype | None = None,
) -> RandomDraws:
    """What the model, which may be on the meta device, draws in a forward under `plan` on `tp` ranks, more than one."""
    drew = model_draws(model, batch_size, seq_len, inputs=inputs, dtype=dtype)
    if drew is False:
        return RandomDraws(False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = draws_by_module(PlannedStep(model, plan, tp, batch_size, seq_len, inputs, loss, dtype))
    if isinstance(found, Exception):
        why = f"{type(found).__name__}: {first_line(found)[:120]}"
        return RandomDraws(drew, unknown={"": f"it does not run on tensors without values ({why})"})
    unknown = {
        name: "nothing says what the tensor is a shard of"
        for name, drawn in found.draws.items()
        if not all(draw.is_known for draw in drawn)
    }
    unknown |= {u.where: u.reason for u in found.unproven if "random numbers" in u.reason or u.operator == "dropout"}
    known = {name: drawn for name, drawn in found.draws.items() if name not in unknown}
    arranged = any(draw.is_arranged for drawn in known.values() for draw in drawn)
    return RandomDraws(drew, known if arranged else {}, unknown)


class DrawsSeen(TorchDispatchMode):
    """Whether a random number was drawn, by whatever generator."""

    drew = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.drew |= draws(func, args, kwargs or {})
        return func(*args, **(kwargs or {}))

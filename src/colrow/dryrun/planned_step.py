"""One step of a model under a plan: what the dry run, the check, a proof and the decision to train all ask about."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from colrow.dryrun.calls import GivenInputs, Inputs, Loss, default_loss, example_inputs
from colrow.plans.plan import Plan


@dataclass(frozen=True)
class PlannedStep:
    """A forward and a backward of a model under a plan, on one of `tp` ranks.

    Attributes:
        model: may be on the meta device; nobody changes it.
        batch_size: sequences on one rank.
        inputs: example arguments; unless given, what the model takes by [Note: example inputs].
        loss: of the model's output, as it returns it, and the inputs.
        dtype: of floating-point parameters and buffers; the model's own by default.
    """

    model: nn.Module
    plan: Plan
    tp: int
    batch_size: int = 1
    seq_len: int = 128
    inputs: GivenInputs | None = None
    loss: Loss = default_loss
    dtype: torch.dtype | None = None

    def fake_inputs(self, model: nn.Module) -> Inputs:
        """The arguments of a copy of the model, under fake tensors."""
        given = self.inputs
        inputs = example_inputs(model, self.batch_size, self.seq_len) if given is None else Inputs.of(given)
        return inputs.like_on_cpu()

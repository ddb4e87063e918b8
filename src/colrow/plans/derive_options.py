"""What a derivation may use, and the names of derived plans."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from colrow.errors import PlanError, did_you_mean
from colrow.plans.loss import LOSSES, Loss

Styles = Literal["plain", "fast", "overlap"]
DERIVED: dict[str, Styles] = {"derive": "plain", "derive-fast": "fast", "derive-overlap": "overlap"}
"""What a config or a command line calls a derived plan, and the styles that it is written in."""


@dataclass(frozen=True, kw_only=True)
class DeriveOptions:
    """What a derivation may use."""

    sequence_parallel: bool = True
    """Norms and residuals on shards of the sequence, where the graph allows it."""
    loss: Loss = "vocab_parallel"
    """`vocab_parallel` leaves the logits sharded over the vocabulary, where a head makes them. `linear`, with fast
    styles only: the head gives the loss."""
    styles: Styles = "plain"
    """`plain` (torch's and their like), `fast`, or `overlap` (fast, with chunks on the copy engines)."""
    wide_norms: bool = True
    """Split heads even where a norm spans all of them (OLMo2), at a small reduction in that norm."""
    keep_whole: tuple[str, ...] = ()
    """Modules or parameters that stay unsharded, as a plan's keys name them (`blocks.*.attn`)."""
    split: tuple[str, ...] = ()
    """Modules or parameters whose matrices must be split; where one cannot be, derive raises with the reason."""

    def check(self) -> None:
        """Raise PlanError for what is unknown, or does not fit together."""
        for name, value, known in (("styles", self.styles, get_args(Styles)), ("loss", self.loss, LOSSES)):
            if value not in known:
                raise PlanError(f"unknown {name} {value!r}{did_you_mean(str(value), known)}")
        if self.styles == "plain" and self.loss == "linear":
            raise PlanError("loss linear is derived with fast styles only: take derive-fast, or a preset")
        if self.styles != "plain" and not self.sequence_parallel:
            raise PlanError("fast styles hold shards of the tokens between blocks: leave sequence_parallel on")

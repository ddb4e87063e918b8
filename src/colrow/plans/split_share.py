"""How much of a model a plan splits, and why not more."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from typing import Any

from torch import nn

from colrow.plans.patterns import with_stars
from colrow.plans.plan import USEFUL, Plan

# A derivation notes `dim 0 (4096): why; dim 1 (1024): why`. Without sizes and numbers of layers, equal reasons are one.
_DIM = re.compile(r"dim \d+ \(\d+\): ")
_NUMBER = re.compile(r"\.\d+\b")


@dataclass(frozen=True)
class SplitShare:
    """The share of a model's parameters that a plan splits over tp, and the reasons for the rest.

    Attributes:
        split: elements that are split, over all elements.
        rest: the largest reasons first: the share that is replicated for it, the largest of its parameters, the reason.
        flops: the share of the floating-point operations of forward that is split; None where no dry run counted them.
    """

    tp: int
    split: float
    rest: tuple[tuple[float, str, str], ...]
    flops: float | None = None

    @classmethod
    def of(cls, model: nn.Module, plan: Plan, tp: int, flops: float | None = None) -> SplitShare:
        """Raises PlanError where the plan does not fit the model at this degree."""
        layouts = plan.parameters(model, tp)
        total, split = 0, 0  # elements
        by_reason: Counter[str] = Counter()
        largest: dict[str, tuple[int, str]] = {}
        for name, param in model.named_parameters():
            total += param.numel()
            if layouts[name].local_shape != tuple(param.shape):
                split += param.numel()
                continue
            reason = _main_reason(plan.notes.get(name) or layouts[name].reason)
            by_reason[reason] += param.numel()
            if param.numel() > largest.get(reason, (-1, ""))[0]:  # a parameter may have no elements
                largest[reason] = param.numel(), with_stars(name)
        rest = tuple((count / max(total, 1), largest[why][1], why) for why, count in by_reason.most_common())
        return cls(tp, split / max(total, 1), rest, flops)

    @property
    def is_small(self) -> bool:
        """Whether it is worth a warning."""
        return self.tp > 1 and min(self.split, 1.0 if self.flops is None else self.flops) < USEFUL

    def summary(self) -> str:
        """One line: the shares."""
        flops = "" if self.flops is None else f" and {self.flops:.0%} of the FLOPs"
        share = f"{self.split:.0%} of the parameters{flops} are split over tp={self.tp}"
        if not self.is_small:
            return share
        if not self.split:
            return f"{share}: nothing is saved"
        return f"only {share}: each rank holds and computes the rest as without tp"

    def reasons(self) -> list[str]:
        """One line for each of the three largest reasons for the rest."""
        return [f"{part:.0%} replicated, {name} for one: {why}" for part, name, why in self.rest[:3] if part >= 0.01]

    def to_data(self) -> dict[str, Any]:
        """What `colrow plan --json` and `colrow check --json` print: shares between 0 and 1."""
        reasons = [{"share": part, "parameter": name, "reason": why} for part, name, why in self.rest[:3]]
        return {"parameters": self.split, "flops": self.flops, "reasons": reasons}


def _main_reason(text: str) -> str:
    """Of the reasons of a parameter's dimensions the one that another degree takes away, else the first; alike for all
    layers."""
    reasons = _NUMBER.sub(".*", _DIM.sub("", text)).split("; ")
    return next((why for why in reasons if why.startswith("not divisible by")), reasons[0])

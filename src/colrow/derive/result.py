"""The plan that was derived, and why it is as it is."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from colrow.derive.choice import Choice
from colrow.derive.trace import Trace
from colrow.plans.plan import USEFUL, Plan

if TYPE_CHECKING:
    from colrow.derive.judged import Judgement

_log = logging.getLogger("colrow")


@dataclass
class Derivation:
    """A derived plan and why it is as it is."""

    tp: int
    modules: dict[str, Any]
    """Patterns to styles, as a plan says them."""
    loss: str
    sharded: list[str]
    """Names of the parameters of which a rank uses a part."""
    replicated: dict[str, str]
    """Each parameter that is not sharded, and why, in one line."""
    legal: list[int]
    """Degrees that divide every class that was chosen."""
    reductions: dict[str, int]
    """Reductions in one forward pass, by the module pattern that makes them."""
    unknown: dict[str, int]
    """Operators without a rule, and how often."""
    notes: list[str] = field(default_factory=list)
    """What was given up on the way, and why."""
    refused: dict[str, str] = field(default_factory=dict)
    """What the judge refused to see sharded, by its first module, and why."""
    sequence_parallel: bool = False
    share: float = 0.0
    """Share of the parameters' elements of which a rank holds a part."""
    choice: Choice | None = None
    trace: Trace | None = None
    made: Any = field(default=None, repr=False)
    """The split, the stream and the emission that this was made of; None where nothing was traced."""
    judgement: Judgement | None = None
    """What check and verify say of the plan, where these judged it."""

    def plan(self, name: str = "derived") -> Any:
        """The plan."""
        return Plan(modules=self.modules, loss=self.loss, name=name, notes=self.refused | self.replicated)  # type: ignore[arg-type]

    def warn_of_small_share(self, name: str) -> None:
        """Log a warning where most of the model is left unsharded: such a plan saves little."""
        if self.tp > 1 and self.share < USEFUL:
            why = "; ".join(self.notes[:3]) or "the plan's notes say why"
            _log.warning("a derived plan splits only %.0f%% of %s over tp=%d: %s", 100 * self.share, name, self.tp, why)

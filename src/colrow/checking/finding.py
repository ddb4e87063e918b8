"""A finding of the check, and the table of codes."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Literal

from colrow.errors import PlanError

Severity = Literal["error", "warning"]


@dataclass(frozen=True)
class Code:
    """A stable code: its readable name, how bad it is, and what happens without a fix, in one line."""

    slug: str
    severity: Severity
    effect: str


CODES: dict[str, Code] = {
    # names: does each key match the modules that it is meant for?
    "CR101": Code("key-matches-nothing", "error", "the modules that were meant stay unsharded"),
    "CR102": Code("module-matched-twice", "error", "two styles would be applied to one module"),
    "CR103": Code("shared-module", "error", "one module has two names, and the plan gives them different styles"),
    "CR104": Code("already-parallel", "error", "its parameters would be split a second time"),
    "CR105": Code("nothing-split", "warning", "every rank holds and computes everything"),
    "CR106": Code("model-changed", "warning", "the plan may miss what is new, or split what should not be split"),
    # sizes: can each tensor be split?
    "CR201": Code("features-do-not-divide", "error", "shards of unequal size: a hang or an abort"),
    "CR202": Code("heads-do-not-divide", "error", "a rank would hold a fraction of a head"),
    "CR203": Code("kv-heads-do-not-divide", "error", "a rank would hold a fraction of a kv head"),
    "CR204": Code("rank-without-vocabulary", "error", "a rank has no rows to look up, or no logits"),
    "CR205": Code("sequence-does-not-divide", "error", "shards of unequal size: a hang or an abort"),
    "CR206": Code("module-type", "error", "the style does not support this class"),
    "CR207": Code("linear-with-children", "error", "the style would register the children's parameters as its own"),
    "CR208": Code("fused-weight", "error", "wrong numbers, no exception: a shard mixes the fused parts"),
    "CR209": Code(
        "head-count-in-view", "error", "wrong numbers, no exception: heads are split across the head dimension"
    ),
    "CR210": Code("segments-do-not-divide", "error", "a segment of a fused weight cannot be split evenly"),
    "CR211": Code("style-options", "error", "the style cannot be applied"),
    "CR212": Code("buffer-not-split", "error", "an unsharded buffer meets a shard"),
    "CR213": Code("whole-kv-heads", "error", "wrong numbers, no exception: query heads use other groups' kv heads"),
    # ends: head, loss, ties
    "CR301": Code(
        "local-vocabulary-shard", "error", "wrong numbers: each rank computes the loss over its vocabulary shard alone"
    ),
    "CR302": Code("whole-logits", "warning", "the vocabulary-parallel loss saves no memory"),
    "CR303": Code("loss-gets-dtensor", "error", "the ordinary loss cannot take split logits"),
    "CR304": Code("tie-split", "error", "tied weights come apart, each with half of the gradient"),
    "CR305": Code("log-softmax-in-loss", "error", "exact loss, wrong gradients of every parameter"),
    "CR306": Code("loss-unsupported", "error", "the loss cannot be computed on split logits"),
    "CR307": Code("tie-over-stages", "warning", "exact loss, each stage's copy gets one term of the gradient"),
    # activations: what the dry run sees
    "CR401": Code("fails-in-parallel", "error", "the first step raises"),
    "CR402": Code("mixed-tensors", "error", "the first step raises"),
    "CR403": Code("keyword-input", "error", "the first step raises"),
    "CR404": Code("no-sharding-rule", "error", "the first step raises"),
    "CR405": Code("output-shape", "error", "wrong numbers: a dimension has another size than in the unsharded model"),
    "CR406": Code("whole-declared-shard", "error", "wrong numbers: a dimension becomes tp times longer"),
    "CR407": Code("part-declared-whole", "error", "wrong numbers: each rank uses its own shard as the complete tensor"),
    "CR408": Code("hidden-communication", "warning", "right numbers, more communication than necessary"),
    "CR409": Code("counted-tp-times", "error", "wrong numbers: a value is summed once for each rank"),
    "CR410": Code("not-run", "warning", "the dry run's checks could not be made"),
    "CR411": Code("sums-rounded", "warning", "sums over tp are made in a smaller type than those over the data axes"),
    "CR412": Code("unfinished-input", "error", "the backward of a compiled block raises"),
    "CR413": Code("reduced-part", "error", "wrong numbers, no exception: a softmax or top-k over one rank's shard"),
    "CR414": Code("unproven", "warning", "nothing proves that the numbers are right"),
    "CR415": Code("buffer-from-shard", "error", "wrong numbers: each rank keeps values of its own in a buffer"),
    # gradients
    "CR501": Code("partial-gradient", "error", "exact loss, wrong gradient: a partial sum is used as the sum"),
    "CR502": Code("gradient-times-tp", "error", "exact loss, wrong gradient: tp times too large"),
    "CR503": Code("no-gradient", "error", "the parameter never trains"),
    "CR504": Code(
        "partial-activation-gradient", "error", "exact loss, wrong gradients of everything before this point"
    ),
    "CR505": Code("nothing-trains", "warning", "every parameter is frozen"),
}


NOT_PROVEN = ("CR410", "CR414")
"""Findings that say that the check could not judge: a proof settles them."""


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong with a plan for a model.

    Attributes:
        code: stable, such as CR501; `docs/checks/CODE.md` explains it.
        severity: an error makes training fail or its numbers wrong; a warning costs speed or deserves a look.
        where: a module's or parameter's name, `*` for the number of every layer, or a key of the plan.
        message: what is wrong and its consequence.
        fix: what to change.
    """

    code: str
    severity: Severity
    where: str
    message: str
    fix: str

    @property
    def slug(self) -> str:
        """The code's readable name."""
        return CODES[self.code].slug

    @property
    def page(self) -> str:
        """The page that explains the code, from the repository's root."""
        return f"docs/checks/{self.code}.md"

    @property
    def lines(self) -> list[str]:
        """Code and place, then message, fix and page, indented: for a terminal or an error's text."""
        head = f"{self.severity} {self.code} {self.slug} at {self.where}"
        return [head, f"  what  {self.message}", f"  fix   {self.fix}", f"  more  {self.page}"]

    def to_data(self) -> dict[str, str]:
        """The finding as `colrow check --json` prints it."""
        return asdict(self)

    def __str__(self) -> str:
        return f"{self.code} {self.slug} {self.severity} at {self.where}: {self.message}; {self.fix} ({self.page})"


def finding_of(error: PlanError, where: str) -> Finding:
    """The finding that reports an error. An error with a text alone, such as one of a user's own style, is CR211 at
    `where`."""
    if not error.code:
        return finding("CR211", where, str(error), "correct the style's options")
    return finding(error.code, error.where or where, error.message, error.fix)


def finding(code: str, where: str, message: str, fix: str) -> Finding:
    """A finding with its code's severity."""
    return Finding(code, CODES[code].severity, where, message, fix)

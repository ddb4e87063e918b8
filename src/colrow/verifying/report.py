"""The result of verify, as data."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from math import inf
from typing import Any, Literal

Verdict = Literal["proved", "wrong", "inconclusive"]
Mode = Literal["train", "eval"]


@dataclass(frozen=True)
class Worst:
    """A parameter, the relative error of its gradient, and whether a copy that ranks should share differs on them."""

    name: str
    rel_err: float
    ranks_differ: bool = False


@dataclass(frozen=True)
class Control:
    """The negative control: a change that makes the sharded model wrong, and the error that the comparison finds.

    `caught` is whether that error is far above the tolerance.
    """

    change: str
    rel_err: float
    caught: bool


@dataclass(frozen=True)
class Report:
    """What was compared, and the relative errors.

    Attributes:
        verdict: `proved`: all errors are within the tolerance, and the comparison found the error of a negative
            control. `wrong`: an error is above the tolerance, or the sharded model raised. `inconclusive`: all errors
            are within the tolerance, but no change that was tried made the model wrong, so the comparison may be blind;
            or ranks could be neither simulated nor started.
        parameters: how many parameters were compared.
        reduced: the sizes in which the verified model is smaller, or None when it was taken as it is.
        loss_rel_err, max_grad_rel_err, max_step_rel_err: of the loss, of any gradient, and of any parameter after one
            optimizer step; infinite when the sharded model raised.
        max_buffer_rel_err: of any buffer that forward writes, after forward and after the step.
        next_loss_rel_err: of the loss of another forward after the step.
        modes: in which the models were compared: train, and eval where the unsharded model computes something else.
        training_failure: the exception of the unsharded model in training mode, where it only runs in evaluation mode.
        values: with which other weights, tokens and counts they were compared too ([Note: what one batch does not
            show], [Note: counters]).
        dropout_off: the model has dropout, which was off.
        worst: the parameters with the largest errors of their gradients, largest first.
        cause: the usual reason for such a pattern of errors; empty without errors.
        failure: the exception of the sharded model, if it raised; why no ranks could be had.
        control: the last negative control that was tried; None without one, or where the verdict is `wrong`.
    """

    verdict: Verdict
    tp: int
    backend: str
    parameters: int
    tolerance: float
    reduced: str | None
    seconds: float
    loss_rel_err: float = inf
    max_grad_rel_err: float = inf
    max_step_rel_err: float = inf
    max_buffer_rel_err: float = inf
    next_loss_rel_err: float = inf
    modes: tuple[Mode, ...] = ("train",)
    training_failure: str = ""
    values: tuple[str, ...] = ()
    dropout_off: bool = False
    worst: tuple[Worst, ...] = ()
    cause: str = ""
    failure: str = ""
    control: Control | None = None

    @property
    def ok(self) -> bool:
        """Whether the plan is proved right."""
        return self.verdict == "proved"

    def to_data(self) -> dict[str, Any]:
        """The report as `colrow verify --json` prints it: without its seconds, which differ from call to call."""
        tree = asdict(self)
        del tree["seconds"]
        return {"ok": self.ok, **tree}

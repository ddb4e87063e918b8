"""Which degrees of tensor parallelism all modules of a plan allow: what a fix may say."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

from torch import nn

from colrow.checking.finding import Finding
from colrow.errors import PlanError
from colrow.plans.plan import Plan
from colrow.styles.base import Style
from colrow.styles.site import Site

_DIVISIBILITY = ("CR201", "CR202", "CR203", "CR204", "CR210")
"""Codes of findings that another degree can cure."""
_MOST = 64


def legal_degrees(model: nn.Module, styles: Mapping[str, Style]) -> list[int]:
    """The degrees up to 64 at which no style on its module misses a divisor."""
    return [tp for tp in range(1, _MOST + 1) if not any(_refuses(model, fqn, styles[fqn], tp) for fqn in styles)]


def with_legal_degrees(
    found: list[Finding], model: nn.Module, styles: Mapping[str, Style], divides: Callable[[int], bool]
) -> list[Finding]:
    """The findings with one answer to all of one kind: a degree that one module allows, others may not.

    Args:
        divides: whether a degree divides the sequence, where the plan splits it.
    """
    if not any(f.code in _DIVISIBILITY for f in found):
        return found
    fits = legal_degrees(model, styles)
    legal = [tp for tp in fits if divides(tp)]
    if len(legal) == 1 and len(fits) > 1:  # the one is tp=1, which fits always
        fix = f"choose tp from {', '.join(map(str, fits[:9]))}, with a seq_len that it divides"
    elif len(legal) > 1:
        fix = f"choose tp from {', '.join(map(str, legal[:9]))}"
    else:
        fix = "no tp above 1 fits all modules of this plan: leave modules out of it, or use plan: derive"
    # the degree that is chosen divides the sequence, too
    return [replace(f, fix=_with_alternative(f, fix)) if f.code in (*_DIVISIBILITY, "CR205") else f for f in found]


def _with_alternative(found: Finding, fix: str) -> str:
    return f"{fix}, or replicate the kv heads with style kv_replicate" if found.code == "CR203" else fix


def _refuses(model: nn.Module, fqn: str, style: Style, tp: int) -> bool:
    if tp == 1:
        return False
    try:
        style.check(Site(model, fqn, tp))
    except PlanError as error:
        return error.code in _DIVISIBILITY
    return False


def plan_degrees(model: nn.Module, plan: Plan) -> list[int]:
    """`legal_degrees` of a plan whose keys match the model. Raises PlanError where they do not."""
    return legal_degrees(model, plan.styles_of(model))

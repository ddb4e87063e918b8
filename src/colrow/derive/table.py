"""The rule table, loaded, and inference over a trace."""

from __future__ import annotations

from typing import Any

from colrow.derive import rules_channels, rules_einsum, rules_pieces, rules_pointwise, rules_products, rules_views
from colrow.derive.infer import RULES, AxisInference
from colrow.derive.trace import Trace

__all__ = [
    "RULES",
    "infer",
    "rules_channels",
    "rules_einsum",
    "rules_pieces",
    "rules_pointwise",
    "rules_products",
    "rules_views",
]


def infer(traced: Trace, **options: Any) -> AxisInference:
    """The axes of a traced model."""
    return AxisInference(traced.program.graph, traced.parameters, traced.constants, traced.inputs, **options)

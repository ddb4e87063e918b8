"""How a plan's loss is computed."""

from __future__ import annotations

from typing import Literal, get_args

Loss = Literal["vocab_parallel", "replicated", "linear"]
"""`vocab_parallel`: on logits that stay sharded over the vocabulary. `replicated`: on all logits. `linear`: head and
loss in one; no rank holds all logits."""
LOSSES: tuple[Loss, ...] = get_args(Loss)

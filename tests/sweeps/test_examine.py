"""When an error is rounding, and when it is an error."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.models.examine import LARGEST_ROUNDING, TOLERANCE_FP32, rounding, within
from colrow.verifying.comparison import Errors


class KeyBias(nn.Module):
    """Attention in fp32 whose key has a bias: added to all scores of a query alike, its gradient is zero."""

    def __init__(self, d: int = 16) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(d, d) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(self.q(x), self.k(x), self.v(x))


def test_only_what_rounding_moves_may_differ_more() -> None:
    torch.manual_seed(0)
    model, inputs = KeyBias(), (torch.randn(2, 8, 16),)
    noise = rounding(model, inputs)
    assert noise["k.bias"] > 10 * TOLERANCE_FP32 > max(noise["q.weight"], noise["k.weight"], noise["v.bias"])
    exact = dict.fromkeys(noise, 0.0)
    allowed = min(2 * noise["k.bias"], LARGEST_ROUNDING)

    def passes(loss: float = 0.0, fp32: bool = True, **gradients: float) -> bool:
        errors = {**exact, **{name.replace("_", "."): error for name, error in gradients.items()}}
        return within(Errors(loss, errors, {"k.bias": 0.0}), fp32, model, inputs)

    assert passes()
    assert passes(k_bias=allowed)
    assert not passes(k_bias=allowed, fp32=False)
    assert not passes(k_bias=5 * noise["k.bias"])
    assert not passes(k_bias=allowed, k_weight=10 * TOLERANCE_FP32)
    assert not passes(loss=10 * TOLERANCE_FP32, k_bias=allowed)

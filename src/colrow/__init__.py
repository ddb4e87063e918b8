"""colrow: tensor-parallel training for PyTorch. Plan, check, verify, forecast, train, keep."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from colrow.checking.check import check as check
    from colrow.dryrun.random_draws import random_draws as random_draws
    from colrow.forecasting.forecast import forecast as forecast
    from colrow.mesh import Mesh as Mesh
    from colrow.ops.linear_cross_entropy import linear_cross_entropy as linear_cross_entropy
    from colrow.parallel.loss import loss_context as loss_context
    from colrow.parallel.loss import model_loss as model_loss
    from colrow.parallel.parallelize import parallelize as parallelize
    from colrow.parallel.random_draws import arrange_draws as arrange_draws
    from colrow.plans.plan import Plan as Plan
    from colrow.sharding.layout import full_tensor as full_tensor
    from colrow.styles.fast.peak_history import PeakHistory as PeakHistory
    from colrow.verifying.verify import verify as verify

__version__ = "0.1.0"

# Imported at first use: `colrow --help` should not wait for torch.
_PUBLIC = {
    "Mesh": "colrow.mesh",
    "check": "colrow.checking.check",
    "verify": "colrow.verifying.verify",
    "forecast": "colrow.forecasting.forecast",
    "PeakHistory": "colrow.styles.fast.peak_history",
    "Plan": "colrow.plans.plan",
    "linear_cross_entropy": "colrow.ops.linear_cross_entropy",
    "full_tensor": "colrow.sharding.layout",
    "loss_context": "colrow.parallel.loss",
    "model_loss": "colrow.parallel.loss",
    "parallelize": "colrow.parallel.parallelize",
    "random_draws": "colrow.dryrun.random_draws",
    "arrange_draws": "colrow.parallel.random_draws",
}
__all__ = sorted(_PUBLIC)


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'colrow' has no attribute {name!r}")
    return getattr(importlib.import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return [*globals(), *_PUBLIC]

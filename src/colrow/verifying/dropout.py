"""Dropout switched off while models are compared, where it is unknown what the masks of shards are shards of."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode

_DROPOUTS = {
    getattr(F, name)
    for name in ("dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "feature_alpha_dropout")
} | {torch.dropout, torch.dropout_, torch.native_dropout, torch.alpha_dropout, torch.feature_dropout}
_WITH_DROPOUT = {F.scaled_dot_product_attention: 4, F.multi_head_attention_forward: 10}
"""Functions with an argument dropout_p, and its position."""


_MODULES = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)


class Dropout(TorchFunctionMode):
    """Makes every dropout the identity. `seen`: one would have dropped something."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in _DROPOUTS:
            p = kwargs.get("p", args[1] if len(args) > 1 else 0.5)
            training = kwargs.get("training", kwargs.get("train", args[2] if len(args) > 2 else True))
            self.seen |= bool(training) and p > 0
            x = args[0] if args else kwargs["input"]
            return (x, torch.ones_like(x, dtype=torch.bool)) if func is torch.native_dropout else x
        if func in _WITH_DROPOUT:
            position = _WITH_DROPOUT[func]
            p = kwargs.get("dropout_p", args[position] if len(args) > position else 0.0)
            self.seen |= p > 0 and kwargs.get("training", True)
            if len(args) > position:  # only its dropout is off: attention itself runs
                args = (*args[:position], 0.0, *args[position + 1 :])
            elif p > 0:
                kwargs["dropout_p"] = 0.0
        return func(*args, **kwargs)


@contextmanager
def without_dropout(model: nn.Module, *, off: bool = True) -> Iterator[Dropout]:
    """Within, neither the model's dropout modules nor its code drop anything, if `off`."""
    if not off:
        yield Dropout()
        return
    with Dropout() as mode:
        for module in model.modules():  # a function of torch may call another that the mode does not see
            if isinstance(module, _MODULES):
                mode.seen |= module.training and module.p > 0
                module.p = 0.0
            elif isinstance(module, nn.RNNBase):
                mode.seen |= module.training and module.dropout > 0
                module.dropout = 0.0
        yield mode

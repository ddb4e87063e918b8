"""Flattened tokens as [sequences, tokens, ...]; see [Note: two views of flattened tokens]
A rank's B T / n tokens are viewed as B sequences of T/n tokens, which they are not: of B = n sequences each rank holds
one. Code between the blocks is right when it treats each token alone, in whichever order they come. A dry run shows it
in two walks: in one a rank's tokens are taken for a shard of dim 1, in the other for complete sequences, a shard of dim
0. What is right in both mixes neither the tokens of a sequence nor the sequences.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor

_view = {"complete sequences": False}


def unflatten_tokens(y_ND: Tensor, like: Tensor) -> Tensor:
    """Flattened tokens [N, ...] as [B, N/B, ...], where `like` is [B, T, ...] with tokens of as many dims; as they are
    where `like` is flattened too."""
    flattened = like.dim() - y_ND.dim() + 1
    if flattened == 1:
        return y_ND
    if _view["complete sequences"]:
        return y_ND.view(-1, *like.shape[1:flattened], *y_ND.shape[1:])
    return y_ND.view(*like.shape[: flattened - 1], -1, *y_ND.shape[1:])


def views_complete_sequences() -> bool:
    """Whether a rank's tokens are viewed as complete sequences now."""
    return _view["complete sequences"]


@contextmanager
def complete_sequences() -> Iterator[None]:
    """View a rank's tokens as complete sequences, of which there must be a multiple of the ranks: for a dry run; see
    [Note: two views of flattened tokens]."""
    _view["complete sequences"] = True
    try:
        yield
    finally:
        _view["complete sequences"] = False

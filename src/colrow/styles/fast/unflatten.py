"""Flattened tokens viewed as [sequences, tokens, ...], in one of two ways.

[Note: two views of flattened tokens]
A rank's B T / n tokens are viewed as B sequences of T/n tokens, which they are not: of B = n sequences each rank holds
one. Code between the blocks is right when it treats each token alone, in whichever order they come. A dry run shows it
in two walks: in one a rank's tokens are taken for a shard of dim 1, in the other for complete sequences, a shard of dim
0. What is right in both mixes neither the tokens of a sequence nor the sequences.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

_view = {"complete sequences": False}
_holders: list[Callable[[Tensor], bool]] = []


def unflatten_tokens(y_ND: Tensor, like: Tensor) -> Tensor:
    """Flattened tokens [N, ...] as [B, N/B, ...], where `like` is [B, T, ...] with tokens of as many dims; as they are
    where `like` is flattened too."""
    flattened = like.dim() - y_ND.dim() + 1
    if flattened == 1:
        return y_ND
    sizes = [*like.shape[: flattened - 1], -1]
    if _view["complete sequences"]:
        sizes = [-1, *like.shape[1:flattened]]
    # not Tensor.view: where a module around this one has rules for sizes in its code, they would change these
    view: Tensor = torch.ops.aten.view.default(y_ND, [*sizes, *y_ND.shape[1:]])
    return view


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


def holds_complete_sequences(x: Tensor) -> bool:
    """Whether a tensor is a rank's complete sequences in that view: the sizes of one are those of the unsharded run."""
    return any(holds(x) for holds in _holders)


@contextmanager
def complete_sequences_in(holds: Callable[[Tensor], bool]) -> Iterator[None]:
    """Within, `holds` answers `holds_complete_sequences`."""
    _holders.append(holds)
    try:
        yield
    finally:
        _holders.remove(holds)

"""Sampling, for any model that gives logits: the sequence is computed again for each token, without a cache."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from colrow.errors import ConfigError


@torch.no_grad()
def generate(
    logits_of: Callable[[Tensor], Tensor],
    ids: Tensor,
    tokens: int,
    *,
    temperature: float = 0.8,
    top_k: int | None = None,
    seed: int = 0,
    pad_multiple: int = 1,
    eos_id: int | None = None,
    context: int | None = None,
) -> Tensor:
    """`ids` [B, T], T > 0, with up to `tokens` sampled ids after them: [B, T + n].

    The ranks of a sharded model all call this, with equal arguments, and draw equal ids.

    Args:
        logits_of: ids [B, S] -> logits [B, S, V] or [B * S, V], a tensor or a DTensor. Causal, for ids are padded on
            the right.
        temperature: 0 takes the likeliest token.
        top_k: sample from the k likeliest tokens only.
        pad_multiple: S is a multiple of it (sequence parallelism splits S over tp).
        eos_id: a row that has drawn it is filled with it; when all rows have, nothing more is drawn.
        context: S is at most this, the last ids counting (rounded down to `pad_multiple`).

    Raises:
        ConfigError: an empty prompt, an argument out of range, or logits that are not finite or not of each token.
    """
    _check(ids, tokens, temperature, top_k, pad_multiple, context)
    window = None if context is None else context // pad_multiple * pad_multiple
    generator = torch.Generator().manual_seed(seed)  # on the CPU: the same draws with any device
    ended = torch.zeros(ids.shape[0], dtype=torch.bool, device=ids.device)
    for _ in range(tokens):
        seen = ids if window is None else ids[:, -window:]
        length = seen.shape[1]
        # the last real token's logits; causal, so the padding behind it changes nothing
        row = _by_sequence(logits_of(padded := _pad(seen, pad_multiple)), padded)[:, length - 1]
        row = row.full_tensor() if isinstance(row, DTensor) else row
        drawn = _draw(row.float().cpu(), temperature, top_k, generator).to(ids.device)
        if eos_id is not None:
            drawn = torch.where(ended, eos_id, drawn)
            ended |= drawn == eos_id
        ids = torch.cat((ids, drawn[:, None]), dim=1)
        if ended.all():
            break
    return ids


def _by_sequence(logits: Tensor, ids: Tensor) -> Tensor:
    """[B, S, V], also of flattened tokens."""
    if logits.shape[:-1].numel() != ids.numel() or logits.ndim not in (2, 3):
        raise ConfigError(
            f"the model returns {list(logits.shape)} for ids of {list(ids.shape)}, which are no logits of each token: "
            "only a model of next tokens can be sampled"
        )
    return logits.view(*ids.shape, -1)


def _pad(ids: Tensor, multiple: int) -> Tensor:
    return torch.nn.functional.pad(ids, (0, -ids.shape[1] % multiple))


def _draw(logits_BV: Tensor, temperature: float, top_k: int | None, generator: torch.Generator) -> Tensor:
    if logits_BV.isnan().any() or logits_BV.isposinf().any():
        raise ConfigError("the model's logits are not finite: its weights are damaged or diverged; take an older step")
    if temperature == 0.0:
        return logits_BV.argmax(-1)
    if top_k is not None and top_k < logits_BV.shape[-1]:
        least = logits_BV.topk(top_k, dim=-1).values[:, -1:]
        logits_BV = logits_BV.masked_fill(logits_BV < least, -torch.inf)
    probabilities = torch.softmax(logits_BV / temperature, dim=-1)
    if probabilities.isnan().any():
        raise ConfigError(f"temperature={temperature} is too small for these logits: use 0 for the likeliest token")
    return torch.multinomial(probabilities, 1, generator=generator)[:, 0]


def _check(
    ids: Tensor, tokens: int, temperature: float, top_k: int | None, pad_multiple: int, context: int | None
) -> None:
    if ids.ndim != 2 or ids.shape[1] == 0:
        raise ConfigError(f"ids of shape {tuple(ids.shape)} hold no prompt: give at least one token to continue")
    if tokens < 0:
        raise ConfigError(f"tokens={tokens} is negative: give how many tokens to sample")
    if not 0.0 <= temperature < float("inf"):
        raise ConfigError(f"temperature={temperature} is out of range: use 0 for the likeliest token, 1 to sample")
    if top_k is not None and top_k < 1:
        raise ConfigError(f"top_k={top_k} leaves no token: use 1 or more, or leave it out")
    if context is not None and context < pad_multiple:
        raise ConfigError(f"context={context} is less than the multiple of {pad_multiple} that a sequence is padded to")

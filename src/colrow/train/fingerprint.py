"""Hashes of tensors' bits, computed where the tensors are: a change of one bit always changes them."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

_CHUNK = 1 << 22  # elements: bounds the int64 copies at 64 MiB
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@torch.no_grad()
def fingerprints(tensors: Iterable[Tensor]) -> Tensor:
    """One int64 hash a tensor, [n], on their device; local tensors, of any dtype and shape."""
    found = [_fingerprint(tensor) for tensor in tensors]
    return torch.stack(found) if found else torch.zeros(0, dtype=torch.int64)


def _fingerprint(tensor: Tensor) -> Tensor:
    """Σ (2 i + 1) bits_i modulo 2^64: a change of one bit adds an odd multiple of a power of two, which is never 0."""
    flat = tensor.detach().contiguous().reshape(-1)
    flat = torch.view_as_real(flat).reshape(-1) if flat.is_complex() else flat
    bits = flat.view(_INTEGERS[flat.element_size()])
    total = torch.zeros((), dtype=torch.int64, device=bits.device)
    for start in range(0, len(bits), _CHUNK):
        chunk = bits[start : start + _CHUNK].long()
        weights = torch.arange(2 * start + 1, 2 * (start + len(chunk)) + 1, 2, device=bits.device)
        total += (chunk * weights).sum()  # integer sums wrap around, and do not depend on their order
    return total


@torch.no_grad()
def memory_hashes(tensors: Iterable[Tensor]) -> Tensor:
    """One int64 hash a tensor, [n], in a single pass: of every step. Two flips of the same bit cancel."""
    found = [torch.hash_tensor(t.detach().reshape(-1)).view(torch.int64) for t in tensors if t.numel()]
    return torch.stack(found) if found else torch.zeros(0, dtype=torch.int64)

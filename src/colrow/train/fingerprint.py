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


_FEW = 256
"""64-bit words that are not worth a matrix."""


@torch.no_grad()
def memory_hashes(tensors: Iterable[Tensor]) -> Tensor:
    """One int64 hash a tensor with elements, [n], for every step: two passes over memory at its own speed.

    The memory is a matrix of 64-bit words. XOR along rows changes unless flips of one bit meet in a row; sums down
    columns change unless they meet in a column: one flip, or two, cannot do both. The two vectors are mixed as above.
    """
    vectors: list[Tensor] = []
    lengths: list[int] = []
    for tensor in tensors:
        if tensor.numel():
            parts = _summaries(tensor.detach().contiguous().reshape(-1))
            vectors += parts
            lengths.append(sum(map(len, parts)))
    if not vectors:
        return torch.zeros(0, dtype=torch.int64)
    bits = torch.cat(vectors)
    count = torch.tensor(lengths, device=bits.device)
    segment = torch.repeat_interleave(count, output_size=len(bits))
    first = (count.cumsum(0) - count)[segment]
    weights = _scattered(torch.arange(len(bits), device=bits.device) - first)
    return torch.zeros(len(lengths), dtype=torch.int64, device=bits.device).index_add_(0, segment, bits * weights)


def _scattered(numbers: Tensor) -> Tensor:
    """An odd weight for each number, by the rounds of splitmix64."""
    mixed = (numbers + 1) * -0x61C8864680B583EB
    for shift, factor in ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15)):
        mixed = (mixed ^ (mixed >> shift)) * factor
    return mixed | 1


def _summaries(flat: Tensor) -> list[Tensor]:
    """Vectors of int64, each below 2^32 in size, so that weights of 31 bits leave none of its bits out."""
    size = flat.element_size()
    # elements before the first address that 8 divides: a view as int64 must begin there
    head = (-flat.storage_offset() * size % 8) // size
    count = max(len(flat) - head, 0) * size // 8
    if count < _FEW or flat.dtype.is_complex:
        flat = torch.view_as_real(flat).reshape(-1) if flat.is_complex() else flat
        return [_small(flat)]
    width = 1 << count.bit_length() // 2  # nearly square: both vectors are short
    end = head + count // width * width * 8 // size
    words = flat[head:end].view(torch.int64).view(-1, width)
    found = [torch.hash_tensor(words, dim=1).view(torch.int64), words.sum(0)]
    rest = [_small(part) for part in (flat[:head], flat[end:]) if len(part)]
    return [*(_small(part) for part in found), *rest]


def _small(flat: Tensor) -> Tensor:
    """The bits of a few elements, in halves where they have 64."""
    return flat.view(torch.int32 if flat.element_size() == 8 else _INTEGERS[flat.element_size()]).long()

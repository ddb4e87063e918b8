"""Hashes of memory: one flipped bit, or two of the same place in their words, never go unseen."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

from colrow.train.fingerprint import _INTEGERS, memory_hashes


def flipped(tensor: Tensor, bit: int, *places: int) -> Tensor:
    """A copy with `bit` of the elements at `places` flipped."""
    copy = tensor.clone()
    bits = copy.view(_INTEGERS[copy.element_size()])
    top = bit == 8 * copy.element_size() - 1
    for place in places:
        bits[place] ^= -(1 << bit) if top and bits.dtype != torch.uint8 else 1 << bit
    return copy


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.uint8])
@pytest.mark.parametrize("size", [3, 700, 70_003])
def test_one_flip_and_two_of_the_same_bit_are_seen(dtype: torch.dtype, size: int) -> None:
    """Two flips of one bit cancel in an XOR over all, which hashed the memory before."""
    chance = random.Random(size)
    tensor = (torch.rand(size, generator=torch.Generator().manual_seed(1)) * 200).to(dtype)
    (before,) = memory_hashes([tensor])
    assert torch.equal(memory_hashes([tensor.clone()]), before[None])
    for _ in range(60):
        bit = chance.randrange(8 * tensor.element_size())
        first = chance.randrange(size)
        other = chance.choice([p for p in (first + 1, first + 2, first + 256, chance.randrange(size)) if p != first])
        for places in ((first,), (first, other % size)):
            if len(set(places)) == len(places):
                assert memory_hashes([flipped(tensor, bit, *places)]) != before


def test_top_bits_in_one_row_and_in_one_column_are_seen() -> None:
    """Where sums wrap around, or where an XOR is blind."""
    tensor = torch.randn(2 * 64 * 64, generator=torch.Generator().manual_seed(1))
    (before,) = memory_hashes([tensor])
    xor = torch.hash_tensor(tensor)
    for places in ((1, 3), (1, 1 + 2 * 64), (1, 1 + 2 * 64 * 5)):
        both = flipped(tensor, 31, *places)
        assert torch.hash_tensor(both) == xor  # the negative control
        assert memory_hashes([both]) != before


def test_each_tensor_has_its_own_hash_wherever_it_lies() -> None:
    tensors = [torch.randn(n) for n in (1, 5000, 0, 17)]
    padded = torch.zeros(6001)
    padded[1:5001] = tensors[1]
    found = memory_hashes(tensors)
    assert len(found) == 3
    assert torch.equal(found[2:], memory_hashes(tensors[3:]))
    assert torch.equal(found[:1], memory_hashes(tensors[:1]))
    assert memory_hashes([]).shape == (0,)
    assert len(memory_hashes([padded[1:5001], torch.randn(4, dtype=torch.complex64)])) == 2

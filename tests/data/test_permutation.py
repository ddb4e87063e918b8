"""The order of windows is a true permutation of any size, well mixed, and never changes between versions."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from colrow.data.permutation import Permutation

AWKWARD = [*range(1, 41), 63, 64, 65, 99, 100, 101, 255, 256, 257, 1000, 4095, 4096, 4097, 65_537, 100_003]


@pytest.mark.parametrize("n", AWKWARD)
def test_every_number_comes_exactly_once(n):
    assert sorted(Permutation(n, "key")(np.arange(n)).tolist()) == list(range(n))


@settings(max_examples=50, deadline=None)
@given(n=st.integers(1, 5000), key=st.text(max_size=8))
def test_every_number_comes_exactly_once_for_any_key(n, key):
    assert len(np.unique(Permutation(n, key)(np.arange(n)))) == n


@pytest.mark.parametrize("n", [5_000_000_007, 2**40 + 1, 2**61])
def test_numbers_beyond_memory_stay_distinct_and_in_range(n):
    rng = np.random.default_rng(0)
    numbers = np.unique(np.concatenate([rng.integers(0, n, 50_000), [0, n - 1]]))
    got = Permutation(n, "key")(numbers)
    assert got.min() >= 0
    assert got.max() < n
    assert len(np.unique(got)) == len(numbers)


def test_a_point_does_not_depend_on_the_others():
    permutation = Permutation(1000, "key")
    together = permutation(np.arange(1000))
    assert [int(permutation(np.array([i]))[0]) for i in (0, 17, 999)] == together[[0, 17, 999]].tolist()


def test_places_are_used_evenly_over_keys():
    """Chi-square over 5 × 5 cells; without mixing (one key for all) a cell holds 0 or 2000."""
    counts = np.zeros((5, 5))
    for key in range(2000):
        counts[np.arange(5), Permutation(5, str(key))(np.arange(5))] += 1
    assert ((counts - 400) ** 2 / 400).sum() < 60  # 16 degrees of freedom: exceeded once in a million


def test_neighbours_are_scattered():
    order = Permutation(100_000, "key")(np.arange(100_000))
    assert abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < 0.02
    assert abs(np.corrcoef(order, np.arange(100_000))[0, 1]) < 0.02
    assert (order == np.arange(100_000)).sum() < 10


def test_the_order_is_the_one_that_earlier_runs_had():
    """Recorded values: a change here breaks every run that is continued."""
    assert Permutation(10, "windows 0 0")(np.arange(10)).tolist() == [2, 3, 6, 7, 5, 0, 4, 1, 8, 9]
    assert Permutation(10**9, "windows 7 3")(np.arange(3)).tolist() == [615779991, 269888201, 216299222]

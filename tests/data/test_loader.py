"""Batches depend on (seed, position) alone: not on the mesh, not on where a run went on or with which batch size."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from colrow.config import micro_batch_count
from colrow.data.loader import BatchOrder, DataAxisSampler, Loader, batch_fingerprint
from colrow.data.shards import TokenArray
from colrow.errors import ConfigError, DataError


def global_batch(order, position, dp, micro_batch):
    """What all ranks together read at `position`."""
    parts = [DataAxisSampler(order, rank, dp, micro_batch).micro_batches(position) for rank in range(dp)]
    return np.sort(np.concatenate([np.concatenate(part) for part in parts]))


@pytest.mark.parametrize(("n_windows", "batch"), [(1, 1), (1, 5), (3, 8), (10, 3), (16, 16), (100, 7), (1000, 64)])
def test_every_window_is_read_once_an_epoch_before_any_repeats(n_windows, batch):
    order = BatchOrder(n_windows, batch, seed=3)
    steps = -(-3 * n_windows // batch)
    read = np.concatenate([order.indices(step * batch) for step in range(steps)])
    for epoch in range(3):
        assert sorted(read[epoch * n_windows : (epoch + 1) * n_windows].tolist()) == list(range(n_windows))


def test_epochs_and_seeds_have_orders_of_their_own():
    first, second = BatchOrder(50, 50, seed=0).indices(0), BatchOrder(50, 50, seed=0).indices(50)
    assert first.tolist() != second.tolist()
    assert first.tolist() != BatchOrder(50, 50, seed=1).indices(0).tolist()


def test_without_a_seed_windows_come_in_their_order():
    order = BatchOrder(5, 3, seed=None)
    assert [order.indices(position).tolist() for position in (0, 3, 6)] == [[0, 1, 2], [3, 4, 0], [1, 2, 3]]


def test_billions_of_windows_cost_no_memory():
    order = BatchOrder(10**12, 4096, seed=0)
    far = order.indices(4096 * 10**9)
    assert len(np.unique(far)) == 4096
    assert 0 <= far.min() <= far.max() < 10**12


@pytest.mark.parametrize("dp", [1, 2, 4, 8])
@pytest.mark.parametrize("accumulation", [1, 3])
def test_the_global_batch_is_the_same_for_every_number_of_ranks(dp, accumulation):
    order = BatchOrder(101, 24, seed=5)
    micro_batch = 24 // dp // accumulation
    for position in (0, 72, 96, 100, 120, 24000):  # 96 and 100 go over the end of the first epoch
        assert global_batch(order, position, dp, micro_batch).tolist() == np.sort(order.indices(position)).tolist()


def test_another_seed_reads_another_global_batch():
    a, b = BatchOrder(101, 24, seed=5), BatchOrder(101, 24, seed=6)
    assert global_batch(a, 0, 2, 4).tolist() != global_batch(b, 0, 2, 4).tolist()


def test_micro_batches_hold_the_same_windows_on_every_mesh():
    order = BatchOrder(1000, 32, seed=1)
    one = [part.tolist() for part in DataAxisSampler(order, 0, 1, 4).micro_batches(9 * 32)]
    four = [DataAxisSampler(order, rank, 4, 4).micro_batches(9 * 32) for rank in range(4)]
    assert one == [four[i % 4][i // 4].tolist() for i in range(8)]


def test_going_on_at_any_step_reads_what_an_unbroken_run_reads():
    unbroken = [part.tolist() for s in range(12) for part in sampler_of(7).micro_batches(8 * s)]
    for stop in (1, 5, 11):
        resumed = [part.tolist() for s in range(stop, 12) for part in sampler_of(7).micro_batches(8 * s)]
        assert resumed == unbroken[2 * stop :]


@pytest.mark.parametrize("other", [1, 3, 5, 16, 20])
def test_another_global_batch_goes_on_with_the_next_window(other):
    """The windows of three batches of 8 and of three batches of `other` are those of one long batch."""
    orders = {size: BatchOrder(23, size, seed=4) for size in (8, other, 24 + 3 * other)}
    read = [orders[8].indices(8 * step) for step in range(3)]
    read += [orders[other].indices(24 + other * step) for step in range(3)]
    assert np.concatenate(read).tolist() == orders[24 + 3 * other].indices(0).tolist()


def sampler_of(n_windows):
    return DataAxisSampler(BatchOrder(n_windows, 8, seed=2), 1, 2, 2)


@pytest.mark.parametrize(
    ("global_batch", "micro_batch", "dp", "fix"),
    [
        (10, 4, 2, "set train.global_batch to 8 or 16, or train.micro_batch to 1 or 5"),
        (16, 6, 2, "set train.global_batch to 12 or 24, or train.micro_batch to 4 or 8"),
        (2, 4, 2, "set train.global_batch to 8, or train.micro_batch to 1"),
        (9, 2, 2, "set train.global_batch to 8 or 12"),
    ],
)
def test_a_batch_that_does_not_divide_names_what_does(global_batch, micro_batch, dp, fix):
    with pytest.raises(ConfigError) as error:
        micro_batch_count(global_batch, micro_batch, dp)
    assert str(error.value).endswith(fix)
    assert f"train.global_batch={global_batch} is not divisible by {micro_batch * dp}" in str(error.value)
    for value in (int(word) for word in fix.partition("or train.micro_batch")[0].split() if word.isdigit()):
        assert micro_batch_count(value, micro_batch, dp) == value // (micro_batch * dp)
    for value in (int(word) for word in fix.partition("or train.micro_batch")[2].split() if word.isdigit()):
        assert micro_batch_count(global_batch, value, dp) == global_batch // (value * dp)


@pytest.fixture
def tokens(tmp_path):
    ids = (np.arange(1001) * 7 % 251).astype("<u2")
    ids.tofile(tmp_path / "train.bin")
    return TokenArray(tmp_path / "train.bin", "<u2", len(ids))


def loader_of(tokens, seed=0, dp=1, rank=0, device="cpu"):
    order = BatchOrder(tokens.windows(10), 8, seed)
    return Loader(tokens, 10, DataAxisSampler(order, rank, dp, 2), device)


def test_targets_are_the_ids_one_further(tokens):
    with loader_of(tokens, seed=None) as loader:
        ids, targets = next(iter(loader.batches(0)))
    assert ids.dtype == targets.dtype == torch.int64
    assert ids.shape == targets.shape == (2, 10)
    assert ids.is_contiguous()
    assert targets.is_contiguous()
    assert ids.tolist() == tokens.ids[:20].reshape(2, 10).tolist()
    assert targets.tolist() == tokens.ids[1:21].reshape(2, 10).tolist()


def test_the_last_window_has_a_target(tokens):
    assert tokens.windows(10) == 100
    assert tokens.windows(1001) == 0
    with loader_of(tokens, seed=None) as loader:
        *_, (ids, targets) = loader.batches(96)  # windows 96 to 99, then 0 to 3
        (_, _), (last, after), *_ = loader.batches(96)
    assert last[1].tolist() == tokens.ids[990:1000].tolist()
    assert after[1, -1] == tokens.ids[1000]
    assert ids[1].tolist() == tokens.ids[30:40].tolist()
    assert targets[1, 0] == tokens.ids[31]


def test_positions_may_be_asked_for_in_any_order(tokens):
    with loader_of(tokens) as loader:
        forward = {at: [ids.tolist() for ids, _ in loader.batches(at)] for at in range(0, 48, 8)}
        for at in (40, 0, 24, 32, 32, 8):
            assert [ids.tolist() for ids, _ in loader.batches(at)] == forward[at]
    assert len(forward[0]) == 4
    assert forward[0] != forward[8]


def test_ranks_read_apart_what_one_process_reads(tokens):
    with loader_of(tokens) as one, loader_of(tokens, dp=2) as left, loader_of(tokens, dp=2, rank=1) as right:
        whole = [ids.tolist() for ids, _ in one.batches(24)]
        halves = zip(left.batches(24), right.batches(24), strict=True)
        assert whole == [ids.tolist() for pair in halves for ids, _ in pair]


def test_what_fails_in_the_background_is_raised(tmp_path):
    gone = TokenArray(tmp_path / "gone.bin", "<u2", 1001)
    with loader_of(gone) as loader, pytest.raises(FileNotFoundError, match=r"gone\.bin"):
        next(loader.batches(0))


def test_an_order_of_more_windows_than_there_are_is_refused(tokens):
    sampler = DataAxisSampler(BatchOrder(101, 8, 0), 0, 1, 2)
    with pytest.raises(DataError, match=r"counts 101 windows, but .*train.bin has 100 of 10 tokens"):
        Loader(tokens, 10, sampler)
    with pytest.raises(DataError, match="no complete sequence"):
        BatchOrder(tokens.windows(2000), 8, 0)


def test_the_batch_fingerprint_sees_every_token_and_its_place():
    ids = torch.arange(24).reshape(4, 6)
    same = batch_fingerprint(ids)
    assert same == batch_fingerprint(ids.clone()) == batch_fingerprint(ids.int())
    assert same == int(torch.tensor(same, dtype=torch.int64))
    changed = ids.clone()
    changed[3, 5] += 1
    for other in (changed, ids.flip(0), ids.flip(1), ids.reshape(6, 4), ids[:3]):
        assert batch_fingerprint(other) != same


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_batches_arrive_on_the_gpu_from_pinned_memory(tokens):
    device = torch.device("cuda", torch.cuda.device_count() - 1)
    torch.cuda.set_device(device)
    with loader_of(tokens) as cpu, loader_of(tokens, device="cuda") as gpu:
        for at in range(0, 160, 8):
            for (ids, targets), (gpu_ids, gpu_targets) in zip(cpu.batches(at), gpu.batches(at), strict=True):
                assert gpu_ids.device == device
                assert gpu_ids.tolist() == ids.tolist()
                assert gpu_targets.tolist() == targets.tolist()
                assert batch_fingerprint(gpu_ids) == batch_fingerprint(ids)
        assert all(ids.is_pinned() for ids, _ in gpu._read(0))

"""Checkpoints on several ranks: they move between meshes bit for bit, and what fails on one rank fails on all."""

from __future__ import annotations

import errno
import os
import shutil
import signal
from collections.abc import Callable
from contextlib import nullcontext
from itertools import product
from math import prod
from pathlib import Path
from unittest import mock
from unittest.mock import Mock

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate

from colrow.checkpoint import state, storage
from colrow.checkpoint.distributed import Checkpoints
from colrow.checkpoint.manifest import Index, read_record
from colrow.errors import CheckpointError
from colrow.parallel.loss import loss_context
from colrow.parallel.parallelize import parallelize
from colrow.plans.plan import Plan
from colrow.sharding.grad_norm import align_gradients
from colrow.sharding.layout import packed_of
from helpers.harness import Group, Ranks
from helpers.parity import batch, build, cross_entropy, whole
from helpers.toy import LAYERS, MESHES, gloo_group, mesh_of, of_all_ranks, own_state, place, train, whole_state
from helpers.variants import params

pytestmark = pytest.mark.distributed


def save_case(device: str, mesh: str, folder: Path) -> None:
    placed = place(device, mesh, seed=sorted(MESHES).index(mesh), lr=3e-3)
    train(placed)
    state = whole_state(placed)
    if dist.get_rank() == 0:
        save_file(state, folder / "truth.safetensors")
    if placed.model is not None:
        Checkpoints(folder, group=placed.group).save(2, placed.model, placed.optimizer, {"mesh": mesh})
    dist.barrier()


def load_case(device: str, mesh: str, folder: Path) -> list[str]:
    """The names of this rank's tensors that differ from what was saved, on this mesh with other weights and a fresh
    optimizer; all ranks together have all that was saved."""
    placed = place(device, mesh, seed=99)
    if placed.model is not None:
        checkpoints = Checkpoints(folder, group=placed.group)
        extra = checkpoints.load(2, placed.model, placed.optimizer)
        assert extra == {"mesh": folder.name}
        assert placed.optimizer is not None
        options = [(g["lr"], g["betas"], g["weight_decay"]) for g in placed.optimizer.param_groups]
        assert options == [(3e-3, (0.8, 0.9), 0.1), (3e-3, (0.8, 0.9), 0.0)]
    truth, mine = load_file(folder / "truth.safetensors"), own_state(placed)
    assert of_all_ranks(dict.fromkeys(mine)).keys() == truth.keys()
    return differing({name: truth[name] for name in mine}, mine)


def differing(a: dict[str, Tensor], b: dict[str, Tensor]) -> list[str]:
    assert a.keys() == b.keys()
    return [name for name in a if a[name].dtype != b[name].dtype or not torch.equal(a[name], b[name])]


FOUR = [name for name, mesh in MESHES.items() if mesh.world_size <= 4]


@pytest.fixture(scope="module")
def saved(ranks: Ranks, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """For each mesh a folder with its checkpoint, and its state in full as other means gather it."""
    root = tmp_path_factory.mktemp("meshes")
    for mesh in FOUR:
        (root / mesh).mkdir()
        ranks(4).run(save_case, mesh, root / mesh)
    return {mesh: root / mesh for mesh in FOUR}


def _neighbours(before: str, after: str) -> bool:
    """Each mesh is saved from twice, and loaded on twice: on itself, and one kind of mesh from the next."""
    return (FOUR.index(after) - FOUR.index(before)) % len(FOUR) in (0, 3)


@pytest.mark.parametrize(
    ("before", "after"), params(product(FOUR, FOUR), lambda before, after: not _neighbours(before, after))
)
def test_a_checkpoint_of_any_mesh_loads_bit_for_bit_on_any_other(
    ranks: Ranks, saved: dict[str, Path], before: str, after: str
) -> None:
    for names in ranks(4).run(load_case, after, saved[before]):
        assert names == []
    truth = load_file(saved[before] / "truth.safetensors")
    assert f"layers.{LAYERS - 1}.qkv.weight" in truth
    assert truth["optimizer.embed_tokens.weight.exp_avg"].abs().sum() > 0


@pytest.mark.parametrize("mesh", FOUR)
def test_every_element_is_stored_once_and_the_work_is_spread(saved: dict[str, Path], mesh: str) -> None:
    manifest, index = Checkpoints(saved[mesh]).latest(), read_record(saved[mesh] / "step-2" / "index.json", Index)
    truth = load_file(saved[mesh] / "truth.safetensors")
    assert index.tensors.keys() == truth.keys()
    for name, tensor in index.tensors.items():
        assert tensor.shape == list(truth[name].shape)
        assert sum(prod(block.size) for block in tensor.blocks) == truth[name].numel()
    assert manifest is not None
    assert manifest.mesh == (MESHES[mesh] if MESHES[mesh].pp == 1 else None)  # parameters do not tell of stages
    files = {block.file for tensor in index.tensors.values() for block in tensor.blocks}
    assert len(files) == MESHES[mesh].world_size


@pytest.mark.exhaustive
def test_hsdp_over_tp_on_eight_ranks_loads_on_fewer(ranks: Ranks, tmp_path: Path) -> None:
    folder = tmp_path / "replicate2-shard2-tp2"
    folder.mkdir()
    ranks(8).run(save_case, folder.name, folder)
    for after in ("one", "shard2-tp2", folder.name):
        for names in ranks(8).run(load_case, after, folder):
            assert names == []
    ranks(8).stop()  # idle ranks would keep the cores busy


def unpacked_case(device: str, folder: Path) -> list[str]:
    """Load as load_case does, but take the packed weights for plain shards."""
    with mock.patch.object(state, "packed_of", return_value=None):
        return load_case(device, "tp2", folder)


def test_a_packed_weight_taken_for_a_plain_shard_would_be_seen(ranks: Ranks, saved: dict[str, Path]) -> None:
    for names in ranks(4).run(unpacked_case, saved["one"])[:2]:  # the others hold nothing at tp 2
        assert {name for name in names if "optimizer" not in name} == {
            f"layers.{layer}.qkv.{kind}" for layer in range(LAYERS) for kind in ("weight", "bias")
        }


# Real models and their training


def llama_case(device: str, name: str, folder: Path) -> float:
    """Train on FSDP over TP, evaluate (which leaves the root gathered), save; load into one process; compare."""
    mesh = mesh_of(device, "shard2-tp2")[0]
    plan = Plan.preset("llama")
    model = parallelize(build(name, device), plan, mesh["tp"])
    for layer in model.layers.values() if isinstance(model.layers, nn.ModuleDict) else model.layers:
        fully_shard(layer, mesh=mesh["dp_shard"])
    fully_shard(model, mesh=mesh["dp_shard"])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, foreach=False)
    for step in range(2):
        ids, targets = batch(device, seed=step)
        with loss_context(plan, mesh["tp"]):
            cross_entropy(model(ids), targets).backward()
        align_gradients(model.parameters())
        optimizer.step()
        optimizer.zero_grad()
    ids, targets = batch(device, seed=9)
    with torch.no_grad(), loss_context(plan, mesh["tp"]):
        loss = whole(cross_entropy(model(ids), targets)).item()
    Checkpoints(folder).save(2, model, optimizer, {})
    alone = gloo_group([0])
    other = loss
    if dist.get_rank() == 0:
        single = build(name, device)
        with torch.no_grad():
            for param in single.parameters():
                param.zero_()
        Checkpoints(folder, group=alone).load(2, single, torch.optim.AdamW(single.parameters()))
        other = cross_entropy(single(ids), targets).item()
    dist.barrier()
    return abs(loss - other) / abs(loss)


@pytest.mark.parametrize("name", params(["kv3", "tied", "qk_norm"], lambda name: name != "tied"))
def test_a_llama_trained_on_fsdp_over_tp_is_the_same_model_in_one_process(
    ranks: Ranks, tmp_path: Path, name: str
) -> None:
    assert max(ranks(4).run(llama_case, name, tmp_path)) < 1e-12


def asynchronous_case(device: str, folder: Path, mesh: str) -> list[str]:
    """Training goes on while the copy is written."""
    placed = place(device, mesh, seed=1)
    train(placed)
    checkpoints = Checkpoints(folder, asynchronous=True, group=placed.group)
    for step in (1, 2):  # the second reuses the first's host memory
        train(placed, steps=1)
        truth = whole_state(placed)
        if placed.model is not None:
            checkpoints.save(step, placed.model, placed.optimizer, {})
        train(placed, steps=2)
    checkpoints.wait()
    dist.barrier()
    other = place(device, "tp4", seed=2)
    assert other.model is not None
    Checkpoints(folder).load(2, other.model, other.optimizer)
    return differing(truth, whole_state(other))


@pytest.mark.parametrize("mesh", ["shard2-tp2", "tp2"])
def test_training_goes_on_while_a_background_save_writes(ranks: Ranks, tmp_path: Path, mesh: str) -> None:
    for names in ranks(4).run(asynchronous_case, tmp_path, mesh):
        assert names == []


def placements_case(device: str, folder: Path) -> list[str]:
    """Optimizer state laid out in other ways than its parameter: whole on each rank, and as a pending sum."""
    placed = place(device, "tp4", seed=1)
    assert placed.model is not None
    assert placed.optimizer is not None
    train(placed)
    truth = whole_state(placed)
    for number, param in enumerate(placed.model.parameters()):
        state = placed.optimizer.state[param]
        assert isinstance(param, DTensor)
        if number % 2 and packed_of(placed.model, _name(placed.model, param)) is None:
            state["exp_avg"] = state["exp_avg"].redistribute(placements=[Replicate()])
            part = state["exp_avg_sq"].redistribute(placements=[Replicate()]).to_local() / 4
            state["exp_avg_sq"] = DTensor.from_local(part, param.device_mesh, [Partial()], run_check=False)
    Checkpoints(folder).save(1, placed.model, placed.optimizer, {})
    other = place(device, "tp2", seed=2)
    if other.model is not None:
        Checkpoints(folder, group=other.group).load(1, other.model, other.optimizer)
    return differing(truth, whole_state(other))


def _name(model: nn.Module, param: nn.Parameter) -> str:
    return next(name for name, other in model.named_parameters() if other is param)


def test_state_that_is_not_laid_out_as_its_parameter_is_normalised(ranks: Ranks, tmp_path: Path) -> None:
    for names in ranks(4).run(placements_case, tmp_path):
        assert names == []


# Failures


def error_of(work: Callable[[], object]) -> str:
    try:
        work()
    except CheckpointError as error:
        return str(error)
    return ""


def full_disk_case(device: str, folder: Path, asynchronous: bool) -> tuple[str, list[str]]:
    """The disk of rank 1 is full at the second save."""
    placed = place(device, "tp4", seed=1)
    assert placed.model is not None
    checkpoints = Checkpoints(folder, asynchronous=asynchronous)
    checkpoints.save(1, placed.model, placed.optimizer, {})
    checkpoints.wait()

    def refuse(handle: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with mock.patch.object(os, "fsync", refuse) if dist.get_rank() == 1 else nullcontext():
        reported = error_of(lambda: (checkpoints.save(2, placed.model, placed.optimizer, {}), checkpoints.wait()))
    dist.barrier()
    there = sorted(path.name for path in folder.iterdir())
    dist.barrier()
    checkpoints.save(3, placed.model, placed.optimizer, {})
    checkpoints.wait()
    return reported, there


@pytest.mark.parametrize("asynchronous", [False, True], ids=["synchronous", "asynchronous"])
def test_a_full_disk_on_one_rank_is_raised_on_all(ranks: Ranks, tmp_path: Path, asynchronous: bool) -> None:
    for reported, there in ranks(4).run(full_disk_case, tmp_path, asynchronous):
        assert "too full for a checkpoint in" in reported
        assert str(tmp_path) in reported
        assert " bytes), " in reported
        assert there == ["step-1"]
    assert [(info.step, info.state) for info in Checkpoints(tmp_path).list()] == [(1, "complete"), (3, "complete")]


def narrow_disk_case(device: str, folder: Path, mesh: str, missing: int) -> str:
    """The disk has room for the tensors but `missing` bytes; what the JSON files take is left out."""
    placed = place(device, mesh, seed=1)
    train(placed)
    free = sum(tensor.nbytes for tensor in whole_state(placed).values()) - missing
    with mock.patch.object(storage, "_ROOM", 0), mock.patch.object(shutil, "disk_usage", return_value=Mock(free=free)):
        return error_of(lambda: Checkpoints(folder).save(1, placed.model, placed.optimizer, {}))  # type: ignore[arg-type]


@pytest.mark.parametrize("mesh", ["tp4", "replicate2-tp2"])
def test_a_checkpoint_asks_for_the_room_that_it_takes(ranks: Ranks, tmp_path: Path, mesh: str) -> None:
    for reported in ranks(4).run(narrow_disk_case, tmp_path, mesh, 1):
        assert "too full" in reported
    assert ranks(4).run(narrow_disk_case, tmp_path, mesh, 0) == [""] * 4


def one_rank_case(device: str, folder: Path) -> list[str]:
    """Things that are wrong on one rank only."""
    placed = place(device, "tp4", seed=1)
    model, checkpoints = placed.model, Checkpoints(folder)
    assert model is not None
    odd = dist.get_rank() == 1
    reported = [error_of(lambda: checkpoints.save(1, model, None, {"odd": {1}} if odd else {}))]  # type: ignore[dict-item]
    checkpoints.save(1, model, None, {})
    if odd:
        model.layers["0"].added = nn.Linear(2, 2)
    reported.append(error_of(lambda: checkpoints.load(1, model)))
    if odd:
        del model.layers["0"].added
        next((folder / "step-1").glob("rank-00002-*")).unlink()
    dist.barrier()
    reported.append(error_of(lambda: checkpoints.load(1, model)))
    return reported


def test_what_is_wrong_on_one_rank_is_reported_on_all(ranks: Ranks, tmp_path: Path) -> None:
    for extra, model, file in ranks(4).run(one_rank_case, tmp_path):
        assert extra.startswith("rank 1: extra['odd'] is not JSON")
        assert "only in the model: layers.0.added.weight float32[2, 2], layers.0.added.bias" in model
        assert "rank-00002-0000.safetensors is missing; there is no other complete one" in file


def killed_case(device: str, folder: Path) -> None:
    placed = place(device, "tp2", seed=1)
    assert placed.model is not None
    Checkpoints(folder).save(1, placed.model, None, {})
    if dist.get_rank() == 1:
        storage.write_tensors = lambda path, entries: os.kill(os.getpid(), signal.SIGKILL)
    Checkpoints(folder).save(2, placed.model, None, {})


def test_a_rank_killed_while_it_writes_ends_the_save_of_the_others(ranks: Ranks, tmp_path: Path) -> None:
    if ranks.device == "cuda":
        pytest.skip("NCCL's own watchdog ends the others")
    group = Group(2, "cpu")
    group._start()
    try:
        for pipe in group._pipes:
            pipe.send((killed_case, (tmp_path,)))
        assert group._pipes[0].poll(90), "the other rank hangs"
        ok, reported = group._pipes[0].recv()
        assert not ok
        assert "Connection" in reported, reported
    finally:
        group.stop()
    assert [(info.step, info.state) for info in Checkpoints(tmp_path).list()] == [(1, "complete"), (2, "unfinished")]

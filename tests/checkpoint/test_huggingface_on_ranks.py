"""Hugging Face folders read and written by all ranks of a mesh."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from colrow.checkpoint import weight_files
from colrow.checkpoint.export import export
from colrow.checkpoint.huggingface import load_weights
from colrow.errors import CheckpointError
from colrow.mesh import Mesh
from colrow.models.llama import Llama
from colrow.parallel.data_parallel import apply_data_parallel
from colrow.parallel.initialize import materialize
from colrow.parallel.parallelize import parallelize
from colrow.plans.plan import Plan
from colrow.sharding.layout import Region, full_tensor, local_tensor
from helpers.families import read_folder
from helpers.harness import Ranks
from helpers.llamas import OPTIONS, meta, seeded


def sharded(device: str, mesh: Mesh, options: dict[str, Any]) -> Llama:
    """A model on the mesh, with memory and no values."""
    model = meta(**options)
    device_mesh = mesh.build(device, dist.get_world_size())
    parallelize(model, Plan.preset("llama"), device_mesh)
    apply_data_parallel(model, device_mesh, model.layers, param_dtype=None, reshard_after_forward=False)
    materialize(model, device)
    return model


def round_trip_case(device: str, folder: Path, mesh: Mesh, options: dict[str, Any]) -> dict[str, bool]:
    model = sharded(device, mesh, options)
    with torch.no_grad():
        for param in model.parameters():
            local_tensor(param).fill_(torch.nan)
    load_weights(model, folder / "in")
    whole = dict(seeded(**options).to(device).named_parameters())
    same = {name: torch.equal(full_tensor(p.detach()), whole[name]) for name, p in model.named_parameters()}
    export(model, folder / "out", model.config, max_shard_bytes=9000)
    return same


@pytest.mark.distributed
@pytest.mark.parametrize("options", OPTIONS.values(), ids=list(OPTIONS))
@pytest.mark.parametrize(
    "mesh", [Mesh(tp=2), Mesh(dp_shard=2, tp=2), Mesh(dp_replicate=2, tp=2), Mesh(dp_shard=4)], ids=str
)
def test_all_ranks_read_and_write_one_folder(ranks: Ranks, tmp_path: Path, mesh: Mesh, options: dict[str, Any]) -> None:
    model = seeded(**options)
    export(model, tmp_path / "in", model.config)
    for same in ranks(mesh.world_size).run(round_trip_case, tmp_path, mesh, options):
        assert all(same.values()), [name for name, equal in same.items() if not equal]
    read, written = read_folder(tmp_path / "in"), read_folder(tmp_path / "out")
    assert written.keys() == read.keys()
    assert all(torch.equal(written[k], read[k]) for k in read)
    assert (tmp_path / "out" / "config.json").read_text() == (tmp_path / "in" / "config.json").read_text()


def stages_case(device: str, folder: Path, options: dict[str, Any]) -> bool:
    """Rank 0 holds the first stage, rank 1 the last; tied, each has its own copy of the embedding."""
    model = meta(**options)
    if dist.get_rank() == 0:
        model.norm = model.lm_head = model.layers[1] = None
    else:
        model.embed_tokens = model.layers[0] = None
    materialize(model, device)
    load_weights(model, folder / "in")
    whole = dict(seeded(**options).to(device).named_parameters(remove_duplicate=False))
    export(model, folder / "out", model.config)
    return all(torch.equal(p, whole[name]) for name, p in model.named_parameters())


@pytest.mark.distributed
@pytest.mark.parametrize("tied", [False, True])
def test_pipeline_stages_read_and_write_one_folder(ranks: Ranks, tmp_path: Path, tied: bool) -> None:
    options = {"tie_word_embeddings": tied}
    model = seeded(**options)
    export(model, tmp_path / "in", model.config)
    assert ranks(2).run(stages_case, tmp_path, options) == [True, True]
    read, written = read_folder(tmp_path / "in"), read_folder(tmp_path / "out")
    assert written.keys() == read.keys()
    assert all(torch.equal(written[k], read[k]) for k in read)


def failing_case(device: str, folder: Path) -> str:
    """The disk of rank 1 is full after its first file."""
    model = sharded(device, Mesh(tp=2), {})
    load_weights(model, folder / "in")
    write, written = weight_files.write_tensors, []

    def full(path: Path, *args: Any) -> Any:
        if dist.get_rank() == 1 and written:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        written.append(path)
        return write(path, *args)

    weight_files.write_tensors = full
    try:
        export(model, folder / "out", model.config, max_shard_bytes=4000)
    except CheckpointError as error:
        return str(error)
    finally:
        weight_files.write_tensors = write
    return ""


@pytest.mark.distributed
def test_a_rank_that_cannot_write_fails_all_and_leaves_nothing(ranks: Ranks, tmp_path: Path) -> None:
    model = seeded()
    export(model, tmp_path / "in", model.config)
    for reported in ranks(2).run(failing_case, tmp_path):
        assert "No space left on device" in reported
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def most_at_once_case(device: str, folder: Path, keep: bool) -> tuple[int, int]:
    """Bytes of whole tensors alive at once while exporting, and those of the largest tensor."""
    import weakref

    from colrow.checkpoint.gather import Gather

    model = sharded(device, Mesh(tp=2), {})
    load_weights(model, folder / "in")
    alive, most, collect, kept = 0, 0, Gather.next, []

    def counted(self: Gather, name: str) -> Tensor:
        nonlocal alive, most
        tensor = collect(self, name)
        size = tensor.nbytes
        alive, most = alive + size, max(most, alive + size)

        def gone() -> None:
            nonlocal alive
            alive -= size

        weakref.finalize(tensor, gone)
        kept.extend([tensor] if keep else [])
        return tensor

    Gather.next = counted  # type: ignore[method-assign]
    try:
        export(model, folder / f"out-{keep}", model.config)
    finally:
        Gather.next = collect  # type: ignore[method-assign]
    return most, max(p.numel() * 4 for p in model.parameters())


@pytest.mark.distributed
def test_no_rank_holds_more_than_two_whole_tensors(ranks: Ranks, tmp_path: Path) -> None:
    """One is being written while the next is collected."""
    model = seeded()
    export(model, tmp_path / "in", model.config)
    for most, largest in ranks(2).run(most_at_once_case, tmp_path, False):
        assert most <= 2 * largest
    assert max(most for most, _ in ranks(2).run(most_at_once_case, tmp_path, True)) > 2 * largest


def elements_read_case(device: str, folder: Path, mesh: Mesh) -> tuple[int, int]:
    """Elements that loading asks the files for, and those of this rank's shards."""
    from colrow.checkpoint.tensor_file import TensorReader

    model = sharded(device, mesh, {})
    read, elements = TensorReader.read, 0

    def counted(self: TensorReader, key: str, region: Region) -> Tensor:
        nonlocal elements
        elements += region.numel
        return read(self, key, region)

    TensorReader.read = counted  # type: ignore[method-assign]
    try:
        load_weights(model, folder)
    finally:
        TensorReader.read = read  # type: ignore[method-assign]
    return elements, sum(local_tensor(p).numel() for p in model.parameters())


@pytest.mark.distributed
@pytest.mark.parametrize("mesh", [Mesh(tp=2), Mesh(dp_shard=2)], ids=str)
def test_a_rank_reads_what_it_holds_and_no_more(ranks: Ranks, tmp_path: Path, mesh: Mesh) -> None:
    model = seeded()
    export(model, tmp_path, model.config)
    for elements, held in ranks(2).run(elements_read_case, tmp_path, mesh):
        assert elements == held
        assert held < 0.6 * sum(p.numel() for p in model.parameters())

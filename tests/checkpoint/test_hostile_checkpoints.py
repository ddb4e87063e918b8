"""Nothing in a checkpoint is executed, and nothing outside of its folder is read."""

from __future__ import annotations

import json
import pickle
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from colrow.checkpoint.distributed import Checkpoints
from colrow.checkpoint.manifest import FileRecord, read_manifest, write_manifest
from colrow.errors import CheckpointError


class Bomb:
    """Makes a file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return Path.touch, (self.marker,)


@pytest.fixture
def marker(tmp_path: Path) -> Path:
    return tmp_path / "executed"


@pytest.fixture
def checkpoints(tmp_path: Path) -> Checkpoints:
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    checkpoints.save(1, *made(), {"step": 1})
    return checkpoints


def made() -> tuple[nn.Module, torch.optim.Optimizer]:
    model = nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(3)).sum().backward()
    optimizer.step()
    return model, optimizer


def plant(folder: Path, name: str, data: bytes, signed: bool) -> None:
    """Put `data` in place of a file; `signed` gives the manifest its size and checksum, as an attacker would."""
    path = next(iter(folder.glob(name)), folder / name)
    path.write_bytes(data)
    if signed:
        manifest = read_manifest(folder)
        record = FileRecord(name=path.name, bytes=len(data), crc32=zlib.crc32(data))
        files = [file for file in manifest.files if file.name != path.name] + [record]
        (folder / "manifest.json").unlink()
        write_manifest(folder, manifest.model_copy(update={"files": files}))


def test_the_bomb_works(marker: Path) -> None:
    pickle.loads(pickle.dumps(Bomb(marker)))
    assert marker.exists()


@pytest.mark.parametrize("signed", [False, True], ids=["unsigned", "signed"])
@pytest.mark.parametrize("form", ["pickle", "torch.save"])
@pytest.mark.parametrize("name", ["extra.json", "index.json", "optimizer.json", "*.safetensors", ".metadata", "x.pt"])
def test_a_planted_pickle_is_refused_and_does_not_run(
    checkpoints: Checkpoints, marker: Path, name: str, form: str, signed: bool
) -> None:
    folder = checkpoints.folder / "step-1"
    if form == "pickle":
        data = pickle.dumps(Bomb(marker))
    else:
        torch.save({"weight": Bomb(marker)}, marker.with_suffix(".pt"))
        data = marker.with_suffix(".pt").read_bytes()
    plant(folder, name, data, signed)
    if signed and name in (".metadata", "x.pt"):
        checkpoints.load(1, *made())  # a file that nothing names is never opened
    else:
        with pytest.raises(CheckpointError, match=name.removeprefix("*").replace(".", r"\.")):
            checkpoints.load(1, *made())
    checkpoints.list(checksums=True)
    assert not marker.exists()


def test_a_pickle_as_the_manifest_is_refused(checkpoints: Checkpoints, marker: Path) -> None:
    (checkpoints.folder / "step-1" / "manifest.json").write_bytes(pickle.dumps(Bomb(marker)))
    with pytest.raises(CheckpointError, match="is not JSON"):
        checkpoints.load(1, *made())
    assert not marker.exists()


def test_a_checkpoint_of_torch_alone_is_named_as_such(tmp_path: Path, marker: Path) -> None:
    folder = tmp_path / "step-1"
    folder.mkdir()
    (folder / ".metadata").write_bytes(pickle.dumps(Bomb(marker)))
    (folder / "__0_0.distcp").write_bytes(pickle.dumps(Bomb(marker)))
    with pytest.raises(CheckpointError, match=r"has no manifest.json: .* its \.metadata is a pickle"):
        Checkpoints(tmp_path).load(1, *made())
    assert not marker.exists()


def change_index(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    index = json.loads((folder / "index.json").read_text())
    change(index["tensors"])
    plant(folder, "index.json", json.dumps(index).encode(), signed=True)


@pytest.mark.parametrize(
    ("change", "reported"),
    [
        (lambda t: t["weight"]["blocks"][0].update(file="../../secret"), "secret', which the manifest lacks"),
        (lambda t: t["weight"]["blocks"][0].update(file="extra.json"), "not a safetensors file"),
        (lambda t: t["weight"]["blocks"][0].update(offset=[1, 0]), "lies outside its shape"),
        (lambda t: t["weight"]["blocks"][0].update(offset=[-1, 0]), "greater than or equal to 0"),
        (lambda t: t["weight"]["blocks"][0].update(size=[1, 3]), "only a part of weight"),
        (lambda t: t["weight"].update(blocks=[]), "only a part of weight"),
        (lambda t: t["weight"].update(dtype="float64"), "differ on weight"),
        (lambda t: t["weight"].update(dtype="object"), "unknown dtype 'object'"),
        (lambda t: t["optimizer.weight.exp_avg"].update(dtype="float64"), "gave torch.float32"),
        (lambda t: t["optimizer.weight.exp_avg"].update(shape=[2, 2]), "lies outside its shape"),
        (lambda t: t["optimizer.weight.exp_avg"].update(shape=[2, 9]), "take one step before loading"),
        (lambda t: t.pop("weight"), "differ on weight"),
        (lambda t: t.update(weight=3), "weight: Input should be"),
    ],
)
def test_an_index_that_lies_is_refused(
    checkpoints: Checkpoints, change: Callable[[dict[str, Any]], None], reported: str
) -> None:
    change_index(checkpoints.folder / "step-1", change)
    with pytest.raises(CheckpointError) as error:
        checkpoints.load(1, *made())
    assert reported in str(error.value)


@pytest.mark.parametrize("name", ["../secret", "/etc/hostname", "..", "", "a/b"])
def test_a_manifest_that_names_files_elsewhere_is_refused(checkpoints: Checkpoints, tmp_path: Path, name: str) -> None:
    (checkpoints.folder / "secret").write_bytes(b"x")
    folder = checkpoints.folder / "step-1"
    manifest = read_manifest(folder)
    record = FileRecord(name=name, bytes=1, crc32=zlib.crc32(b"x"))
    (folder / "manifest.json").unlink()
    write_manifest(folder, manifest.model_copy(update={"files": [*manifest.files, record]}))
    with pytest.raises(CheckpointError, match="is not the name of a file in it"):
        checkpoints.load(1, *made())


def test_deeply_nested_json_is_refused(checkpoints: Checkpoints) -> None:
    plant(checkpoints.folder / "step-1", "extra.json", b"[" * 100_000, signed=True)
    with pytest.raises(CheckpointError, match=r"extra\.json is not JSON"):
        checkpoints.load(1, *made())

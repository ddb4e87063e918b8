"""`colrow checkpoints RUN` tells what is there."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from colrow.checkpoint.distributed import Checkpoints
from colrow.cli import main
from colrow.mesh import Mesh


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Step 10 of a mesh of four, step 20 damaged, step 30 unfinished."""
    run = tmp_path / "run"
    Checkpoints(run / "checkpoints", mesh=Mesh(dp_shard=2, tp=2)).save(10, nn.Linear(2, 2), None, {})
    Checkpoints(run / "checkpoints").save(20, nn.Linear(100, 100), None, {})
    next((run / "checkpoints" / "step-20").glob("*.safetensors")).unlink()
    (run / "checkpoints" / "step-30.unfinished").mkdir()
    (run / "checkpoints" / "step-40.txt").touch()
    (run / "checkpoints" / "step-007").mkdir()
    return run


@pytest.mark.parametrize("inside", ["", "checkpoints"])
def test_json_lists_step_mesh_size_and_state(run: Path, capsys: pytest.CaptureFixture[str], inside: str) -> None:
    assert main(["checkpoints", str(run / inside), "--json"]) == 1
    first, second, third = json.loads(capsys.readouterr().out)
    assert first["step"] == 10
    assert first["mesh"] == {"pp": 1, "dp_replicate": 1, "dp_shard": 2, "tp": 2}
    assert first["bytes"] == sum(file.stat().st_size for file in (run / "checkpoints" / "step-10").iterdir())
    assert (first["state"], first["reason"]) == ("complete", None)
    assert (second["step"], second["state"]) == (20, "damaged")
    assert second["reason"] == "rank-00000-0000.safetensors is missing"
    assert (third["step"], third["state"], third["mesh"]) == (30, "unfinished", None)


def test_the_table_names_what_is_wrong(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["checkpoints", str(run)]) == 1
    out = capsys.readouterr().out
    assert "dp_shard 2 × tp 2" in out
    assert "step-20: rank-00000-0000.safetensors is missing" in out
    assert f"newest complete: {run / 'checkpoints' / 'step-10'}" in out


def test_altered_bytes_show_with_checksums(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Checkpoints(tmp_path).save(1, nn.Linear(2, 2), None, {})
    path = next((tmp_path / "step-1").glob("*.safetensors"))
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))
    assert main(["checkpoints", str(tmp_path)]) == 0
    assert main(["checkpoints", str(tmp_path), "--checksums"]) == 1
    assert "is altered: its checksum differs" in capsys.readouterr().out


def test_no_run_and_no_checkpoints(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["checkpoints", str(tmp_path / "nothing")]) == 2
    assert "is not a folder: give a run's folder" in capsys.readouterr().err
    assert main(["checkpoints", str(tmp_path)]) == 0
    assert "no checkpoints" in capsys.readouterr().out


def test_a_checkpoint_can_be_read_by_safetensors_alone(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    model = nn.Linear(3, 2).to(torch.bfloat16)
    Checkpoints(tmp_path).save(1, model, None, {})
    stored = load_file(next((tmp_path / "step-1").glob("*.safetensors")))
    assert torch.equal(stored["weight@0,0"], model.weight)
    assert torch.equal(stored["bias@0"], model.bias)

"""The folder and the caches of a run that version 1b285e2 wrote (tp 2, four steps) are read, and give the same."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from colrow.checkpoint.distributed import Checkpoints
from colrow.checkpoint.folder import Folder, list_checkpoints
from colrow.cli import export
from colrow.cli.loading import open_saved
from colrow.config import load_config
from colrow.data.prepare import prepare
from colrow.errors import CheckpointError

STORED = Path(__file__).with_name("old_run")
EXP_AVG = 3.9482841152946513
"""Sum of |exp_avg|, as that version loads it."""


@pytest.fixture
def old_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "old_run"
    shutil.copytree(STORED, folder)
    monkeypatch.chdir(folder)  # as when it was run: its config names files from there
    return folder


def test_an_old_checkpoint_is_complete_and_exports_the_same_bytes(old_run: Path) -> None:
    (info,) = list_checkpoints(Folder(old_run / "run" / "checkpoints"), checksums=True)
    assert (info.step, info.state, info.reason) == (4, "complete", "")
    assert export.main([str(old_run / "run"), "-o", str(old_run / "out"), "--trust-code"]) == 0
    written, stored = (old_run / folder / "model.safetensors" for folder in ("out", "run/export"))
    assert written.read_bytes() == stored.read_bytes()


def test_old_optimizer_state_is_loaded(old_run: Path) -> None:
    model = open_saved(old_run / "run", trust_code=True).model.to_empty(device="cpu")
    params = list(model.parameters())
    optimizer = torch.optim.AdamW([{"params": [p for p in params if (p.ndim > 1) == m]} for m in (True, False)])
    extra = Checkpoints(old_run / "run" / "checkpoints").load(4, model, optimizer)
    assert (extra["step"], extra["seed"]) == (4, 0)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]
    assert {state["step"].item() for state in optimizer.state.values()} == {4.0}
    total = sum(state["exp_avg"].double().abs().sum().item() for state in optimizer.state.values())
    assert total == pytest.approx(EXP_AVG, rel=1e-12)


def test_old_optimizer_state_is_loaded_into_other_groups(old_run: Path) -> None:
    """What decays is decided again at each start: state that was saved in two groups goes into one, and back."""
    model = open_saved(old_run / "run", trust_code=True).model.to_empty(device="cpu")
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.3, betas=(0.5, 0.6))
    checkpoints = Checkpoints(old_run / "run" / "checkpoints")
    checkpoints.load(4, model, optimizer, keep_options=True)
    assert [(group["weight_decay"], group["betas"]) for group in optimizer.param_groups] == [(0.3, (0.5, 0.6))]
    total = sum(state["exp_avg"].double().abs().sum().item() for state in optimizer.state.values())
    assert total == pytest.approx(EXP_AVG, rel=1e-12)
    with pytest.raises(CheckpointError, match="joins parameters that had different options"):
        checkpoints.load(4, model, optimizer)


def test_an_old_cache_and_corpus_are_recognized(old_run: Path) -> None:
    data = prepare(load_config(old_run / "run" / "config.yaml").data, 264, progress=False)
    assert not data.built
    extra = (old_run / "run" / "checkpoints" / "step-4" / "extra.json").read_text()
    assert data.fingerprint in extra

"""One process: what is saved comes back bit for bit, and whatever is wrong with a checkpoint is reported by name."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import resource
import shutil
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from colrow.checkpoint import tensor_file
from colrow.checkpoint.distributed import Checkpoints
from colrow.errors import CheckpointError


class Net(nn.Module):
    def __init__(self, width: int = 4, vocabulary: int = 10, tied: bool = False) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(vocabulary, width)
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(2))
        self.norm = nn.LayerNorm(width)
        self.lm_head = nn.Linear(width, vocabulary, bias=False)
        if tied:
            self.lm_head.weight = self.embed_tokens.weight
        self.register_buffer("scale", torch.rand(()))
        self.register_buffer("empty", torch.zeros(0, 3))
        self.register_buffer("cache", torch.rand(3), persistent=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed_tokens(ids)
        for layer in self.layers:
            x = x + layer(x).tanh()
        return self.lm_head(self.norm(x))


def made(seed: int, steps: int = 0, dtype: torch.dtype = torch.float32, **shape: Any) -> tuple[Net, torch.optim.AdamW]:
    torch.manual_seed(seed)
    model = Net(**shape).to(dtype)
    optimizer = torch.optim.AdamW(model.parameters(), lr=10.0 ** -(seed + 1), betas=(0.8, 0.9 + 0.01 * seed))
    for step in range(steps):
        optimizer.zero_grad()
        model(torch.arange(step, step + 5)).square().mean().backward()
        optimizer.step()
    return model, optimizer


def state_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    state = dict(model.state_dict())
    for name, param in model.named_parameters():
        state.update({f"{name}.{key}": value for key, value in optimizer.state[param].items()})
    return {name: tensor.clone() for name, tensor in state.items()}


def differing(a: dict[str, Tensor], b: dict[str, Tensor]) -> list[str]:
    assert a.keys() == b.keys()
    return [name for name in a if a[name].dtype != b[name].dtype or not torch.equal(a[name], b[name])]


@pytest.fixture
def saved(tmp_path: Path) -> Checkpoints:
    """Steps 1 and 2 of a run."""
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    for step in (1, 2):
        checkpoints.save(step, *made(step, steps=step), {"step": step})
    return checkpoints


@pytest.mark.parametrize("asynchronous", [False, True], ids=["synchronous", "asynchronous"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_model_optimizer_and_extra_come_back_bit_for_bit(
    tmp_path: Path, dtype: torch.dtype, tied: bool, asynchronous: bool
) -> None:
    model, optimizer = made(0, steps=3, dtype=dtype, tied=tied)
    extra = {"step": 3, "position": [1, 2], "rng": {"torch": "00ff"}, "lr": 0.1 + 0.2, "name": None}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        checkpoints = Checkpoints(tmp_path, asynchronous=asynchronous)
        checkpoints.save(3, model, optimizer, extra)
        truth = state_of(model, optimizer)
        with torch.no_grad():
            for param in model.parameters():
                param.zero_()  # what the training loop does next is not what is saved
        checkpoints.wait()
        other, fresh = made(1, dtype=dtype, tied=tied)
        assert differing(truth, {**truth, **other.state_dict()})  # a load that does nothing would be seen
        assert Checkpoints(tmp_path).load(3, other, fresh) == extra
    assert differing(truth, state_of(other, fresh)) == []
    for key in ("lr", "betas", "eps", "weight_decay", "foreach"):
        assert fresh.param_groups[0][key] == optimizer.param_groups[0][key]
    index = json.loads((tmp_path / "step-3" / "index.json").read_text())["tensors"]
    assert ("lm_head.weight" in index) != tied
    assert "cache" not in index


def test_training_goes_on_as_if_it_had_not_stopped(tmp_path: Path) -> None:
    model, optimizer = made(0, steps=2)
    Checkpoints(tmp_path).save(2, model, optimizer, {})
    other, fresh = made(1)
    Checkpoints(tmp_path).load(2, other, fresh)
    for m, o in ((model, optimizer), (other, fresh)):
        for _ in range(3):
            o.zero_grad()
            m(torch.arange(6)).square().mean().backward()
            o.step()
    assert differing(state_of(model, optimizer), state_of(other, fresh)) == []


def test_other_optimizers_and_scalar_state_come_back(tmp_path: Path) -> None:
    def sgd(seed: int) -> tuple[Net, torch.optim.SGD]:
        torch.manual_seed(seed)
        model = Net()
        return model, torch.optim.SGD(model.parameters(), lr=torch.tensor(0.25 / (seed + 1)), momentum=0.9)

    model, optimizer = sgd(0)
    model(torch.arange(4)).sum().backward()
    optimizer.step()
    for number, param in enumerate(model.parameters()):
        optimizer.state[param]["count"] = number
    Checkpoints(tmp_path).save(1, model, optimizer, {})
    other, fresh = sgd(1)
    Checkpoints(tmp_path).load(1, other, fresh)
    assert fresh.param_groups[0]["lr"].item() == 0.25
    for param, counterpart in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(optimizer.state[param]["momentum_buffer"], fresh.state[counterpart]["momentum_buffer"])
        assert optimizer.state[param]["count"] == fresh.state[counterpart]["count"]


def test_an_optimizer_that_had_not_stepped_is_fresh_again(tmp_path: Path) -> None:
    Checkpoints(tmp_path).save(0, *made(0), {})
    model, optimizer = made(1, steps=2)
    Checkpoints(tmp_path).load(0, model, optimizer)
    assert not optimizer.state


def test_compiled_blocks_and_plain_ones_share_a_checkpoint(tmp_path: Path) -> None:
    model, optimizer = made(0, steps=1)
    truth = state_of(model, optimizer)
    model.layers[0] = torch.compile(model.layers[0], backend="eager")
    assert "layers.0._orig_mod.weight" in model.state_dict()
    Checkpoints(tmp_path).save(1, model, optimizer, {})
    other, fresh = made(1)
    Checkpoints(tmp_path).load(1, other, fresh)
    assert differing(truth, state_of(other, fresh)) == []
    compiled, fresh = made(1)
    compiled.layers[1] = torch.compile(compiled.layers[1], backend="eager")
    Checkpoints(tmp_path).load(1, compiled, fresh)
    assert torch.equal(compiled.layers[1].weight, other.layers[1].weight)


def test_pipeline_stages_of_one_rank_are_one_model(tmp_path: Path) -> None:
    model, _ = made(0, steps=1)
    stages = []
    for wanted in ("layers.0", "layers.1"):
        stage = Net()
        stage.load_state_dict(model.state_dict())
        for name in ("layers.0", "layers.1"):
            if name != wanted:
                del stage.layers._modules[name[-1]]
        stages.append(stage)
    for name in ("embed_tokens", "scale", "empty"):
        delattr(stages[1], name)
    for name in ("lm_head", "norm"):
        delattr(stages[0], name)
    Checkpoints(tmp_path).save(1, stages, None, {})
    other, _ = made(1)
    Checkpoints(tmp_path).load(1, other)
    assert differing(dict(model.state_dict()), dict(other.state_dict())) == []


def test_copies_of_a_tied_parameter_are_stored_once_and_loaded_everywhere(tmp_path: Path) -> None:
    tied, optimizer = made(0, steps=1, tied=True)
    Checkpoints(tmp_path).save(1, tied, optimizer, {})
    other, fresh = made(1, tied=False)
    Checkpoints(tmp_path, tied={"lm_head.weight": "embed_tokens.weight"}).load(1, other, fresh)
    assert other.lm_head.weight is not other.embed_tokens.weight
    for weight in (other.lm_head.weight, other.embed_tokens.weight):
        assert torch.equal(weight, tied.lm_head.weight)
        assert torch.equal(fresh.state[weight]["exp_avg"], optimizer.state[tied.lm_head.weight]["exp_avg"])


def test_the_newest_stay(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "step-0")  # removed with the old ones, and not opened: it would wait for a writer
    checkpoints = Checkpoints(tmp_path, keep=2)
    for step in (1, 2, 3, 4):
        checkpoints.save(step, *made(0, steps=1), {})
    assert [info.step for info in checkpoints.list()] == [3, 4]
    assert checkpoints.latest() == checkpoints.list()[-1]
    Checkpoints(tmp_path, keep=1).save(5, *made(0, steps=1), {})
    assert [info.step for info in checkpoints.list()] == [5]


def test_a_run_that_went_back_keeps_what_it_saves(tmp_path: Path) -> None:
    for step in (10, 20, 5, 6):
        Checkpoints(tmp_path, keep=1).save(step, *made(0), {})
    assert [info.step for info in Checkpoints(tmp_path).list()] == [6, 20]


def test_a_step_can_be_saved_again(saved: Checkpoints) -> None:
    model, optimizer = made(7, steps=2)
    saved.save(2, model, optimizer, {"again": True})
    other, fresh = made(0)
    assert saved.load(2, other, fresh) == {"again": True}
    assert differing(state_of(model, optimizer), state_of(other, fresh)) == []
    assert [p.name for p in sorted(saved.folder.iterdir())] == ["step-1", "step-2"]


@pytest.mark.parametrize("keep", [0, -1])
def test_keeping_none_is_refused(tmp_path: Path, keep: int) -> None:
    with pytest.raises(CheckpointError, match="use 1 or more"):
        Checkpoints(tmp_path, keep=keep)


@pytest.mark.parametrize(
    "extra", [{"a": (1, 2)}, {"a": {1: 2}}, {"a": float("nan")}, {"a": {1, 2}}, {"a": torch.zeros(2)}], ids=str
)
def test_an_extra_that_is_not_json_is_named_and_nothing_is_saved(saved: Checkpoints, extra: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError, match=r"extra\['a'\]"):
        saved.save(3, *made(0), extra)
    assert [info.step for info in saved.list()] == [1, 2]


def test_a_step_that_is_not_there(saved: Checkpoints) -> None:
    with pytest.raises(CheckpointError, match=r"no checkpoint of step 7 in .*: there are 1, 2"):
        saved.load(7, *made(0))


# Another model


def shapes(error: pytest.ExceptionInfo[CheckpointError]) -> str:
    return str(error.value)


def test_another_width_lists_names_and_shapes(saved: Checkpoints) -> None:
    model, optimizer = made(0, width=6)
    before = state_of(model, optimizer)
    with pytest.raises(CheckpointError) as error:
        saved.load(2, model, optimizer)
    assert "embed_tokens.weight float32[10, 4] there, float32[10, 6] here" in shapes(error)
    assert "and 4 more" in shapes(error)
    assert differing(before, state_of(model, optimizer)) == []


def test_another_vocabulary_is_called_so(saved: Checkpoints) -> None:
    with pytest.raises(CheckpointError, match="its vocabulary has 10 tokens, this one 12"):
        saved.load(2, *made(0, vocabulary=12))


def test_another_tokenizer_of_the_same_size_is_refused(tmp_path: Path) -> None:
    Checkpoints(tmp_path, vocabulary="bpe-1a2b").save(1, *made(0), {})
    with pytest.raises(CheckpointError, match="bpe-1a2b there, bpe-3c4d here"):
        Checkpoints(tmp_path, vocabulary="bpe-3c4d").load(1, *made(0))
    Checkpoints(tmp_path, vocabulary="bpe-1a2b").load(1, *made(0))


def test_another_dtype_is_not_cast_silently(saved: Checkpoints) -> None:
    with pytest.raises(CheckpointError, match=r"its dtypes differ.* float32\[10, 4\] there, float64\[10, 4\] here"):
        saved.load(2, *made(0, dtype=torch.float64))


def test_missing_and_added_parameters_are_named(saved: Checkpoints) -> None:
    model, _ = made(0)
    model.extra_norm = nn.LayerNorm(4)
    del model.norm
    with pytest.raises(CheckpointError) as error:
        saved.load(2, model)
    assert "only in the checkpoint: norm.weight float32[4], norm.bias" in shapes(error)
    assert "only in the model: extra_norm.weight float32[4], extra_norm.bias" in shapes(error)


def test_another_optimizer_is_refused(saved: Checkpoints, tmp_path: Path) -> None:
    model, _ = made(0)
    with pytest.raises(CheckpointError, match="state of AdamW, this run's optimizer is SGD"):
        saved.load(2, model, torch.optim.SGD(model.parameters(), lr=0.1))
    with pytest.raises(CheckpointError, match=r"optimizer of other parameters: only there: lm_head.weight"):
        saved.load(2, model, torch.optim.AdamW([p for n, p in model.named_parameters() if n != "lm_head.weight"]))
    apart = Checkpoints(tmp_path / "groups")
    groups = [{"params": [p], "lr": 0.1 * i} for i, p in enumerate(model.parameters())]
    apart.save(1, model, torch.optim.AdamW(groups), {})
    with pytest.raises(CheckpointError, match="joins parameters that had different options"):
        apart.load(1, *made(0))
    apart.save(2, model, None, {})
    with pytest.raises(CheckpointError, match="holds no optimizer state"):
        apart.load(2, *made(0))


def test_an_optimizer_of_another_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="make the optimizer after the model is parallelized"):
        Checkpoints(tmp_path).save(1, made(0)[0], made(0)[1], {})


def test_a_model_on_the_meta_device_is_refused(saved: Checkpoints) -> None:
    with torch.device("meta"):
        model = Net()
    with pytest.raises(CheckpointError, match=r"scale is on the meta device: give the model memory"):
        saved.load(2, model)


# Damage


def tensors_of(checkpoints: Checkpoints, step: int) -> Path:
    return next((checkpoints.folder / f"step-{step}").glob("*.safetensors"))


@pytest.mark.parametrize("name", ["manifest.json", "index.json", "extra.json", "optimizer.json", "*.safetensors"])
@pytest.mark.parametrize("how", ["missing", "cut", "altered"])
def test_damage_is_named_and_the_newest_whole_one_offered(saved: Checkpoints, name: str, how: str) -> None:
    path = next((saved.folder / "step-2").glob(name))
    if how == "missing":
        path.unlink()
    elif how == "cut":
        path.write_bytes(path.read_bytes()[:-7])
    else:
        data = bytearray(path.read_bytes())
        digits = [i for i, byte in enumerate(data) if chr(byte) in "0123456789"]
        data[digits[-1] if path.suffix == ".json" else -1] ^= 1
        path.write_bytes(bytes(data))
    model, optimizer = made(0)
    before = state_of(model, optimizer)
    with pytest.raises(CheckpointError) as error:
        saved.load(2, model, optimizer)
    assert path.name in str(error.value)
    assert f"the newest complete one is {saved.folder / 'step-1'}" in str(error.value)
    assert differing(before, state_of(model, optimizer)) == []
    states = {info.step: info.state for info in saved.list(checksums=True)}
    assert states == {1: "complete", 2: "damaged"}
    if how != "altered":
        latest = saved.latest()
        assert latest is not None
        assert latest.step == 1
        saved.load(latest, model, optimizer)


def test_the_only_checkpoint_damaged_offers_none(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, *made(0), {})
    tensors_of(checkpoints, 1).unlink()
    with pytest.raises(CheckpointError, match=r"safetensors is missing; there is no other complete one"):
        checkpoints.load(1, *made(0))


def test_a_damaged_checkpoint_does_not_push_a_whole_one_out(saved: Checkpoints) -> None:
    tensors_of(saved, 2).unlink()
    saved.save(3, *made(0), {})
    assert {info.step: info.state for info in saved.list()} == {1: "complete", 2: "damaged", 3: "complete"}
    saved.save(4, *made(0), {})
    assert {info.step: info.state for info in saved.list()} == {3: "complete", 4: "complete"}


def test_a_folder_of_another_step_is_damaged(saved: Checkpoints) -> None:
    shutil.copytree(saved.folder / "step-2", saved.folder / "step-3")
    (info,) = [info for info in saved.list() if info.step == 3]
    assert info.reason == "its manifest is of step 2"


# A full disk


def test_too_little_space_is_reported_before_anything_is_written(
    saved: Checkpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9 - 1000, 1000))
    with pytest.raises(CheckpointError, match=r"too full for a checkpoint in .*/checkpoints: it needs .*bytes\), 1000"):
        saved.save(3, *made(0, steps=1), {})
    assert [info.step for info in saved.list()] == [1, 2]


@contextlib.contextmanager
def small_files() -> Iterator[None]:
    """The operating system refuses to let a file of this process grow past 2 KiB: pytest's own log is one of them."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2048, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_disk_that_fills_up_while_writing_leaves_the_previous_one(saved: Checkpoints) -> None:
    model, optimizer = made(0, steps=1)
    refused = pytest.raises(CheckpointError, match=r"too full for a checkpoint in .*/checkpoints: .*File too large")
    with refused, small_files():
        saved.save(3, model, optimizer, {})
    assert {info.step: info.state for info in saved.list(checksums=True)} == {1: "complete", 2: "complete"}
    assert saved.load(2, model, optimizer) == {"step": 2}


def test_a_failed_background_save_is_reported_once_and_never_complete(
    saved: Checkpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    behind = Checkpoints(saved.folder, asynchronous=True)

    def full(*args: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(tensor_file.os, "fsync", full)
        behind.save(3, *made(0, steps=1), {})
        with pytest.raises(CheckpointError, match="No space left on device"):
            behind.wait()
        behind.wait()
        behind.save(3, *made(0, steps=1), {})
        with pytest.raises(CheckpointError, match="too full"):
            behind.save(4, *made(0, steps=1), {})
    assert [info.step for info in saved.list()] == [1, 2]
    behind.save(5, *made(0, steps=1), {})
    behind.wait()
    assert [(info.step, info.state) for info in saved.list()] == [(2, "complete"), (5, "complete")]


def test_a_background_save_does_not_hold_the_loop_and_the_next_waits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    go, began = threading.Event(), threading.Event()
    real = tensor_file.os.fsync

    def slow(handle: int) -> None:
        began.set()
        assert go.wait(30)
        real(handle)

    monkeypatch.setattr(tensor_file.os, "fsync", slow)
    checkpoints = Checkpoints(tmp_path, asynchronous=True)
    model, optimizer = made(0, steps=1)
    checkpoints.save(1, model, optimizer, {})
    assert began.wait(30)
    assert checkpoints.latest() is None  # saving goes on, and training could
    assert [(info.step, info.state) for info in checkpoints.list()] == [(1, "unfinished")]
    second = threading.Thread(target=checkpoints.save, args=(2, model, optimizer, {}))
    second.start()
    second.join(0.2)
    assert second.is_alive()  # it waits for the first
    go.set()
    second.join(30)
    checkpoints.wait()
    assert [info.step for info in checkpoints.list(checksums=True) if info.state == "complete"] == [1, 2]

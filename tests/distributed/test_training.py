"""Whole runs on two ranks: what a stop, a resume and a divergence leave behind."""

from __future__ import annotations

import json
import math
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from colrow.config import RunConfig
from colrow.config_sections import ModelSection
from colrow.mesh import Mesh
from colrow.run.nonfinite import DivergedError
from colrow.train.metrics import read_metrics
from helpers.harness import Ranks
from helpers.runs import a_run, figures, model_and_plan, train, write_text

pytestmark = pytest.mark.distributed


def tiny(folder: Path, name: str, **train: Any) -> RunConfig:
    """A run on two ranks that evaluates, saves, and writes a sample."""
    sections = {
        "eval": {"every": 3, "batches": 1},
        "checkpoint": {"every": 2},
        "sample": {"prompt": "def ", "tokens": 4},
    }
    return a_run(folder, name, mesh={"tp": 2}, train=train, **sections)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("training")
    write_text(folder)
    return folder


@pytest.fixture(scope="module")
def whole(ranks: Ranks, folder: Path) -> Path:
    """The folder of a finished run. Where another test has trained it, this start finds nothing left to do."""
    ranks(2).run(train, tiny(folder, "whole"))
    return folder / "whole"


def stop_and_continue(device: str, folder: Path) -> list[Any]:
    whole = train(device, tiny(folder, "whole"))
    parts = tiny(folder, "parts")
    stopped = train(device, parts, stop_after=3)
    with (parts.run.dir / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps({"step": 99, "loss": 1.0}) + '\n{"torn')  # steps that no checkpoint holds
    return [whole, stopped, train(device, parts)]


def diverge(device: str, folder: Path) -> str:
    try:
        train(device, tiny(folder, "diverged", lr=1e30, warmup_steps=0, grad_clip=None, steps=8))
    except DivergedError as error:
        return str(error)
    return "no error"


def test_a_stopped_run_continues_bit_for_bit(ranks: Ranks, folder: Path) -> None:
    results = ranks(2).run(stop_and_continue, folder)
    for whole, stopped, continued in results:
        assert whole[:2] == (6, False)
        assert 3 <= stopped[0] <= 4  # on GPUs the request is read a step later
        assert stopped[1]
        assert continued[:2] == (6, False)
    assert "colrow train tiny.yaml" in results[0][1][2]
    assert "continues" in results[0][2][2]
    want = figures(folder / "whole" / "metrics.jsonl")
    assert [record["step"] for record in want] == [1, 2, 3, 4, 5, 6]
    assert [record["step"] for record in want if "val_loss" in record] == [3, 6]
    assert figures(folder / "parts" / "metrics.jsonl") == want


def test_another_seed_gives_other_figures(ranks: Ranks, folder: Path, whole: Path) -> None:
    """The negative control of the comparison above."""
    config = tiny(folder, "seed", steps=1, warmup_steps=0)
    ranks(2).run(train, config.model_copy(update={"run": config.run.model_copy(update={"seed": 1})}))
    assert figures(folder / "seed" / "metrics.jsonl")[0]["loss"] != figures(whole / "metrics.jsonl")[0]["loss"]


def test_a_finished_run_leaves_all_its_files(whole: Path) -> None:
    names = {path.name for path in whole.iterdir()}
    assert names >= {"config.yaml", "plan.yaml", "tokenizer.json", "metrics.jsonl", "loss.png", "loss.svg"}
    assert {path.name for path in (whole / "checkpoints").iterdir()} == {"step-4", "step-6"}
    assert (whole / "export" / "config.json").exists()
    last = read_metrics(whole / "metrics.jsonl")[-1]
    assert last["tokens"] == 6 * 4 * 32
    assert last["perplexity"] == pytest.approx(math.exp(last["val_loss"]))


def test_a_diverged_run_stops_on_every_rank_and_keeps_its_checkpoint(ranks: Ranks, folder: Path) -> None:
    for text in ranks(2).run(diverge, folder):
        assert "has diverged" in text
        assert "Try a lower train.lr" in text
    saved = {path.name for path in (folder / "diverged").rglob("step-*")}
    assert "step-8" not in saved
    for record in read_metrics(folder / "diverged" / "metrics.jsonl"):
        assert math.isfinite(record["loss"])


def compiled_and_eager(device: str, folder: Path) -> list[tuple[float, float]]:
    """Loss and gradient norm of one step, with blocks compiled and not, with activations recomputed or not."""
    import torch.distributed as dist

    from colrow.parallel.compile import compile_forward
    from colrow.train import setup

    here = torch.device(device, dist.get_rank()) if device == "cuda" else torch.device(device)
    ids = torch.randint(0, 4096, (2, 33), generator=torch.Generator().manual_seed(3)).to(here)
    found = []
    setup.compile_forward = partial(compile_forward, backend="aot_eager")
    try:
        for compiled, recompute in ((False, "none"), (True, "none"), (True, "selective"), (True, "full")):
            config = tiny(folder, "compiled", compile=compiled, precision="fp32", activation_checkpoint=recompute)
            training = setup.set_up(
                config, config.mesh.build(device, dist.get_world_size()), here, *model_and_plan(config)
            )
            loss, norm = training.step(0, [(ids[:, :-1], ids[:, 1:])])
            found.append((loss.item(), norm.item()))
    finally:
        setup.compile_forward = compile_forward
    return found


def read_alike_and_apart(device: str) -> list[str]:
    """What the check of batches says when both ranks read one batch, and when each reads its own."""
    import torch.distributed as dist

    from colrow.errors import DataError
    from colrow.run.batch_check import check_same_batch

    group = dist.group.WORLD
    assert group is not None
    reported = []
    for own in (0, dist.get_rank()):
        ids = torch.arange(8, device=device).reshape(2, 4) + own
        try:
            check_same_batch([(ids, ids + 1)], [group], step=4)
            reported.append("alike")
        except DataError as error:
            reported.append(str(error))
    return reported


def test_ranks_that_read_different_batches_stop(ranks: Ranks) -> None:
    for alike, apart in ranks(2).run(read_alike_and_apart):
        assert alike == "alike"
        assert "step 5: rank " in apart
        assert "read different batches" in apart


@pytest.mark.exhaustive
def test_compiled_blocks_give_the_eager_loss_and_gradient(ranks: Ranks, folder: Path) -> None:
    for eager, *others in ranks(2).run(compiled_and_eager, folder):
        for other in others:
            assert other == pytest.approx(eager, rel=1e-5)


MESHES = [{"tp": 2}, {"dp_shard": 2}, {"dp_replicate": 2}, {"pp": 2}]


def on_every_mesh(device: str, folder: Path) -> None:
    """Two steps on each mesh; then two more on all of them, from the checkpoint that the mesh before has left."""
    for i, mesh in enumerate(MESHES):
        for steps in (2, 4):
            name = f"mesh-{i}" if steps == 2 else f"mesh-{i - 1}"
            config = tiny(folder, name, steps=steps, schedule="wsd", decay_steps=1)
            changes = {
                "mesh": Mesh(**mesh),
                "model": ModelSection(shape="laptop", layers=2),
                "checkpoint": config.checkpoint.model_copy(update={"export": False}),
                "sample": config.sample.model_copy(update={"prompt": None}),
            }
            if steps == 2 or i:
                train(device, config.model_copy(update=changes))


@pytest.mark.exhaustive
def test_every_mesh_trains_alike_and_continues_the_others_runs(ranks: Ranks, folder: Path) -> None:
    ranks(2).run(on_every_mesh, folder)
    want, *others = [figures(folder / f"mesh-{i}" / "metrics.jsonl") for i in range(len(MESHES))]
    assert [record["step"] for record in want] == list(range(1, 5))
    for other in others:
        assert other[0] == pytest.approx(want[0], rel=1e-4)
        for one, record in zip(want, other, strict=False):
            # fp32: where a gradient is near zero, Adam's first steps turn its rounding into a step of full size
            assert record == pytest.approx(one, rel=1e-3)
    assert [len(other) for other in others] == [4, 4, 2]


STARTS = [("colrow", "llama"), ("transformers", "huggingface"), ("transformers", "derive")]


def from_a_folder(device: str, folder: Path) -> None:
    """Two steps from the export of a run, with this project's Llama and with the class of transformers."""
    if not (folder / "whole" / "export").exists():  # of an earlier test, where that has run
        train(device, tiny(folder, "whole"))
    for implementation, plan in STARTS:
        config = tiny(folder, f"from-{implementation}-{plan}", steps=2, warmup_steps=0)
        model = ModelSection(huggingface=str(folder / "whole" / "export"), implementation=implementation)
        tokenizer = config.data.tokenizer.model_copy(update={"path": folder / "whole", "vocab_size": None})
        data = config.data.model_copy(update={"tokenizer": tokenizer})
        section = config.train.model_copy(update={"precision": "fp32"})  # on GPUs too
        train(device, config.model_copy(update={"model": model, "plan": plan, "data": data, "train": section}))


@pytest.mark.exhaustive
def test_a_folder_is_trained_alike_by_both_implementations(ranks: Ranks, folder: Path, whole: Path) -> None:
    pytest.importorskip("transformers")
    ranks(2).run(from_a_folder, folder)
    want, *others = [figures(folder / f"from-{i}-{plan}" / "metrics.jsonl") for i, plan in STARTS]
    start = figures(whole / "metrics.jsonl")
    assert want[0]["loss"] < start[0]["loss"] - 0.5  # it begins where the run has ended
    for other in others:
        assert other[0] == pytest.approx(want[0], rel=1e-4)
        assert other[1]["loss"] == pytest.approx(want[1]["loss"], rel=1e-3)
    export = folder / "from-transformers-derive" / "export"
    assert json.loads((export / "config.json").read_text())["model_type"] == "llama"

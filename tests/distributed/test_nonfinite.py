"""A step that is not finite, on one rank alone, ends the run or is left out on all; what is known of it is kept."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from colrow.config import RunConfig
from colrow.models.build import build_source
from colrow.plans.plan import Plan
from colrow.run.nonfinite import FILE, DivergedError
from colrow.sharding.layout import full_tensor
from colrow.train.metrics import read_metrics
from colrow.train.setup import set_up
from helpers import nonfinite_models
from helpers.harness import Ranks
from helpers.runs import a_run, train, write_text

pytestmark = pytest.mark.distributed


def run_of(folder: Path, name: str, mesh: str = "dp_shard", **train: Any) -> RunConfig:
    """Steps of 4 sequences: a forward a step on each of two ranks."""
    return a_run(
        folder,
        name,
        model={"python": "helpers.nonfinite_models:build"},
        mesh={mesh: 2},
        plan=str(folder / "none.yaml"),
        train={"steps": 4, "warmup_steps": 0, "lr": 1e-2} | train,
        checkpoint={"export": False},
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("nonfinite")
    write_text(folder)
    (folder / "none.yaml").write_text("name: none\nloss: replicated\nmodules: {}\n")
    return folder


def state_after(device: str, config: RunConfig, steps: list[int], bad: set[int], wrong: str) -> list[Tensor]:
    """Weights, buffers and the optimizer's state after these steps, in fp64, when the calls `bad` go wrong."""
    import torch.distributed as dist

    nonfinite_models.BAD_CALLS, nonfinite_models.WRONG = bad, wrong
    here = torch.device(device, dist.get_rank()) if device == "cuda" else torch.device(device)
    source = build_source(config.model, 0)
    source.model.double()
    plan = Plan({}, loss="replicated", name="none")
    training = set_up(config, config.mesh.build(device, 2), here, source, plan)
    ids = torch.randint(0, 300, (4, 2, 9), generator=torch.Generator().manual_seed(1 + dist.get_rank())).to(here)
    for step in steps:
        training.step(step, [(ids[step, :, :-1], ids[step, :, 1:])])
    nonfinite_models.BAD_CALLS = set()
    states = [value for param in training.step.params for value in training.optimizer.state[param].values()]
    return [full_tensor(t.detach()).cpu() for t in (*training.modules[0].state_dict().values(), *states)]


def _agree(here: bool) -> bool:
    """Whether it holds on all ranks."""
    import torch.distributed as dist

    everywhere: list[bool | None] = [None] * dist.get_world_size()
    dist.all_gather_object(everywhere, here)
    return all(everywhere)


def skipped_and_left_out(device: str, folder: Path) -> dict[str, tuple[bool, bool, bool]]:
    """For each mesh and wrong value: whether a skipped step equals one that was not run; whether that is any other
    state than after all steps; whether all is finite without skipping."""
    found = {}
    for mesh in ("dp_shard", "dp_replicate", "tp"):
        skips, stops = (run_of(folder, "unused", mesh, on_nonfinite=way) for way in ("skip", "stop"))
        left_out = state_after(device, skips, [0, 1, 3], set(), "")
        everything = state_after(device, skips, [0, 1, 2, 3], set(), "")
        # over tp the model is a copy a rank: what is wrong on one is known to the other by the ranks' agreement alone
        for wrong in ("loss",) if mesh == "tp" else ("loss", "gradient"):
            skipped = state_after(device, skips, [0, 1, 2, 3], {3}, wrong)
            spoiled = state_after(device, stops, [0, 1, 2, 3], {3}, wrong)
            found[f"{mesh} {wrong}"] = (
                all(map(torch.equal, skipped, left_out)),
                all(map(torch.equal, everything, left_out)),
                _agree(all(bool(tensor.isfinite().all()) for tensor in spoiled)),
            )
    return found


def test_a_skipped_step_changes_nothing_on_any_rank(ranks: Ranks, folder: Path) -> None:
    """Weights, buffers, moments and step counts; without the option they are spoiled."""
    for found in ranks(2).run(skipped_and_left_out, folder):
        assert len(found) == 5
        assert found == dict.fromkeys(found, (True, False, False))


def runs(device: str, folder: Path) -> list[str]:
    """A run that skips steps 2 and 3 and is continued; one that stops at step 3; one whose weights are lost."""
    texts = []
    nonfinite_models.WRONG, nonfinite_models.BAD_CALLS = "loss", {2, 3}
    texts.append(train(device, run_of(folder, "skips", on_nonfinite="skip"))[2])
    nonfinite_models.BAD_CALLS = {2}
    texts.append(train(device, run_of(folder, "skips", on_nonfinite="skip", steps=7))[2])
    for name, bad, way in (("stops", {3}, "stop"), ("lost", set(range(2, 40)), "skip")):
        nonfinite_models.BAD_CALLS = bad
        try:
            train(device, run_of(folder, name, on_nonfinite=way, steps=20))
        except DivergedError as error:
            texts.append(str(error))
    nonfinite_models.BAD_CALLS = set()
    return texts


def kept(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / FILE).read_text().splitlines()]


def test_bad_steps_are_counted_and_kept_with_the_position_of_their_batch(ranks: Ranks, folder: Path) -> None:
    (first, continued, stopped, lost), others = ranks(2).run(runs, folder)
    assert others[2:] == [stopped, lost]  # every rank raises
    records = read_metrics(folder / "skips" / "metrics.jsonl")
    assert [record["step"] for record in records] == list(range(1, 8))
    assert [record["skipped"] for record in records] == [0, 1, 2, 2, 2, 3, 3]
    assert [record.get("position") for record in records] == [None, 4, 8, None, None, 20, None]
    assert [math.isfinite(record["loss"]) for record in records] == [True, False, False, True, True, False, True]
    bad = kept(folder / "skips")
    assert [(entry["step"], entry["position"], entry["action"]) for entry in bad] == [
        (2, 4, "skip"),
        (3, 8, "skip"),
        (6, 20, "skip"),
    ]
    assert all(math.isnan(entry["loss"]) and math.isnan(entry["grad_norm"]) for entry in bad)
    assert "skipped    step 2: loss nan, gradient norm nan: the batch after 4 sequences" in first
    assert "skipped    3 of 7 steps, not finite: " in continued

    assert "step 3: loss nan, gradient norm nan: the run has diverged and stops; the last finite loss was" in stopped
    assert f"its batch is the one after 8 sequences ({folder / 'stops' / FILE})" in stopped
    assert [(entry["step"], entry["position"], entry["action"]) for entry in kept(folder / "stops")] == [(3, 8, "stop")]
    assert [record["step"] for record in read_metrics(folder / "stops" / "metrics.jsonl")] == [1, 2]

    assert "step 11: loss nan, gradient norm nan: the run has diverged and stops after 9 skipped steps" in lost
    assert [entry["action"] for entry in kept(folder / "lost")] == ["skip"] * 9 + ["stop"]

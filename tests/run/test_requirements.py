"""Advice was tried against all that a run requires before it is printed, whatever else is wrong."""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
import yaml
from torch.distributed.device_mesh import DeviceMesh

from colrow.config import RunConfig
from colrow.errors import AtMost, ColrowError, ConfigError, advice
from colrow.mesh import Mesh
from colrow.models.build import build_source
from colrow.plans.plan import Plan
from colrow.run import preflight
from colrow.run.requirements import check_with_model, refusal, runs_on
from colrow.train.setup import build_step

BATCHES = [1, 3, 4, 8, 12]


def refused(config: RunConfig) -> str:
    """The text with which a run is refused before it starts; empty where it is not."""
    try:
        preflight.check(preflight.resolve(config))
    except ColrowError as error:
        return str(error)
    return ""


def printed_changes(text: str) -> list[list[dict[str, Any]]]:
    """The alternatives of each line that has some: `set A to 1 or 2, or B to 3 and C to 4`."""
    lines = []
    for fixes in re.findall(r": set (.*)$", text, re.MULTILINE):
        alternatives: list[dict[str, Any]] = []
        for part in fixes.split(", or "):
            pairs = re.findall(r"([\w.]+) to (.+?)(?= and \w+\.|$)", part)
            if len(pairs) == 1:
                key, values = pairs[0]
                listed = re.split(r" or (?!less)|, (?![^\[]*\])", values)
                alternatives += [{key: yaml.safe_load(value.removesuffix(" or less"))} for value in listed]
            else:
                alternatives.append({key: yaml.safe_load(value) for key, value in pairs})
        lines.append(alternatives)
    return lines


def draw_faults(draw: random.Random) -> dict[str, Any]:
    choices: dict[str, list[Any]] = {
        "mesh.tp": [1, 2, 3, 4, 5, 16],
        "mesh.pp": [1, 1, 2, 3, 16],
        "mesh.dp_shard": [1, 1, 2, 5],
        "mesh.data_engine": ["fsdp2", "fsdp2", "flat"],
        "train.global_batch": BATCHES,
        "train.micro_batch": [1, 2, 8],
        "train.warmup_steps": [0, 5, 500],
        "train.decay_steps": [None, None, 7, 300],
        "train.schedule": ["cosine", "wsd"],
        "train.fp8": [None, None, "tensorwise"],
        "train.cuda_graph": [False, False, True],
        "train.activation_checkpoint": ["none", "selective"],
        "train.replay_every": [0, 0, 5],
        "train.on_nonfinite": ["stop", "skip"],
        "train.compile": [False, True],
        "pipeline.schedule": ["1f1b", "gpipe", "interleaved_1f1b", "zero_bubble"],
        "pipeline.stages_per_rank": [1, 1, 2, 3],
        "fsdp.gather": ["collectives", "collectives", "copy_engine"],
        "data.seq_len": [32, 60, 128, 255, 511],
        "plan": ["llama", "llama-fast"],
        "loss": ["vocab_parallel", "linear"],
        "check": [True, False],
    }
    keys = draw.sample(list(choices), 9)
    return {key: draw.choice(choices[key]) for key in keys}


def test_what_is_printed_ends_every_fault(config: Callable[..., RunConfig]) -> None:
    draw, tried, several = random.Random(7), 0, 0
    base = config(device="cpu")
    for _ in range(36):
        faulty = base.with_values(draw_faults(draw))
        text = refused(faulty)
        lines = printed_changes(text)
        if not lines or "error CR" in text:  # a finding of the check, whose fix is not a key of the config
            continue
        first: dict[str, Any] = {}
        for line in lines[:-1]:  # of faults that are printed together, one change each
            first |= line[0]
        several += len(lines) > 1
        for change in lines[-1]:
            left = refused(faulty.with_values({**first, **change}))
            assert left == "", f"{text}\n\n{first} {change}\n\n{left}"
            tried += 1
    assert tried > 40
    assert several > 5


def test_untried_advice_would_be_seen(config: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch) -> None:
    faulty = config(device="cpu").with_values({"mesh.pp": 5, "train.global_batch": 3})
    assert printed_changes(refused(faulty)) == [[{"mesh.pp": 2}]]
    monkeypatch.setattr(preflight, "with_tried_advice", lambda error, *_: error)
    (untried,) = printed_changes(refused(faulty))
    assert untried == [{"train.global_batch": 5}]
    assert "more than the model's 2 layers" in refused(faulty.with_values(untried[0]))


@pytest.mark.parametrize(
    ("faults", "fixes"),
    [
        ({"train.fp8": "tensorwise", "plan": "llama"}, "set plan to llama-fast, or train.fp8 to null"),
        ({"loss": "linear", "plan": "derive"}, "set plan to derive-fast or llama-fast, or loss to null"),
        (
            {"derive.split": ("lm_head",), "loss": "linear"},
            "set plan to derive-fast or derive-overlap, or derive.keep_",
        ),
        ({"fsdp.gather": "copy_engine"}, "set fsdp.gather to collectives"),
        ({"mesh.dp_shard": 2, "mesh.data_engine": "flat", "fsdp.gather": "copy_engine"}, "set fsdp.gather to coll"),
        ({"model.shape": "article", "mesh.tp": 5, "plan": "article"}, "set mesh.tp to 1, 2, 4, 8, 16 or 32"),
    ],
)
def test_a_plan_or_an_engine_is_advised_that_can_run(
    faults: dict[str, Any], fixes: str, config: Callable[..., RunConfig]
) -> None:
    run = config(device="cpu").with_values(faults)
    assert fixes in refused(run)
    if faults.get("plan") != "derive" and "derive.split" not in faults:  # a derivation takes seconds
        for change in printed_changes(refused(run))[0]:
            assert refused(run.with_values(change)) == ""


def test_a_preset_that_replicates_attention_needs_no_heads_that_divide(config: Callable[..., RunConfig]) -> None:
    run = config(device="cpu").with_values({"model.shape": "article", "mesh.tp": 8, "plan": "article"})
    assert refused(run) == ""
    assert "n_heads=12 of article" in refused(run.with_values({"plan": "llama"}))


def test_too_few_gpus_names_the_meshes_that_run(
    config: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    run = config().with_values({"mesh.tp": 8, "device": "auto"})
    assert refused(run).endswith("set mesh.tp to 2 or 1, or device to cpu")  # 3 does not divide 8 heads
    graphed = run.with_values({"train.cuda_graph": True})
    assert refused(graphed).endswith("set mesh.tp to 2 or 1")


def test_a_mesh_for_other_ranks_runs_all_of_the_config(config: Callable[..., RunConfig]) -> None:
    run = config(device="cpu")
    source, plan = build_source(run.model, 0), Plan.preset("llama")
    assert runs_on(source, plan, run, Mesh(tp=4))
    assert not runs_on(source, plan, run, Mesh(tp=3))
    assert runs_on(source, plan, run, Mesh(pp=2))
    assert not runs_on(source, plan, run.with_values({"train.fp8": "tensorwise"}), Mesh(tp=1))
    assert isinstance(refusal(run.with_values({"mesh.pp": 3}), source), ConfigError)


def test_advice_is_one_sentence() -> None:
    changes = [{"mesh.tp": 1}, {"mesh.tp": 2}, {"mesh.tp": 4}, {"plan": "derive"}, {"a.b": None, "c.d": False}]
    assert advice(changes) == "set mesh.tp to 1, 2 or 4, or plan to derive, or a.b to null and c.d to false"
    assert advice([{"train.warmup_steps": AtMost(9)}]) == "set train.warmup_steps to 9 or less"
    assert printed_changes(f"x: {advice(changes)}") == [changes]
    error = ConfigError("wrong", *changes[:2])
    assert str(error) == "wrong: set mesh.tp to 1 or 2"


def test_a_model_without_a_trained_parameter_is_refused_before_the_ranks_start(
    config: Callable[..., RunConfig],
) -> None:
    """As PEFT leaves one that it has merged its adapters into."""
    run = config()
    source = build_source(run.model, 0)
    next(source.model.requires_grad_(False).parameters()).requires_grad_(True)
    check_with_model(run, source)
    source.model.requires_grad_(False)
    with pytest.raises(ConfigError, match=r"every parameter of .* is frozen: call requires_grad_\(True\)"):
        check_with_model(run, source)
    stage: Any = SimpleNamespace(parameters=source.model.parameters)
    with pytest.raises(ConfigError, match=r"of a pipeline stage is frozen: set mesh\.pp to fewer stages"):
        build_step(stage, run, cast(DeviceMesh, None), ())

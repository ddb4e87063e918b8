"""Where a model is cut, and what is refused before any process starts."""

from __future__ import annotations

import random
from itertools import combinations
from typing import Any

import pytest
import torch

from colrow.config import RunConfig, parse_config
from colrow.errors import ConfigError
from colrow.models.llama import Llama
from colrow.models.shapes import SHAPES
from colrow.parallel.pipeline_split import check_pipeline, first_layers, fit_micro_batch, layer_costs, split_layers


def dearest(costs: list[float], cut: tuple[int, ...]) -> float:
    return max(sum(costs[a:b]) for a, b in zip((0, *cut), (*cut, len(costs)), strict=True))


def test_the_dearest_stage_is_as_cheap_as_any_cut_makes_it() -> None:
    draw = random.Random(0)
    for _ in range(100):
        layers = draw.randint(1, 9)
        stages = draw.randint(1, layers)
        costs = [draw.random() for _ in range(layers)]
        cut = split_layers(costs, stages)
        assert len(cut) == stages - 1
        best = min(dearest(costs, other) for other in combinations(range(1, layers), stages - 1))
        assert dearest(costs, cut) == pytest.approx(best, rel=1e-6)


@pytest.mark.parametrize(
    ("costs", "stages", "cut"),
    [
        ([1.0] * 10, 4, (2, 4, 7)),  # 2 2 3 3: even, and few in front
        ([1.0, 1.0, 1.0, 5.0], 2, (3,)),
        ([1.0] * 4, 1, ()),
    ],
)
def test_cuts_are_even_and_lighter_in_front(costs: list[float], stages: int, cut: tuple[int, ...]) -> None:
    assert split_layers(costs, stages) == cut


def test_embedding_and_head_count() -> None:
    costs = layer_costs(SHAPES["llama3-8b"], 8192, 1)
    assert costs[0] > costs[1]
    assert costs[-1] > 2 * costs[1]  # a head of 128,256 classes is worth more than two layers
    (first,) = split_layers(costs, 2)
    assert first == 17


def config(**changes: Any) -> RunConfig:
    tree: dict[str, Any] = {
        "run": {"dir": "runs/x"},
        "model": {"shape": "laptop"},
        "data": {"corpus": "stdlib", "seq_len": 64},
        "mesh": {"pp": 2, "dp_shard": 2},
        "train": {"steps": 1, "global_batch": 16, "micro_batch": 2, "lr": 1e-3},
        "device": "cpu",
    }
    for section, values in changes.items():
        tree[section] = {**tree.get(section, {}), **values}
    return parse_config(tree)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"mesh": {"pp": 8, "dp_shard": 1}}, ["8 pipeline stages", "4 layers", "mesh.pp to 4, 3 or 2"]),
        (
            {"mesh": {"pp": 4}, "pipeline": {"schedule": "interleaved_1f1b", "stages_per_rank": 2}},
            ["mesh.pp=4 × stages_per_rank=2 makes 8", "mesh.pp to 2"],
        ),
        (
            {"mesh": {"pp": 8}, "train": {"global_batch": 32}},
            ["more than the model's 4 layers"],
        ),
        (
            {"mesh": {"pp": 4}, "train": {"global_batch": 8}},
            ["at least 4 micro-batches", "makes 2", "train.global_batch to 16", "pipeline.schedule to gpipe"],
        ),
        (
            {"train": {"global_batch": 20}, "pipeline": {"schedule": "interleaved_1f1b", "stages_per_rank": 2}},
            ["interleaved_1f1b", "makes 5", "train.global_batch to 16 or 24"],
        ),
        (
            {"train": {"global_batch": 18}},
            ["global_batch=18 is not divisible by 4 (train.micro_batch=2 × 2 data-parallel ranks)", "16 or 20"],
        ),
        ({"pipeline": {"split": [1, 2]}}, ["makes 3 stages", "needs 2", "give 1 first layers"]),
        ({"pipeline": {"split": [4]}}, ["does not rise within 1..3", "[2]"]),
        ({"pipeline": {"stages_per_rank": 2}}, ["1f1b runs one stage on each rank", "interleaved_1f1b"]),
        ({"pipeline": {"schedule": "interleaved_1f1b"}}, ["pipeline.stages_per_rank to 2"]),
        (
            {"pipeline": {"schedule": "zero_bubble"}, "train": {"activation_checkpoint": "selective"}},
            ["activation_checkpoint to full or none"],
        ),
        ({"pipeline": {"schedule": "zero_bubble"}, "train": {"compile": True}}, ["train.compile to false"]),
    ],
)
def test_what_cannot_run_is_refused_with_its_fix(changes: dict[str, Any], says: list[str]) -> None:
    with pytest.raises(ConfigError) as error:
        check_pipeline(config(**changes), layers=4)
    for text in says:
        assert text in str(error.value)


def refusal(run: RunConfig, layers: int) -> ConfigError | None:
    try:
        check_pipeline(fit_micro_batch(run), layers)
    except ConfigError as error:
        return error
    return None


def test_every_fix_that_is_printed_works() -> None:
    """Of pipelines at random, with one wrong number or more."""
    draw, tried = random.Random(0), 0
    for _ in range(400):
        layers = draw.choice([1, 2, 4, 5, 8])
        tree: dict[str, Any] = {
            "mesh": {"pp": draw.choice([2, 3, 4, 6]), "dp_shard": draw.choice([1, 2])},
            "train": {"global_batch": draw.choice([8, 12, 24]), "micro_batch": draw.choice([1, 2, 8])},
            "pipeline": {
                "schedule": draw.choice(["1f1b", "gpipe", "interleaved_1f1b", "zero_bubble"]),
                "stages_per_rank": draw.choice([1, 1, 2, 3]),
            },
        }
        run = config(**tree)
        error = refusal(run, layers)
        if error is None or "global_batch" in str(error):
            continue
        assert error.changes
        for change in error.changes:
            assert refusal(run.with_values(change), layers) is None, str(error)
            tried += 1
    assert tried > 150


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"mesh": {"pp": 1}, "pipeline": {"split": [9, 9]}},  # no pipeline, nothing to check
        {"pipeline": {"schedule": "gpipe"}, "train": {"global_batch": 4}},
        {"pipeline": {"schedule": "interleaved_1f1b", "stages_per_rank": 2, "split": [1, 2, 3]}},
        {"pipeline": {"schedule": "zero_bubble"}, "train": {"activation_checkpoint": "full"}},
    ],
)
def test_what_can_run_passes(changes: dict[str, Any]) -> None:
    check_pipeline(config(**changes), layers=4)


def test_the_split_is_balanced_unless_given() -> None:
    with torch.device("meta"):
        model = Llama(SHAPES["laptop"])
    assert first_layers(config(), model) == (1,)
    given = {"stages_per_rank": 2, "schedule": "interleaved_1f1b", "split": [1, 2, 3]}
    assert first_layers(config(pipeline=given), model) == (1, 2, 3)
    assert first_layers(config(mesh={"pp": 1}), model) == ()


@pytest.mark.parametrize(
    ("changes", "taken"),
    [
        ({}, 2),
        ({"train": {"micro_batch": 16}}, 4),  # pp 2 needs two micro-batches of a share of 8
        ({"train": {"micro_batch": 3}}, 2),
        ({"train": {"micro_batch": 16}, "mesh": {"pp": 1}}, 8),
        ({"train": {"micro_batch": 16}, "pipeline": {"schedule": "gpipe"}}, 8),
        ({"train": {"micro_batch": 7, "global_batch": 14}, "mesh": {"pp": 1}}, 7),
    ],
)
def test_the_largest_micro_batch_that_fits_is_taken(changes: dict[str, Any], taken: int) -> None:
    fitted = fit_micro_batch(config(**changes))
    assert fitted.train.micro_batch == taken
    check_pipeline(fitted, layers=4)
    assert fitted.micro_batches * taken * fitted.mesh.dp == fitted.train.global_batch


@pytest.mark.parametrize(
    ("changes", "values"),
    [
        ({"train": {"global_batch": 15}}, [14, 16]),
        ({"train": {"global_batch": 2}, "mesh": {"pp": 4, "dp_shard": 1}}, [4]),
        ({"train": {"global_batch": 3}, "mesh": {"pp": 1, "dp_shard": 8}}, [8]),
    ],
)
def test_a_global_batch_that_nothing_fits_names_those_that_something_fits(
    changes: dict[str, Any], values: list[int]
) -> None:
    with pytest.raises(ConfigError, match=f"set train.global_batch to {' or '.join(map(str, values))}$"):
        fit_micro_batch(config(**changes))
    for value in values:
        fit_micro_batch(config(**{**changes, "train": {"global_batch": value}}))

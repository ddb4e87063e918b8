"""What torch's own tests of tensor parallelism show, for plans: `docs/torchs-tests.md` says which shows which.

Four ranks, started once; fp64. Every value, every gradient and every collective is compared.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from helpers.harness import Ranks
from helpers.torchs_examples import (
    BACKWARD,
    FORWARD,
    TRAINED,
    fsdp_transformer_case,
    loss_case,
    mlp_case,
    norms_case,
    stack_case,
    state_case,
    tied_case,
    transformer_case,
)
from helpers.torchs_styles import (
    NORMS,
    ONE,
    PLANS,
    RANKS,
    arranged_case,
    dropout_case,
    frozen_case,
    inputs_case,
    lengths_case,
    norm_case,
    one_case,
    plan_case,
    refused_case,
    source_case,
)

pytestmark = pytest.mark.distributed
TOLERANCE = 1e-11


def exhaustive(*values: Any) -> Any:
    return pytest.param(*values, marks=pytest.mark.exhaustive)


@pytest.mark.parametrize("name", ONE)
def test_a_style_computes_and_sends_what_it_should(ranks: Ranks, name: str) -> None:
    *case, forward, backward = ONE[name]
    for errors, *seen in ranks(RANKS).run(one_case, *case):
        assert max(errors.values()) < TOLERANCE, errors
        assert seen == [forward, backward]


@pytest.mark.parametrize("style", ["colwise", "rowwise"])
def test_frozen_parameters_stay_frozen(ranks: Ranks, style: str) -> None:
    assert ranks(RANKS).run(frozen_case, style) == [(False, True)] * RANKS


def test_activations_are_gathered_and_sliced(ranks: Ranks) -> None:
    ranks(RANKS).run(arranged_case)


def test_inputs_by_position_and_by_name(ranks: Ranks) -> None:
    for found in ranks(RANKS).run(inputs_case):
        assert {name: count for name, (_, count) in found.items()} == {
            "two by position": 1,
            "one by name": 1,
            "all by name": 2,
            "a DTensor by name": 2,
        }
        assert max(error for error, _ in found.values()) < TOLERANCE, found


def test_layouts_of_another_number_are_refused(ranks: Ranks) -> None:
    ranks(RANKS).run(lengths_case)


@pytest.mark.parametrize("name", NORMS)
def test_a_norm_of_token_shards_sends_nothing(ranks: Ranks, name: str) -> None:
    for errors, count, by_tokens, placements in ranks(RANKS).run(norm_case, name, 1):
        assert max(errors.values()) < TOLERANCE, errors
        assert (count, by_tokens) == (0, True)
        assert placements <= {"P(sum)"}


def test_a_norm_brings_shards_of_another_dim_to_the_tokens(ranks: Ranks) -> None:
    for errors, count, by_tokens, _ in ranks(RANKS).run(norm_case, "a norm of one's own", 0):
        assert max(errors.values()) < TOLERANCE, errors
        assert (count, by_tokens) == (2, True)


def test_dropout_of_token_shards_sends_nothing(ranks: Ranks) -> None:
    assert ranks(RANKS).run(dropout_case) == [(0, True, True)] * RANKS


@pytest.mark.parametrize("name", PLANS)
def test_a_plan_trains_as_one_process(ranks: Ranks, name: str) -> None:
    for errors in ranks(RANKS).run(plan_case, name):
        assert max(errors.values()) < TOLERANCE, errors


def test_a_sum_that_is_left_out_is_seen(ranks: Ranks) -> None:
    for errors in ranks(RANKS).run(plan_case, "not summed"):
        assert errors["output"] > 1e-3


def test_weights_come_from_a_rank_or_stay(ranks: Ranks) -> None:
    found = ranks(RANKS).run(source_case)
    assert [(sent, count) for sent, _, count in found] == [(True, 0)] * RANKS
    assert found[1][1] == 0.0
    assert found[0][1] > 0.0


def test_what_is_refused_on_purpose(ranks: Ranks) -> None:
    ranks(RANKS).run(refused_case)


# -- examples


@pytest.mark.parametrize(("sequence", "expected"), [(False, {"all-reduce": 1}), (True, {"gather": 2, "scatter": 1})])
def test_an_mlp_trains_and_infers(ranks: Ranks, sequence: bool, expected: dict[str, int]) -> None:
    for errors, seen in ranks(RANKS).run(mlp_case, sequence):
        assert max(errors.values()) < TOLERANCE, errors
        assert seen == expected


@pytest.mark.parametrize(
    ("sequence", "local_attention"),
    [(True, True), exhaustive(False, False), exhaustive(True, False), exhaustive(False, True)],
)
def test_a_transformer_trains(ranks: Ranks, sequence: bool, local_attention: bool) -> None:
    if not local_attention and torch.__version__.startswith("2.11."):
        pytest.skip("DTensor in torch 2.11 has no product of batches of heads that are sharded")
    for errors, seen in ranks(RANKS).run(transformer_case, sequence, local_attention, True, None):
        assert max(errors.values()) < TOLERANCE, errors
        assert seen[:2] == [FORWARD[sequence], BACKWARD[sequence]]
        assert sum(seen[2].values()) == sequence  # all partial gradients in one


@pytest.mark.parametrize("name", [name if name == "one of each" else exhaustive(name) for name in TRAINED])
def test_a_transformer_trains_in_part(ranks: Ranks, name: str) -> None:
    trained, backward = TRAINED[name]
    for errors, seen in ranks(RANKS).run(transformer_case, True, True, False, trained):
        assert max(errors.values()) < TOLERANCE, errors
        assert seen[1] == backward
        assert sum(seen[2].values()) == any("norm" in parameter for parameter in trained)


def test_weights_are_tied_after_the_split(ranks: Ranks) -> None:
    for errors in ranks(RANKS).run(tied_case):
        assert max(errors.values()) < TOLERANCE, errors


def test_the_loss_on_logits_sharded_by_class(ranks: Ranks) -> None:
    for errors, counts in ranks(RANKS).run(loss_case):
        assert max(errors.values()) < TOLERANCE, errors
        assert counts == [({"all-reduce": 3}, 0)] * 6


@pytest.mark.parametrize(
    ("width", "reshard", "checkpoint"), [(6, True, True), exhaustive(16, False, False), exhaustive(6, True, False)]
)
def test_a_stack_under_fsdp(ranks: Ranks, width: int, reshard: bool, checkpoint: bool) -> None:
    for errors in ranks(RANKS).run(stack_case, width, reshard, checkpoint):
        assert max(errors.values()) < TOLERANCE, errors


@pytest.mark.exhaustive
def test_a_transformer_under_fsdp(ranks: Ranks) -> None:
    for errors, placed in ranks(RANKS).run(fsdp_transformer_case):
        assert max(errors.values()) < TOLERANCE, errors
        assert placed


def test_gradients_are_clipped_by_their_norm(ranks: Ranks) -> None:
    for errors in ranks(RANKS).run(norms_case):
        assert max(errors.values()) < TOLERANCE, errors


def test_torchs_state_dicts_of_shards_and_of_full_tensors(ranks: Ranks) -> None:
    ranks(RANKS).run(state_case)

"""Sampling depends on the seed alone, and pads as sequence parallelism needs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from colrow.errors import ConfigError
from colrow.mesh import Mesh
from colrow.models.generate import generate
from colrow.parallel.parallelize import parallelize
from colrow.plans.plan import Plan
from helpers.harness import Ranks
from helpers.llamas import tiny

PROMPT = torch.tensor([[5, 9, 11]])


def loud(**options: Any) -> torch.nn.Module:
    """A model whose tokens differ in likelihood: with weights of 0.02 all of them are nearly equal."""
    model = tiny(**options)
    with torch.no_grad():
        for param in model.parameters():
            param.mul_(5.0 if param.ndim > 1 else 1.0)
    return model


def test_one_seed_gives_one_text() -> None:
    model = loud()
    first = generate(model, PROMPT, 20, seed=1)
    torch.manual_seed(5)
    assert torch.equal(first, generate(model, PROMPT, 20, seed=1))
    assert not torch.equal(first, generate(model, PROMPT, 20, seed=2))
    assert torch.equal(first[:, :3], PROMPT)
    assert first.shape == (1, 23)


def test_temperature_zero_takes_the_likeliest() -> None:
    model = loud()
    ids = generate(model, PROMPT, 5, temperature=0.0)
    with torch.no_grad():
        assert torch.equal(model(ids)[:, 2:-1].argmax(-1), ids[:, 3:])
    assert torch.equal(generate(model, PROMPT, 5, temperature=3.0, top_k=1), ids)


def test_top_k_draws_from_the_k_likeliest_in_their_proportion() -> None:
    logits = torch.tensor([0.0, 1.0, 2.0, 3.0]).log()
    ids = torch.zeros(4000, 1, dtype=torch.long)
    drawn = generate(lambda x: logits.expand(*x.shape, 4), ids, 1, temperature=1.0, top_k=2)[:, 1]
    shares = drawn.bincount(minlength=4) / len(drawn)
    torch.testing.assert_close(shares, torch.tensor([0.0, 0.0, 0.4, 0.6]), atol=0.03, rtol=0.0)


def test_padding_changes_nothing() -> None:
    model, seen = loud(), []

    def logits_of(ids: Tensor) -> Tensor:
        seen.append(ids.shape[1])
        return model(ids)

    assert torch.equal(generate(model, PROMPT, 6), generate(logits_of, PROMPT, 6, pad_multiple=4))
    assert seen == [4, 4, 8, 8, 8, 8]


def test_only_the_last_ids_are_seen_beyond_the_context() -> None:
    seen = []

    def logits_of(ids: Tensor) -> Tensor:
        seen.append(ids.tolist()[0])
        return torch.nn.functional.one_hot(ids + 1, 64).float()

    ids = generate(logits_of, torch.tensor([[0, 1, 2]]), 4, temperature=0.0, context=5, pad_multiple=2)
    assert ids.tolist() == [[0, 1, 2, 3, 4, 5, 6]]
    assert seen == [[0, 1, 2, 0], [0, 1, 2, 3], [1, 2, 3, 4], [2, 3, 4, 5]]


def test_a_row_that_ends_stays_ended() -> None:
    def count(ids: Tensor) -> Tensor:
        return torch.nn.functional.one_hot((ids + 1) % 8, 8).float()

    ids = generate(count, torch.tensor([[0], [4]]), 10, temperature=0.0, eos_id=6)
    assert ids.tolist() == [[0, 1, 2, 3, 4, 5, 6], [4, 5, 6, 6, 6, 6, 6]]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"ids": torch.zeros(1, 0, dtype=torch.long)}, "hold no prompt"),
        ({"ids": torch.zeros(3, dtype=torch.long)}, "hold no prompt"),
        ({"tokens": -1}, "tokens=-1 is negative"),
        ({"temperature": -0.5}, "temperature=-0.5 is out of range"),
        ({"temperature": float("nan")}, "temperature=nan is out of range"),
        ({"top_k": 0}, "top_k=0 leaves no token"),
        ({"context": 3, "pad_multiple": 4}, "context=3 is less"),
    ],
)
def test_arguments_out_of_range_are_refused(change: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        generate(tiny(), **({"ids": PROMPT, "tokens": 1} | change))


def test_logits_that_are_not_finite_are_refused() -> None:
    for bad, temperature in ((torch.nan, 0.0), (torch.inf, 0.8)):
        with pytest.raises(ConfigError, match="logits are not finite"):
            generate(lambda ids, bad=bad: torch.full((*ids.shape, 5), bad), torch.ones(1, 1, dtype=torch.long), 1,
                     temperature=temperature)  # fmt: skip
    with pytest.raises(ConfigError, match="too small for these logits"):
        generate(lambda ids: torch.eye(5)[ids], torch.ones(1, 1, dtype=torch.long), 1, temperature=1e-45)


def sharded_case(device: str, loss: Any) -> list[list[int]]:
    model = loud().to(device)
    parallelize(model, Plan.preset("llama", loss), Mesh(tp=2).build(device, dist.get_world_size()))
    return generate(model, PROMPT.to(device), 12, seed=1, pad_multiple=2).tolist()


@pytest.mark.distributed
@pytest.mark.parametrize("loss", ["vocab_parallel", "replicated"])
def test_the_ranks_of_a_sharded_model_draw_what_one_process_draws(ranks: Ranks, loss: str) -> None:
    assert ranks(2).run(sharded_case, loss) == [generate(loud(), PROMPT, 12, seed=1).tolist()] * 2

"""Random numbers of shards: put together they are those of the unsharded tensor."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from colrow.sharding.draws import Draw, draw_shard, draws, draws_by_element, may_draw, memory_order, take_shard
from colrow.sharding.local_layout import PARTIAL, REPLICATED, UNKNOWN, repeating, sharded
from colrow.torch_compat import TorchDispatchMode

RANKS = 2


class OnRank(TorchDispatchMode):
    """Dropout as rank `rank` draws it; `seen` has the operators that drew."""

    def __init__(self, draw: Draw, rank: int) -> None:
        super().__init__()
        self.draw, self.rank = draw, rank
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not draws(func, args, kwargs):
            return func(*args, **kwargs)
        self.seen.append(str(func.name()))
        return draw_shard(func, args, kwargs, self.draw, self.rank, RANKS)


GENERATOR = torch.Generator()
OPERATORS: dict[str, Callable[[Tensor], Tensor]] = {
    "dropout": lambda x: F.dropout(x, 0.3),
    "dropout in place": lambda x: F.dropout(x.clone(), 0.3, inplace=True),
    "alpha dropout": lambda x: F.alpha_dropout(x, 0.3, True),
    "native dropout": lambda x: torch.native_dropout(x, 0.3, True)[0],
    "a mask of one's own": lambda x: x * torch.empty_like(x).bernoulli_(0.7),
    "noise": lambda x: x + torch.randn_like(x),
    "a mask by threshold": lambda x: x * (torch.rand_like(x) > 0.3),
    "noise by size": lambda x: x + torch.randn(x.shape, dtype=x.dtype),
    "a mask by size": lambda x: x * (torch.rand(*x.shape, generator=GENERATOR.manual_seed(3)) > 0.3),
    "jitter": lambda x: x * torch.empty_like(x).uniform_(0.9, 1.1),
    "noise in place": lambda x: x + torch.empty_like(x).normal_(0.0, 0.1),
    "gumbel noise": lambda x: x - torch.empty_like(x).exponential_().log(),
    "integers": lambda x: x * torch.randint_like(x, 1, 9),
    "integers by size": lambda x: x * torch.randint(1, 9, x.shape, generator=GENERATOR.manual_seed(3)),
    "integers in place": lambda x: x * torch.empty_like(x).random_(1, 9),
    "normal by size": lambda x: x + torch.normal(0.0, 0.1, x.shape, dtype=x.dtype),
    "log-normal noise": lambda x: x * torch.empty_like(x).log_normal_(),
    "a mask by its number": lambda x: x * torch.bernoulli(x, 0.7),
    "a mask by its values": lambda x: x * torch.bernoulli(x / 2.5),
    "normal by means": lambda x: torch.normal(x, 0.1),
    "normal by deviations": lambda x: torch.normal(1.0, x),
}
LAYOUTS = {
    "features": Draw(sharded(2)),
    "sequence": Draw(sharded(1)),
    "two segments": Draw(sharded(2, (8, 4))),
    "flattened tokens": Draw(sharded(1), flattened=True),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", OPERATORS)
def test_shards_of_a_mask_are_those_of_the_unsharded_one(name: str, layout: str) -> None:
    x, draw, operator = torch.rand(3, 4, 12, dtype=torch.float64) + 1, LAYOUTS[layout], OPERATORS[name]
    torch.manual_seed(5)
    want = operator(x)
    after = torch.get_rng_state()
    for rank in range(RANKS):
        torch.manual_seed(5)
        with OnRank(draw, rank) as mode:
            got = operator(take_shard(x, draw, rank, RANKS).clone())
        assert len(mode.seen) == 1
        torch.testing.assert_close(got, take_shard(want, draw, rank, RANKS), rtol=1e-14, atol=0)
        assert torch.equal(torch.get_rng_state(), after)
    torch.manual_seed(5)  # the negative control: a rank that draws for its shard alone
    assert not torch.allclose(operator(take_shard(x, draw, 1, RANKS).clone()), take_shard(want, draw, 1, RANKS))


def test_a_transposed_shard_draws_as_the_transposed_tensor() -> None:
    x = torch.ones(6, 8, 3).transpose(0, 1)
    torch.manual_seed(5)
    want = F.dropout(x, 0.5)
    torch.manual_seed(5)
    with OnRank(Draw(sharded(1)), 1):
        assert torch.equal(F.dropout(x[:, 3:], 0.5), want[:, 3:])


OF_TENSORS = [name for name in OPERATORS if "size" not in name]
IN_ORDER_OF_DIMS = {"a mask by its number", "a mask by its values", "normal by means", "normal by deviations"}
"""In whatever order they lie in memory."""


@pytest.mark.parametrize("draw", [Draw(sharded(1)), Draw(REPLICATED)], ids=["shard", "replicated"])
@pytest.mark.parametrize("name", OF_TENSORS)
def test_a_contiguous_tensor_draws_as_the_permuted_one_of_one_process(name: str, draw: Draw) -> None:
    x = (torch.rand(6, 4, 3, dtype=torch.float64) + 1).transpose(0, 1)
    part = take_shard(x, draw, 1, RANKS) if draw.layout == sharded(1) else x
    torch.manual_seed(5)
    want = OPERATORS[name](x)
    want = take_shard(want, draw, 1, RANKS) if draw.layout == sharded(1) else want
    order = memory_order(x.shape, x.stride())
    assert order == (1, 0, 2)
    got = []
    for given in (draw._replace(order=order), draw):
        torch.manual_seed(5)
        with OnRank(given, 1):
            got.append(OPERATORS[name](part.contiguous()))
    torch.testing.assert_close(got[0], want, rtol=1e-14, atol=0)
    assert torch.allclose(got[1], want) == (name in IN_ORDER_OF_DIMS), "without the order"


def test_the_order_in_memory() -> None:
    assert memory_order((2, 3, 4), (12, 4, 1)) is None
    assert memory_order((2, 1, 4), (4, 9, 1)) is None
    assert memory_order((2, 1, 4), (1, 9, 2)) == (2, 0, 1)


def test_attention_without_dropout_draws_nothing() -> None:
    q = torch.rand(1, 2, 4, 8)
    with OnRank(Draw(sharded(1)), 0) as mode:
        F.scaled_dot_product_attention(q, q, q)
        assert mode.seen == []
        F.scaled_dot_product_attention(q, q, q, dropout_p=0.5)
    assert mode.seen == ["aten::bernoulli_.float"]


def test_numbers_that_depend_on_elements_are_not_drawn_by_element() -> None:
    aten = torch.ops.aten
    others = (aten.bernoulli_.Tensor, aten.normal.Tensor_Tensor, aten.multinomial.default, aten.randperm.default)
    others += (aten.poisson.default, aten.rrelu_with_noise.default)
    assert all(may_draw(func) and not draws_by_element(func) for func in others)
    assert not may_draw(aten.mul.Tensor)


def test_what_is_known_of_a_mask() -> None:
    assert Draw(REPLICATED).is_known
    assert Draw(sharded(1)).is_known
    assert not any(Draw(layout).is_known for layout in (UNKNOWN, PARTIAL, repeating(1, (8,), (4,))))

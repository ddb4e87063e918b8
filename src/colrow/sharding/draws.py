"""Which operators draw random numbers, and how a rank draws those of its shard.

[Note: random numbers on shards]
The ranks of a tp group hold equal generators. So what they draw for a tensor that each of them holds is one draw, as in
one process; for different shards of a tensor it would be the same numbers on each. Instead every rank draws for
the unsharded tensor, by the same operator, and takes what falls on its shard: the ranks' numbers are then shards of one
process's, bit for bit, and the generators stay equal. The price is the unsharded tensor's memory for a moment. So is
drawn what takes as many of the generator's numbers for an element whatever the tensor holds: dropout masks, uniform and
normal noise, random integers, masks by a probability for each element. Any other random number on a shard (`poisson`,
`multinomial`) is unproven.
These operators draw in the order of a tensor's memory. On ranks it may be another than in one process: a collective
gives a contiguous tensor for a permuted one. So the numbers are drawn in the order of the unsharded tensor.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor

from colrow.sharding.local_layout import REPLICATED, Kind, Layout
from colrow.sharding.operators import argument_of, operator_name
from colrow.torch_compat import per_rank, tensors_in

_OF_ONE_TENSOR = {
    "bernoulli": ("bernoulli.p", "bernoulli"),
    "bernoulli_": ("bernoulli_.float",),
    "normal": ("normal.float_float", "normal.Tensor_float", "normal.float_Tensor"),
}
"""Of an operator's overloads those that take one tensor at most."""
_BY_VALUES = ("aten::bernoulli", "aten::normal.Tensor_float", "aten::normal.float_Tensor")
"""Overloads whose tensor has the probabilities, means or deviations of its elements."""
NOISE = frozenset(
    ("rand", "rand_like", "randn", "randn_like", "randint", "randint_like", "uniform_", "normal_", "exponential_",
     "random_", "geometric_", "log_normal_", "cauchy_", "normal")
)  # fmt: skip
"""Operators that draw by element and are no dropout."""
_ATTENTION = ("scaled_dot_product", "efficient_attention", "flash_attention", "cudnn_attention")


class Draw(NamedTuple):
    """What one operator draws in a module's own code.

    With `flattened`, [B, T/n, ...] is a shard of the B * T tokens ([Note: flattened tokens]), not of each sequence.
    `order` has the dims of the unsharded tensor as they lie in its memory, outermost first; None: as those of the
    rank's tensor.
    """

    layout: Layout
    flattened: bool = False
    order: tuple[int, ...] | None = None

    @property
    def is_arranged(self) -> bool:
        """Whether a rank does something else than to run the operator."""
        return self.layout != REPLICATED or self.order is not None

    @property
    def is_known(self) -> bool:
        """Whether a rank can tell its part; see [Note: random numbers on shards]."""
        return self.layout == REPLICATED or (
            self.layout.kind is Kind.SHARDED and not self.layout.repeated and not self.layout.complete
        )


def memory_order(shape: Sequence[int], stride: Sequence[int]) -> tuple[int, ...] | None:
    """The dims as they lie in memory, outermost first; None of a contiguous tensor. Dims of one element are last."""
    dims = [d for d, n in enumerate(shape) if n > 1]
    order = sorted(dims, key=lambda d: -stride[d])
    return None if order == dims else tuple(order + [d for d, n in enumerate(shape) if n <= 1])


def draws(func: Any, args: Any, kwargs: Any) -> bool:
    """Whether the ATen operator draws random numbers with these arguments. Attention does where it has dropout; torch
    tags it as random anyway."""
    if not may_draw(func):
        return False
    if _is_attention(func):
        return bool(argument_of(func, "dropout_p", args, kwargs))
    return not (operator_name(func) == "native_dropout" and args[2] is False)


@cache
def may_draw(func: Any) -> bool:
    """Whether the ATen operator draws random numbers with some arguments."""
    tagged = torch.Tag.nondeterministic_seeded in getattr(func, "tags", ())
    return tagged and not operator_name(func).startswith("_fused_sdp_choice")


def draws_by_element(func: Any) -> bool:
    """Whether the operator takes as many random numbers for each element, whatever the elements are, so that a rank can
    draw those of its shard; or is an attention, which may draw a mask."""
    name = operator_name(func)
    if name in _OF_ONE_TENSOR:
        return str(func.name()).removeprefix("aten::") in _OF_ONE_TENSOR[name]
    return name in NOISE | {"native_dropout"} or _is_attention(func)


def draw_shard(func: Any, args: Any, kwargs: Any, draw: Draw, rank: int, ranks: int) -> Any:
    """The result of an operator that draws by element on rank `rank`'s shard, or of a tensor that all ranks have, whose
    memory has another order than the unsharded one's."""
    is_shard = draw.layout.kind is Kind.SHARDED

    def shard(drawn: Tensor) -> Tensor:
        return drawn if not is_shard else per_rank(lambda x, r: take_shard(x, draw, r, ranks).clone(), drawn, rank)

    tensors = tensors_in((args, kwargs))
    if not tensors:
        return shard(_of_unsharded_size(func, args, kwargs, draw.layout.dim, ranks))
    local = tensors[0]
    # Each rank draws all numbers and keeps its part: n times the work, and the numbers of one process.
    by_values = str(func.name()) in _BY_VALUES

    def unsharded(x: Tensor, r: int) -> Tensor:
        complete = _unsharded_like(x, draw, ranks)
        if not by_values:
            return complete
        return _among_others(x, complete, draw, r, ranks) if is_shard else complete.copy_(x)

    complete = per_rank(unsharded, local, rank)
    if operator_name(func) == "native_dropout":
        # dropout of ones: the factors, 0 or 1 / (1 - p), without the unsharded activations
        factors, kept = func(complete.fill_(1.0), *args[1:], **kwargs)
        return local * shard(factors), shard(kept)
    drawn = shard(func(*(complete if arg is local else arg for arg in args), **kwargs))
    return local.copy_(drawn) if operator_name(func).endswith("_") else drawn


def _of_unsharded_size(func: Any, args: Any, kwargs: Any, dim: int, ranks: int) -> Any:
    """What an operator that takes a size draws for the unsharded one."""
    at = [argument.name for argument in func._schema.arguments].index("size")
    size = [n * ranks if d == dim else n for d, n in enumerate(args[at])]
    return func(*args[:at], size, *args[at + 1 :], **kwargs)


def take_shard(complete: Tensor, draw: Draw, rank: int, ranks: int) -> Tensor:
    """Rank `rank`'s shard of a tensor, by the layout's dim and segments, or of the flattened tokens."""
    layout = draw.layout
    if draw.flattened:
        tokens = complete.flatten(0, 1).chunk(ranks)[rank]
        return tokens.view(complete.shape[0], -1, *complete.shape[2:])
    extent = complete.shape[layout.dim]
    # recorded at another extent, perhaps: segments keep their proportions
    sizes = [n * extent // sum(layout.sizes(extent)) for n in layout.sizes(extent)]
    starts = accumulate(sizes[:-1], initial=0)
    pieces = [
        complete.narrow(layout.dim, start + size // ranks * rank, size // ranks)
        for start, size in zip(starts, sizes, strict=True)
    ]
    return torch.cat(pieces, layout.dim) if len(pieces) > 1 else pieces[0]


def _unsharded_like(local: Tensor, draw: Draw, ranks: int) -> Tensor:
    """An unset tensor of the unsharded shape, whose dims lie in memory in the order of the unsharded tensor's."""
    dim = draw.layout.dim if draw.layout.kind is Kind.SHARDED else -1
    shape = [n * ranks if d == dim else n for d, n in enumerate(local.shape)]
    order = draw.order or memory_order(local.shape, local.stride()) or range(local.ndim)
    made = torch.empty([shape[d] for d in order], dtype=local.dtype, device=local.device)
    return made.permute([list(order).index(d) for d in range(local.ndim)])


def _among_others(local: Tensor, complete: Tensor, draw: Draw, rank: int, ranks: int) -> Tensor:
    """`complete` with the rank's elements at their places. What stands for those of the other ranks does not matter: it
    takes as many of the generator's numbers."""
    places = torch.arange(complete.numel(), device=local.device).view(complete.shape)
    return complete.fill_(0.5).put_(take_shard(places, draw, rank, ranks), local)


def _is_attention(func: Any) -> bool:
    return any(part in operator_name(func) for part in _ATTENTION)

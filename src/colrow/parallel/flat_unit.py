"""One unit of the flat data engine: its shards, gathered weights and gradients, each in one piece of memory.

[Note: flat memory]
A unit is what is gathered and reduced as one (see [Note: FSDP2 units]). Each of W data ranks holds c rows of a
parameter p with r elements a row; the last ranks may hold fewer. Three pieces of memory hold ranges of all parameters,
one after the other, so that no collective needs a copy before or after it:

    shard     c r elements of p      in the compute dtype, or 8 bits: what the rank sends to be gathered
    buffer    W c r elements of p    the ranks' shards in order: the parameter, and at its end unused rows
    gradient  c r elements of p      in the parameters' dtype

A gather is one collective of many ranges. The parameters that the model computes with are views of the buffer that
never move. Blocks take turns with two buffers: a block is gathered while its neighbour runs. Where a buffer belongs to
one unit alone, the shard lies in it, at the rank's own rows; and where no shard is kept, it is cast to there for each
gather.

[Note: reduction by exchange]
A gradient stays where autograd put it. Each rank sends every other the rows that this one holds, in the compute dtype
(`flat_exchange`), and sums what it gets in the parameters' dtype, in one pass. The sum of bf16 terms is that of a
reduce-scatter in fp32, with half the bytes; replicas then average the fp32 sums by all-reduce.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Partial

from colrow.ops.execution_record import record
from colrow.ops.float8 import ACTIVATION
from colrow.ops.kernels.slot_sum import add_received, square_terms
from colrow.parallel.data_shards import Unsharded
from colrow.parallel.flat_exchange import GradientExchange, GradientExchanges, Ranges
from colrow.parallel.flat_gather import Gathers
from colrow.sharding.layout import chunk_sizes, local_tensor, waited_local
from colrow.sharding.parameter_state import state_of
from colrow.torch_compat import foreach

_ALIGNMENT = 128  # elements, and bytes: every parameter's range begins where kernels can load vectors

UNUSED, USED, PARTIAL_SUM = 0, 1, 2
"""Whether a micro-batch of the step has used a parameter, and whether its gradient is a partial sum over tp."""


class Buffer:
    """Memory that units use in turn.

    Attributes:
        nbytes: of the largest of these units.
        holds: the unit whose parameters are there, or on their way.
    """

    def __init__(self) -> None:
        self.nbytes = 0
        self.holds: FlatUnit | None = None
        self.work: Any = None
        """The handle of a gather that nothing has waited for."""
        self._memory: Tensor | None = None

    def memory(self, device: torch.device) -> Tensor:
        """The buffer's memory, bytes. Call it when the sizes of all units that use the buffer are known."""
        if self._memory is None:
            self._memory = torch.zeros(self.nbytes, dtype=torch.uint8, device=device)
        return self._memory

    def wait(self) -> None:
        """Until the gather has ended: on a GPU the current stream waits, and not the CPU."""
        if self.work is not None:
            self.work.wait()
            self.work = None


@dataclass(frozen=True)
class DataGroups:
    """The groups of the data axes; None for one rank."""

    shard: dist.ProcessGroup | None
    replicate: dist.ProcessGroup | None

    @property
    def shards(self) -> int:
        return 1 if self.shard is None else self.shard.size()

    @property
    def rank(self) -> int:
        return 0 if self.shard is None else self.shard.rank()


@dataclass(eq=False)
class FlatParameter:
    """A parameter of a unit.

    Attributes:
        param: the optimizer's, a DTensor.
        size: c r of [Note: flat memory], elements.
        at: the element of gradient and exchanged rows at which its range begins.
        byte: that of the shard; in a buffer it is W times that.
        dtype: of what is gathered.
        full: what the model computes with; where 8 bits are gathered a stand-in, which gets the gradient.
        copy: this rank's part of it in the compute dtype, in the shard where that is what is gathered.
        numbers, all_numbers: where 8 bits are gathered, this rank's part in the shard, and the parameter in the buffer.
        use: what the step has done with it so far: UNUSED, USED or PARTIAL_SUM. Larger numbers win between ranks.
    """

    param: nn.Parameter
    unsharded: Unsharded
    shards: int
    at: int
    byte: int
    dtype: torch.dtype
    full: nn.Parameter = field(init=False)
    copy: Tensor = field(init=False)
    numbers: Tensor | None = None
    all_numbers: Tensor | None = None
    use: int = UNUSED
    gradients: dict[int, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        local = self.unsharded.local
        self.size = local.numel()
        if self.shards > 1:
            self.size = chunk_sizes(local[0], self.shards)[0] * local[1:].numel()

    @property
    def nbytes(self) -> int:
        """Bytes that the rank sends."""
        return self.size * self.dtype.itemsize

    def part(self, local: Tensor, rank: int) -> Tensor:
        """The rows of `local`, a contiguous tensor of the unsharded shape, that data rank `rank` holds; flat."""
        return local.view(-1)[rank * self.size : (rank + 1) * self.size]

    def held(self, shards: Tensor) -> Tensor:
        """This rank's rows in one or several shards of the unit, [..., size]; flat."""
        return shards[..., self.at : self.at + self.copy.numel()]


class UnitState(NamedTuple):
    """What decides which kernels the rest of a step runs for a unit.

    Attributes:
        gathered: whether its buffer holds it.
        has_sum: whether gradients are added to those of a micro-batch before.
        uses: by parameter.
    """

    gathered: bool
    has_sum: bool
    uses: tuple[int, ...]


class FlatUnit:
    """The parameters of `owners`, gathered and reduced together.

    Args:
        params: each once, with its shape before the data axes.
        buffer: that holds them gathered.
        own: whether the buffer is this unit's alone.
        keep: keep a shard in the compute dtype; else a unit that shares its buffer casts its parameters at each gather.
        dtype: what the model computes in.
        quantized: those of `params` that are gathered in 8 bits.
    """

    def __init__(
        self,
        params: Sequence[tuple[nn.Parameter, Unsharded]],
        groups: DataGroups,
        buffer: Buffer,
        dtype: torch.dtype,
        *,
        own: bool,
        keep: bool,
        quantized: Collection[nn.Parameter] = (),
    ) -> None:
        self.groups, self.buffer, self._dtype = groups, buffer, dtype
        self.casts = not own and not keep
        self._in_buffer = own or self.casts  # whether the shard lies in the buffer, and no memory of its own is needed
        self.params: list[FlatParameter] = []
        end = self.nbytes = 0
        for param, unsharded in params:
            sent = ACTIVATION if param in quantized else dtype
            self.params.append(each := FlatParameter(param, unsharded, groups.shards, end, self.nbytes, sent))
            end += _aligned(each.size)
            self.nbytes += _aligned(each.nbytes)
        self.size = end
        """Elements of its shard."""
        self.trained = [each for each in self.params if each.param.requires_grad]
        buffer.nbytes = max(buffer.nbytes, groups.shards * self.nbytes)
        self._exchange: tuple[GradientExchange | None, list[Tensor]] | None = None
        """The exchange that was started, and this rank's gradients, which it sends."""
        self._reduction: Any = None
        self._has_sum = self._holds_memory = False
        self.reduced = False
        """Whether its gradients have been sent in the running backward."""

    @torch.no_grad()
    def allocate(self, gathers: Gathers | None, exchanges: GradientExchanges | None) -> None:
        """Make all that the unit computes with, when the sizes of all units of its buffer are known.

        Args:
            gathers, exchanges: None where nothing is sharded.
        """
        self._exchanges = exchanges
        if not self.params:
            return
        device = local_tensor(self.params[0].param).device
        wide = self.params[0].param.dtype
        shards, rank = self.groups.shards, self.groups.rank
        memory = self.buffer.memory(device)
        shard = None if gathers is None else gathers.shard(self.nbytes)
        if shard is None and not self._in_buffer:
            shard = torch.zeros(self.nbytes, dtype=torch.uint8, device=device)
        self._gradient = torch.empty(self.size, dtype=wide, device=device)
        self._sums = [self._gradient_at(each, torch.Size([each.size])) for each in self.trained]
        sent: list[Tensor] = []
        gathered: list[Tensor] = []
        for each in self.params:
            first, held = shards * each.byte, local_tensor(each.param).shape
            source, start = memory, first + rank * each.nbytes
            if shard is not None:  # `shard` may be a part of memory that peers read: offsets count from its storage
                source, start = shard, int(shard.storage_offset()) + each.byte
            own = _at(source, start, held, each.dtype)
            full = _at(memory, first, each.unsharded.local, each.dtype)
            if each.dtype == self._dtype:
                each.copy = own
            else:
                each.copy, each.numbers, each.all_numbers = (
                    torch.empty(held, dtype=self._dtype, device=device),
                    own,
                    full,
                )
                full = stand_in(each.unsharded.local, self._dtype, device)
            each.full = nn.Parameter(each.unsharded.wrapped(full), requires_grad=each.param.requires_grad)
            each.full.__dict__.update(state_of(each.param).attributes)
            sent.append(_at(source, start, torch.Size([each.nbytes]), torch.uint8))
            gathered.append(_at(memory, first, torch.Size([shards * each.nbytes]), torch.uint8))
        self._start_gather = None if gathers is None else gathers.prepare(gathered, sent)
        terms = [square_terms(each.copy.numel()) for each in self.trained]
        self._squares = torch.zeros(sum(terms), dtype=wide, device=device).split(terms)
        # Views of the gradient are made once; between steps its storage has no bytes, and the views stay.
        self._bytes = self._gradient.untyped_storage().nbytes()
        self._gradient.untyped_storage().resize_(0)

    @torch.no_grad()
    def gather(self) -> None:
        """Start to gather, unless the buffer holds the unit."""
        if self.buffer.holds is self or not self.params:
            return
        self.buffer.wait()
        self.buffer.holds = self
        if self.casts:
            # no shard in the compute dtype is kept: cast into this rank's place of the buffer
            foreach("copy_", [each.copy for each in self.params], [local_tensor(each.param) for each in self.params])
        if self._start_gather is not None:
            self.buffer.work = self._start_gather()

    def wait_for_gather(self) -> None:
        if self.params:
            assert self.buffer.holds is self, "another unit has taken the buffer"
            self.buffer.wait()

    @torch.no_grad()
    def send_gradients(self) -> None:
        """Take the gradients of a backward, and start their exchange; a parameter without one counts as zero."""
        self.reduced = True
        if not self.trained:
            return
        grads = [self._taken(each) for each in self.trained]
        if self._exchanges is None:
            self._exchange = None, grads
            return

        def parts(rank: int) -> list[tuple[int, Tensor]]:
            rows = [(each.at, each.part(grad, rank)) for each, grad in zip(self.trained, grads, strict=True)]
            return [(at, part) for at, part in rows if part.numel()]

        own = [(each.at, size) for each in self.trained if (size := each.copy.numel())]
        self._exchange = self._exchanges.start(Ranges(self.size, parts, own), grads[0]), grads
        record("data", "flat shards")

    @torch.no_grad()
    def sum_gradients(self, *, last: bool) -> None:
        """Add what was exchanged to the step's sum; after the `last` micro-batch replicas start to average it."""
        if self._exchange is None:
            return
        (exchange, grads), self._exchange = self._exchange, None
        received = None if exchange is None else exchange.received()
        if not self._has_sum:
            self._allocate_sums()
        if received is None:
            foreach("add_" if self._has_sum else "copy_", self._sums, [grad.view(-1) for grad in grads])
        else:
            for each, grad, squares in zip(self.trained, grads, self._squares, strict=True):
                own, total, scale = each.part(grad, self.groups.rank), each.held(self._gradient), 1 / self.groups.shards
                add_received(
                    own, each.held(received), total, scale, add=self._has_sum, squares=squares if last else None
                )
        if exchange is not None:
            exchange.close()  # after the sum, which reads the received rows
        self._has_sum = True
        if last and self.groups.replicate is not None:
            # gloo has no AVG: `finish_step` divides
            op = dist.ReduceOp.AVG if dist.get_backend(self.groups.replicate) == "nccl" else dist.ReduceOp.SUM
            self._reduction = dist.all_reduce(self._gradient, op, self.groups.replicate, async_op=True)
            record("data", "flat replicas")

    @torch.no_grad()
    def finish_step(self) -> None:
        """Wait for the replicas."""
        if self._reduction is not None:
            self._reduction.wait()
            self._reduction = None
            assert self.groups.replicate is not None
            if dist.get_backend(self.groups.replicate) != "nccl":
                self._gradient /= self.groups.replicate.size()

    def give_gradients(self) -> None:
        """Let each used parameter have its gradient."""
        for each in self.trained:
            each.param.grad = self._gradient_of(each) if each.use != UNUSED else None

    def squares(self) -> dict[nn.Parameter, Tensor]:
        """Terms of the sum of the squares of this rank's gradients, where they are known and final."""
        if not self.trained or self.groups.shard is None or self.groups.replicate is not None:
            return {}
        known = zip(self.trained, self._squares, strict=True)
        return {each.param: terms for each, terms in known if each.use == USED}

    def drop_gradients(self) -> None:
        """Free the memory of the step's gradients."""
        for each in self.trained:
            each.use = UNUSED
            each.param.grad = None
        if self._has_sum and not self._holds_memory:
            self._gradient.untyped_storage().resize_(0)
        self._has_sum = False

    def hold_memory(self) -> None:
        """Keep the memory of gradients between steps, at one address."""
        self._holds_memory = True
        if self.trained:
            self._allocate_sums()

    @property
    def state(self) -> UnitState:
        """What a step has done with the unit so far."""
        return UnitState(self.buffer.holds is self, self._has_sum, tuple(each.use for each in self.params))

    def restore(self, state: UnitState) -> None:
        if state.gathered:
            self.buffer.holds = self
        self._has_sum = state.has_sum
        for each, use in zip(self.params, state.uses, strict=True):
            each.use = use

    def _allocate_sums(self) -> None:
        storage = self._gradient.untyped_storage()
        if not storage.nbytes():  # torch moves a storage also where its size stays
            storage.resize_(self._bytes)

    def _taken(self, each: FlatParameter) -> Tensor:
        """The local gradient of the parameter that the model computed with, contiguous; it is no longer there."""
        grad, each.full.grad = each.full.grad, None
        if grad is None:
            # the other ranks wait for these rows, also of a parameter that this micro-batch did not use
            return torch.zeros(each.unsharded.local, dtype=self._dtype, device=each.copy.device)
        each.use = max(each.use, USED)
        if isinstance(grad, DTensor) and tuple(grad.placements) != each.unsharded.placements:
            (got,), (want,) = grad.placements, each.unsharded.placements
            if got.is_partial() and want.is_replicate():  # `align_gradients` sums it over tp, once a step
                each.use = PARTIAL_SUM
            else:
                grad = grad.redistribute(placements=each.unsharded.placements)
        return waited_local(grad).contiguous()

    def _gradient_of(self, each: FlatParameter) -> Tensor:
        """A view of the summed gradients, in the parameter's placements; the same object in every step."""
        if each.use not in each.gradients:
            param = each.param
            assert isinstance(param, DTensor)
            placements = [*param.placements[:-1], Partial()] if each.use == PARTIAL_SUM else param.placements
            local = self._gradient_at(each, local_tensor(param).shape)
            each.gradients[each.use] = DTensor.from_local(
                local, param.device_mesh, placements, run_check=False, shape=param.shape, stride=param.stride()
            )
        return each.gradients[each.use]

    def _gradient_at(self, each: FlatParameter, shape: torch.Size) -> Tensor:
        return _at(self._gradient, each.at * self._gradient.itemsize, shape, self._gradient.dtype)


def stand_in(shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor without memory of its own: NaN, so that code which computes with it is seen."""
    return torch.full((), torch.nan, dtype=dtype, device=device).expand(shape)


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT


def _at(memory: Tensor, start: int, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """A contiguous tensor of `shape` at byte `start` of the storage of `memory`, with a version counter of its own: a
    gather into it does not count as a change of what autograd has saved."""
    made = torch.empty(0, dtype=dtype, device=memory.device)
    strides = torch.empty(shape, device="meta").stride()
    return made.set_(memory.untyped_storage(), start // dtype.itemsize, shape, strides)

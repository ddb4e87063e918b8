"""The flat data engine: what FSDP2 does on the data axes, with one pass for the update and no copies.

[Note: flat engine]
Parameters are the DTensors that FSDP2 would make (`data_shards`); the model computes with gathered copies in the
compute dtype (`flat_unit`), and the optimizer's kernel writes the next shard of these itself. The order of collectives
is fixed, whatever a rank's micro-batch uses, so ranks cannot differ in it:

    forward    unit k + 1 is gathered while k runs: root, blocks, head
    backward   at block k: block k - 1 is gathered, and the gradients of k + 1 are sent, while k runs

The update writes root and the first two blocks before all others, and their gathers run beside the rest of it
(`start_next`). A block that a rank passes by is gathered and reduced all the same, when a later one is reached.
Carriers alone use streams beside the current one: a gather waits for what was enqueued before it, and so for the last
reader of its buffer; what is exchanged is freed after the current stream has waited for it.

Every micro-batch reduces: what is kept between them is a shard in the parameters' dtype. Replicas average after the
last. At the end of a step the ranks combine one flag a parameter ([Note: used parameters]).

[Note: flat graphs]
A micro-batch, with the collectives of its hooks, and an update can each be a CUDA graph ([Note: state beside a graph]).
Hooks run while capturing, on autograd's thread and its current stream, which is that of the capture; not in replays.

- Streams: NCCL's and the copy engines' streams fork from the current one when a collective starts, by an event, and
  join it at the wait. All that was started is waited for before a graph ends (`join`): the last units' gradients, the
  average over replicas, and in an update the gathers of `start_next`, which run beside the rest of that update still.
- Memory: gathered weights lie in buffers, and shards and sums of gradients in pieces of their own, allocated outside
  of the graph's pool, at one address (`hold_memory`). Gradients and received rows come and go in the pool: each is
  freed on the compute stream when that has joined the stream which read it, so what takes its memory is ordered behind.
- Kernels differ between the first micro-batch (sums are written, not added to; the first units are in their buffers),
  those between, and the last (squares; replicas): each is a graph of its own.
- What enters the first micro-batch is made equal by `accumulate`: an update leaves the first units gathered, but after
  an evaluation, or with loaded weights, they must be gathered anew.
- What waits for the host, or for other ranks' flags, stays outside: barriers, and `_agree`.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from colrow.config import RunConfig
from colrow.config_sections import FsdpSection
from colrow.errors import ConfigError
from colrow.mesh import MeshAxes
from colrow.ops.float8 import PER_TENSOR
from colrow.parallel.data_parallel import head_unit
from colrow.parallel.data_shards import Unsharded, unsharded_of
from colrow.parallel.flat_exchange import CollectiveExchanges, ExchangeCarrier, GradientExchanges, PeerExchanges
from colrow.parallel.flat_gather import CollectiveGathers, GatherCarrier, Gathers, PeerGathers
from colrow.parallel.flat_unit import Buffer, DataGroups, FlatUnit, UnitState
from colrow.parallel.quantized_shards import QuantizedShards, quantized_matmuls
from colrow.parallel.used_parameters import flags_anywhere
from colrow.parallel.weight_copies import WeightCopies
from colrow.sharding.layout import local_tensor
from colrow.torch_compat import tree_leaves

_ADVICE = "set mesh.data_engine: fsdp2"


def check_data_engine(config: RunConfig) -> None:
    """Raise a ConfigError where `mesh.data_engine: flat` is set and cannot work, or carriers of it without it."""
    if not config.mesh.is_flat:
        if config.fsdp.gather_fp8:
            raise ConfigError(
                f"fsdp.gather_fp8 is for mesh.data_engine: flat and a mesh with dp_shard (here {config.mesh})",
                *([{"mesh.data_engine": "flat"}] if config.mesh.dp_shard > 1 else []),
                {"fsdp.gather_fp8": False},
            )
        for key in ("gather", "exchange"):
            if (carrier := getattr(config.fsdp, key)) != "collectives":
                raise ConfigError(
                    f"fsdp.{key}: {carrier} is for mesh.data_engine: flat and a mesh with data axes (here "
                    f"{config.mesh})",
                    *([{"mesh.data_engine": "flat"}] if config.mesh.dp > 1 else []),
                    {f"fsdp.{key}": "collectives"},
                )
        return
    if config.fsdp.gather == "copy_engine" and not config.fsdp.keep_shards:
        raise ConfigError(
            "fsdp.gather: copy_engine reads the shards that ranks keep",
            {"fsdp.keep_shards": True},
            {"fsdp.gather": "collectives"},
        )
    if config.fsdp.gather_fp8:
        _check_gather_fp8(config)
    if config.mesh.pp > 1:
        raise ConfigError(
            f"mesh.data_engine: flat has no pipelines, and mesh.pp is {config.mesh.pp}",
            {"mesh.pp": 1},
            {"mesh.data_engine": "fsdp2"},
        )
    if config.train.replay_every:
        raise ConfigError(
            "train.replay_every sees gradients before their reduction by FSDP2 alone",
            {"train.replay_every": 0},
            {"mesh.data_engine": "fsdp2"},
        )


def _check_gather_fp8(config: RunConfig) -> None:
    off = {"fsdp.gather_fp8": False}
    if config.mesh.dp_shard == 1:
        raise ConfigError("fsdp.gather_fp8 is for a mesh with dp_shard: nothing else gathers weights", off)
    if config.train.fp8 not in PER_TENSOR:
        raise ConfigError(
            f"fsdp.gather_fp8 gathers weights with one scale, and train.fp8 is {config.train.fp8 or 'not set'}",
            {"train.fp8": "tensorwise"},
            off,
        )
    if not config.fsdp.keep_shards:
        raise ConfigError("fsdp.gather_fp8 rounds the shards that ranks keep", {"fsdp.keep_shards": True}, off)


class FlatWeights(WeightCopies):
    """The data axes of a model whose parameters `shard_over_data` has sharded, when they are in their final memory.

    Args:
        mesh: has the axes dp_replicate and dp_shard, and may have tp.
        blocks: modules whose parameters are gathered together, in the order in which they run.
        dtype: what the model computes in.
        options: `fsdp` of a run's config. With `reshard_after_forward` blocks share two buffers, and are gathered once
            more for backward; else all stay gathered for the step. Unless given, where dp_shard > 1.
        graphed: CUDA graphs may run the steps ([Note: flat graphs]).

    Raises:
        ConfigError: blocks share a parameter, parameters differ in dtype, or there are no copy engines for `gather`.
    """

    @torch.no_grad()
    def __init__(
        self,
        model: nn.Module,
        mesh: DeviceMesh,
        blocks: Sequence[nn.Module],
        dtype: torch.dtype,
        options: FsdpSection,
        *,
        graphed: bool = False,
    ) -> None:
        super().__init__(model)
        axes = MeshAxes(mesh)
        groups = [mesh[axis].get_group() if axes.size(axis) > 1 else None for axis in ("dp_shard", "dp_replicate")]
        self._groups, self._data_groups = DataGroups(*groups), axes.data_groups()
        self._blocks = list(blocks)
        self._head = head_unit(model, self._blocks)
        quantizes = options.gather_fp8 and self._groups.shard is not None
        matmuls = quantized_matmuls(model, self._blocks) if quantizes else []
        self._in_8_bits = frozenset(weight for matmul in matmuls for weight in matmul.weights)
        self._units = self._make_units(model, dtype, options.reshard_after_forward is not False, options.keep_shards)
        self._gathers = self._make_gathers(options.gather)
        exchanges = self._make_exchanges(options.exchange, dtype)
        for unit in self._units:
            unit.allocate(self._gathers, exchanges)
        self._quantized: QuantizedShards | None = None
        if quantizes:
            assert self._groups.shard is not None
            self._quantized = QuantizedShards(matmuls, self._units, self._groups.shard)
        params = [each for unit in self._units for each in unit.params]
        self.copies = {each.param: each.copy for unit in self._units if not unit.casts for each in unit.params}
        self._full = {each.param: each.full for each in params}
        self._first = frozenset(each.param for unit in self._early_units for each in unit.params)
        self._graphed = graphed
        self._active = self._training = self._pending = self._started = self._last = False
        self._reached = self._backward = 0  # indices in `_units`: gathered by this forward; whose backward has begun
        self._all_used: dict[tuple[int, ...], Tensor] = {}  # flags of steps that used every parameter
        self._watch(model)

    @contextmanager
    def use_copies(self) -> Iterator[None]:
        kept = self._started and not any(self._is_stale(param) for param in self._first)
        self._started = False
        for unit in self._units:  # the parameters may have changed; every rank gathers again, or none
            if not kept or unit.buffer.holds not in self._early_units:
                unit.buffer.holds = None
        self._active = True
        try:
            with super().use_copies(), self._in_places():
                if self._quantized is not None:
                    self._quantized.quantize([unit for unit in self._units if unit.buffer.holds is not unit])
                self._barrier()
                yield
                self._barrier()
        finally:
            self._active = False

    @contextmanager
    def accumulate(self, micro_batches: int) -> Iterator[None]:
        self._training = True
        try:
            with self.use_copies():
                if self._graphed:
                    self._gather_early()
                yield
                self.join()
        finally:
            self._training = False
        self._agree()
        for unit in self._units:
            unit.give_gradients()

    def begin_micro_batch(self, *, last: bool) -> None:
        self._end_backward()  # of the micro-batch before, which is not the last
        self._last = last

    def join(self) -> None:
        self._end_backward()
        for unit in self._units:
            unit.finish_step()
            unit.buffer.wait()

    def hold_memory(self) -> None:
        for unit in self._units:
            unit.hold_memory()

    def state(self) -> Hashable:
        return self._last, self._started, tuple(unit.state for unit in self._units)

    def restore(self, state: tuple[bool, bool, tuple[UnitState, ...]]) -> None:
        self._last, self._started, units = state
        for unit in self._units:  # all, before the first is restored: blocks share buffers
            unit.buffer.holds = None
        for unit, known in zip(self._units, units, strict=True):
            unit.restore(known)

    def grad_holder(self, param: nn.Parameter) -> nn.Parameter:
        return param

    def squares(self) -> dict[nn.Parameter, Tensor]:
        return {param: terms for unit in self._units for param, terms in unit.squares().items()}

    def first_read(self) -> frozenset[nn.Parameter]:
        return self._first

    def start_next(self) -> None:
        if self._gathers is None:
            return
        self.mark_current(self._first)
        if self._quantized is not None:
            self._quantized.quantize(self._early_units)
        self._gathers.barrier()
        for unit in self._early_units:
            unit.buffer.holds = None
            unit.gather()
        self._started = True

    def _gather_early(self) -> None:
        """Have the first units in their buffers, as an update leaves them."""
        for unit in self._early_units:
            unit.gather()
            unit.wait_for_gather()

    @property
    def _early_units(self) -> list[FlatUnit]:
        """The units that the next forward reads first, each with a buffer of its own."""
        return self._units[:3] if self._groups.shards > 1 else []

    def drop_gradients(self) -> None:
        for unit in self._units:
            unit.drop_gradients()

    def _placed(self) -> Mapping[nn.Parameter, nn.Parameter]:
        return self._full

    def _in_places(self) -> AbstractContextManager[None]:
        return nullcontext() if self._quantized is None else self._quantized.placed()

    def _barrier(self) -> None:
        """Let no rank write a shard that another reads, or read one that another writes."""
        for unit in self._units:
            unit.buffer.wait()
        if self._gathers is not None:
            self._gathers.barrier()

    def _make_gathers(self, carrier: GatherCarrier) -> Gathers | None:
        group = self._groups.shard
        if group is None:
            return None
        if carrier == "collectives":
            return CollectiveGathers(group)
        return PeerGathers(group, self._device, [unit.nbytes for unit in self._units if unit.params])

    def _make_exchanges(self, carrier: ExchangeCarrier, dtype: torch.dtype) -> GradientExchanges | None:
        group = self._groups.shard
        if group is None:
            return None
        if carrier == "collectives":
            return CollectiveExchanges(group)
        return PeerExchanges(group, self._device, max(unit.size for unit in self._units) * dtype.itemsize)

    @property
    def _device(self) -> torch.device:
        return next(local_tensor(each.param).device for unit in self._units for each in unit.params)

    def _make_units(self, model: nn.Module, dtype: torch.dtype, reshard: bool, keep: bool) -> list[FlatUnit]:
        """The units in the order in which they run: root, blocks, head."""
        alone = not reshard or self._groups.shards == 1
        shared = [Buffer(), Buffer()]
        taken: dict[nn.Parameter, None] = {}

        def made(modules: Sequence[nn.Module], buffer: Buffer, own: bool) -> FlatUnit:
            found: dict[nn.Parameter, Unsharded] = {}
            for module in (part for owner in modules for part in owner.modules()):
                for name, param in module._parameters.items():
                    if param is not None and param not in taken:
                        found.setdefault(param, unsharded_of(module, name))
            taken.update(dict.fromkeys(found))
            for param in found:
                if not param.is_floating_point() or param.dtype != next(iter(found)).dtype:
                    raise ConfigError(
                        f"the parameters of {type(modules[0]).__name__} differ in dtype ({param.dtype} and "
                        f"{next(iter(found)).dtype}), and are gathered as one: make them equal, or {_ADVICE}"
                    )
            params, quantized = list(found.items()), self._in_8_bits
            return FlatUnit(params, self._groups, buffer, dtype, own=own, keep=keep, quantized=quantized)

        # Two buffers in turn: a block is gathered into one while its neighbour computes from the other.
        blocks = [made([block], Buffer() if alone else shared[i % 2], alone) for i, block in enumerate(self._blocks)]
        last = [made(self._head, Buffer(), True)] if self._head else []
        return [made([model], Buffer(), True), *blocks, *last]  # the root has what is left

    def _watch(self, model: nn.Module) -> None:
        model.register_forward_pre_hook(self._begin_forward, prepend=True)
        for index, block in enumerate(self._blocks, start=1):
            block.register_forward_pre_hook(partial(self._before_block, index), prepend=True)
            block.register_forward_hook(partial(self._after_block, index))
        for module in self._head:
            module.register_forward_pre_hook(self._before_head, prepend=True)
        model.register_forward_hook(self._end_forward)
        for index, unit in enumerate(self._units):
            for each in unit.trained:
                each.full.register_post_accumulate_grad_hook(partial(self._receive, index))

    def _begin_forward(self, module: nn.Module, args: Any) -> None:
        if not self._active:
            return
        self._reached, self._backward = -1, len(self._blocks) + 1
        self._pending = self._training and torch.is_grad_enabled()
        if self._pending:
            for unit in self._units:
                unit.reduced = False
        self._forward_to(0)

    def _before_block(self, index: int, module: nn.Module, args: Any) -> None:
        if not self._active:
            return
        if index <= self._reached:
            raise ConfigError(
                f"block {index - 1} ({type(module).__name__}) runs twice in a forward, or after a later one, and "
                f"mesh.data_engine: flat gathers each once, in order: {_ADVICE}"
            )
        self._forward_to(index)

    def _before_head(self, module: nn.Module, args: Any) -> None:
        if self._active:
            self._forward_to(len(self._units) - 1)

    def _end_forward(self, module: nn.Module, args: Any, output: Any) -> None:
        if self._active:
            self._forward_to(len(self._units) - 1)

    def _forward_to(self, index: int) -> None:
        """Gather every unit up to this one, in order, and start with the next."""
        for at in range(self._reached + 1, index + 1):
            self._units[at].gather()
            self._units[at].wait_for_gather()
            if at + 1 < len(self._units):
                self._units[at + 1].gather()
        self._reached = max(self._reached, index)

    def _after_block(self, index: int, module: nn.Module, args: Any, output: Any) -> None:
        if self._pending and self._active:
            for leaf in tree_leaves(output):
                if isinstance(leaf, Tensor) and leaf.requires_grad:
                    leaf.register_hook(partial(self._before_backward, index))

    def _before_backward(self, index: int, grad: Tensor) -> None:
        self._backward_to(index)

    def _backward_to(self, index: int) -> None:
        """Begin the backward of every block down to this one, in order."""
        for at in range(self._backward - 1, index - 1, -1):
            self._backward = at
            # The exchange of at + 2 ran while at + 1 computed. It is received before that of at + 1 starts: the copy
            # engine has slots for two, and what was sent is freed here.
            self._sum(at + 2)
            self._units[at].gather()
            self._units[at].wait_for_gather()
            if at > 1:
                self._units[at - 1].gather()
            self._send(at + 1)

    def _end_backward(self) -> None:
        """Reduce what the backward of this micro-batch has left."""
        if not self._pending:
            return
        self._backward_to(1)
        self._sum(2)
        for at in (1, 0):
            self._send(at)
        for at in (1, 0):
            self._sum(at)
        self._pending = False

    def _send(self, at: int) -> None:
        if at < len(self._units):
            self._units[at].send_gradients()

    def _sum(self, at: int) -> None:
        if at < len(self._units):
            self._units[at].sum_gradients(last=self._last)

    def _receive(self, index: int, full: Tensor) -> None:
        """Refuse a gradient that came after its unit was reduced, or before the backward of its block began."""
        if self._units[index].reduced or 0 < index < self._backward:
            where = f"block {index - 1}" if 0 < index <= len(self._blocks) else "a module beside the blocks"
            raise ConfigError(
                f"a gradient of {where} came when those of its unit were reduced already, or not from its output: "
                f"mesh.data_engine: flat knows one order of blocks. Return what the loss needs, or {_ADVICE}"
            )

    def _agree(self) -> None:
        """Let every rank know what any data rank has used."""
        params = [each for unit in self._units for each in unit.trained]
        if not params:
            return
        device = local_tensor(params[0].param).device
        own = tuple(each.use for each in params)
        if own in self._all_used:  # nothing is copied to the device
            flags = self._all_used[own]
        else:
            flags = torch.tensor(own, dtype=torch.int32, device=device)
            if all(own):
                self._all_used[own] = flags
        # the maximum: a rank's PARTIAL_SUM wins over another's USED; `flags` may be used again, so a copy is reduced
        found = flags_anywhere(flags.clone(), self._data_groups, wait=not all(own))
        for each, use in zip(params, found or own, strict=True):
            each.use = use

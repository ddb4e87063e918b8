"""Pipeline parallelism: a runner that takes the place of forward and backward in a training step.

Micro-batches flow through the stages as torch's schedules order them; what crosses a boundary is the hidden states'
local part (a shard of the sequence where the plan shards it, so tp ranks send nothing twice). Gradients are summed over
micro-batches and reduced over the data axes once, after the last.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe, ScheduleInterleaved1F1B
from torch.distributed.pipelining.schedules import ScheduleInterleavedZeroBubble, ScheduleLoopedBFS
from torch.distributed.tensor import DTensor

from colrow.errors import ConfigError, PlanError
from colrow.ops.products import sum_dtype
from colrow.parallel.loss import loss_context, tp_degree
from colrow.parallel.pipeline_stage import Stage, Tie
from colrow.parallel.random_state import MicroBatchSeeds
from colrow.plans.plan import Plan
from colrow.sharding.grad_norm import align_gradients
from colrow.sharding.layout import local_tensor
from colrow.styles.linear_head import PendingTargets, expect_targets

LossFunction = Callable[[Tensor, Tensor], Tensor]
"""Logits [B, T, V] and targets [B, T] to the mean loss over them, a scalar."""

_SCHEDULES: dict[str, Any] = {
    "gpipe": ScheduleGPipe,
    "1f1b": Schedule1F1B,
    "interleaved_1f1b": ScheduleInterleaved1F1B,
    "zero_bubble": ScheduleInterleavedZeroBubble,
}


@dataclass(frozen=True)
class PipelineOptions:
    """Sizes and schedule, which torch's stages have to know before the first batch.

    Attributes:
        schedule: `pipeline.schedule` of a config.
        micro_batches: micro-batches of this data rank in a step.
        micro_batch_size: sequences in one.
        seq_len: tokens in a sequence.
        dtype: of hidden states: the compute dtype.
    """

    schedule: str
    micro_batches: int
    micro_batch_size: int
    seq_len: int
    dtype: torch.dtype


class PipelineRunner:
    """Runs this rank's stages together with the other ranks'.

    Args:
        stages: of `split_stages`, each prepared in place as a model without a pipeline would be: `parallelize` (with
            `absent=stage.absent`), activation checkpointing, compile, `apply_data_parallel`, memory and weights.
        mesh: has the axes pp and tp.
        loss: the mean loss of one micro-batch; not called where the plan's loss is `linear`, which the head computes.
        seeds: started before a stage's forward in training, which draws other numbers than another stage's.

    Raises:
        ConfigError: the schedule cannot run so many micro-batches or stages (`check_pipeline` says so earlier).
    """

    def __init__(
        self,
        stages: list[Stage],
        plan: Plan,
        mesh: DeviceMesh,
        loss: LossFunction,
        options: PipelineOptions,
        seeds: MicroBatchSeeds | None = None,
    ) -> None:
        self.stages, self.plan, self.mesh, self.loss, self.options = stages, plan, mesh, loss, options
        self.group: dist.ProcessGroup = mesh["pp"].get_group()
        self.ties = stages[0].ties
        index = torch.cuda.current_device() if mesh.device_type == "cuda" else None
        self.device = torch.device(mesh.device_type if index is None else f"cuda:{index}")
        self._head_computes_loss = plan.loss == "linear"
        self._train: Any = self._schedule(_SCHEDULES[options.schedule], options.micro_batches, seeds)
        self._evaluate: dict[int, Any] = {}  # schedules by their number of micro-batches
        self._copies_are_equal = False

    def forward_backward(self, ids: Tensor, targets: Tensor) -> Tensor:
        """Add the gradients of the mean loss over all micro-batches, reduced over the data axes, to `.grad`.

        Gradients of parameters that two stages share are summed; clip and step as without a pipeline. Inside a step
        nothing waits for the device.

        Args:
            ids, targets: [micro_batches * micro_batch_size, seq_len], the same on every stage of this data rank.

        Returns:
            The mean loss over this data rank's micro-batches, a scalar on every stage.
        """
        self._check_shape(ids, self.options.micro_batches)
        self._equalize_copies()
        total = self._run(self._train.step, ids, targets, self.options.micro_batches)
        self._sum_tied_gradients()
        return total

    @torch.no_grad()
    def evaluate(self, ids: Tensor, targets: Tensor) -> Tensor:
        """The mean loss of the micro-batches in `ids` and `targets` ([n * micro_batch_size, seq_len]), forward alone;
        a scalar on every stage. Targets of -100 add nothing, and count in the number that is divided by."""
        count = ids.shape[0] // self.options.micro_batch_size
        self._check_shape(ids, count)
        self._equalize_copies()
        if count not in self._evaluate:
            # Not the training schedule's stages: their receive buffers require gradients.
            schedule_cls = ScheduleGPipe if len(self.stages) == 1 else ScheduleLoopedBFS
            self._evaluate[count] = self._schedule(schedule_cls, count)
        return self._run(self._evaluate[count].eval, ids, targets, count, any_ignored=True)

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The parameters of this rank's stages, under the names of the model that was split."""
        for stage in self.stages:
            yield from stage.module.named_parameters()

    def parameters(self) -> Iterator[nn.Parameter]:
        for _, param in self.named_parameters():
            yield param

    def counted_parameters(self) -> Iterator[nn.Parameter]:
        """Without copies of another stage's parameters: what the gradient norm sums over."""
        for stage in self.stages:
            for name, param in stage.module.named_parameters():
                if name not in stage.copies:
                    yield param

    def copy_tied_weights(self) -> None:
        """Give copies of another stage's parameters its value; the first step or evaluation does so by itself."""
        for tie, param, peer in self._ties_of_rank():  # in one order on all ranks: a send waits for its receive
            local = local_tensor(param.detach())
            if self._holds(tie.original_stage):
                dist.send(local.contiguous(), group=self.group, group_dst=peer)
            else:
                value = torch.empty_like(local, memory_format=torch.contiguous_format)
                dist.recv(value, group=self.group, group_src=peer)
                local.copy_(value)

    def _equalize_copies(self) -> None:
        # Not in __init__: weights may be loaded after the runner is built. Later, equal gradients keep copies equal.
        if not self._copies_are_equal:
            self.copy_tied_weights()
            self._copies_are_equal = True

    def _run(
        self, step: Callable[..., Any], ids: Tensor, targets: Tensor, count: int, *, any_ignored: bool = False
    ) -> Tensor:
        """Let `step` run the schedule over `count` micro-batches. Returns the mean loss, on every stage."""
        inputs = (ids.contiguous(),) if self.stages[0].first else ()
        losses: list[Tensor] = []
        outputs = {"target": targets, "losses": losses} if self.stages[-1].last else {}
        if self._head_computes_loss and outputs:
            # each micro-batch's sum over the tokens of all of them: the losses add up to the mean
            pending = [PendingTargets(chunk, targets.numel(), -100) for chunk in targets.chunk(count)]
            expect_targets(self.stages[-1].module, pending)
        with loss_context(self.plan, self.mesh):
            step(*inputs, **outputs, return_outputs=False)  # else the last stage joins all micro-batches' logits
        total = torch.zeros((), device=self.device, dtype=sum_dtype(self.options.dtype))
        for loss, chunk in zip(losses, targets.chunk(count), strict=False):  # no losses where the last stage is not
            value = loss.detach()
            value = value.full_tensor() if isinstance(value, DTensor) else value
            if any_ignored and not self._head_computes_loss:
                counted = (chunk != -100).double().mean()
                value = torch.where(counted > 0, value * counted, 0.0)  # a mean over no target is NaN
            total += value
        # zero but on the last stage: the sum gives every stage the loss
        dist.all_reduce(total, group=self.group)
        return total

    def _sum_tied_gradients(self) -> None:
        """Give both stages that share a parameter the sum of its gradients: see [Note: ties over stages]."""
        for _, param, peer in self._ties_of_rank():
            if not param.requires_grad:
                continue
            assert param.grad is not None
            # a full table from the embedding, a shard from the head: only alike can be summed
            align_gradients([param])
            mine = local_tensor(param.grad)
            theirs = torch.empty_like(mine, memory_format=torch.contiguous_format)
            exchange = [
                dist.P2POp(dist.isend, mine.contiguous(), group=self.group, group_peer=peer),
                dist.P2POp(dist.irecv, theirs, group=self.group, group_peer=peer),
            ]
            for work in dist.batch_isend_irecv(exchange):  # as one: both stages send first, and neither may wait
                work.wait()
            mine.add_(theirs)  # a + b is b + a: both copies get the same bits, so they never drift apart

    def _ties_of_rank(self) -> Iterator[tuple[Tie, nn.Parameter, int]]:
        """Each shared parameter that a stage of this rank holds, and the pipeline rank of the other stage."""
        pp = self.group.size()
        for tie in self.ties:
            for stage in self.stages:
                if stage.index == tie.original_stage:
                    yield tie, dict(stage.module.named_parameters())[tie.original], tie.copy_stage % pp
                elif stage.index == tie.copy_stage:
                    yield tie, dict(stage.module.named_parameters())[tie.copy], tie.original_stage % pp

    def _holds(self, index: int) -> bool:
        return any(stage.index == index for stage in self.stages)

    def _schedule(self, schedule_cls: Any, micro_batches: int, seeds: MicroBatchSeeds | None = None) -> Any:
        """torch's schedule of this rank's stages. Raises ConfigError where it cannot run them."""
        stages = [self._static_stage(stage, seeds) for stage in self.stages]
        single = schedule_cls in (ScheduleGPipe, Schedule1F1B)
        if single and len(stages) > 1:
            raise ConfigError(
                f"pipeline.schedule={self.options.schedule} runs one stage on each rank, and there are {len(stages)}: "
                "use schedule interleaved_1f1b"
            )

        def loss(output: Tensor, targets: Tensor) -> Tensor:
            """This micro-batch's term in the mean over all of them."""
            return output if self._head_computes_loss else self.loss(output, targets) / micro_batches

        try:
            # scale_grads: torch would divide by the micro-batches once more, after `loss` has
            return schedule_cls(stages[0] if single else stages, micro_batches, loss_fn=loss, scale_grads=False)
        except ValueError as error:
            raise ConfigError(f"pipeline.schedule={self.options.schedule}: {error}") from error

    def _static_stage(self, stage: Stage, seeds: MicroBatchSeeds | None) -> PipelineStage:
        """torch's stage, given what crosses its ends: ids [B, T], hidden states [B, T / tp, D], logits or loss."""
        config: Any = stage.module.config
        batch_size, seq_len, dtype = self.options.micro_batch_size, self.options.seq_len, self.options.dtype
        shards = tp_degree(self.mesh) if self.plan.sequence_parallel() else 1
        hidden = _meta((batch_size, seq_len // shards, config.hidden_size), dtype)
        logits = _meta((batch_size, seq_len, config.vocab_size), dtype)
        last = _meta((), sum_dtype(dtype)) if self._head_computes_loss else logits
        return StaticShapeStage(
            stage,
            seq_len,
            self.device,
            self.group,
            receives=_meta((batch_size, seq_len), torch.int64) if stage.first else hidden,
            sends=last if stage.last else hidden,
            seeds=seeds,
        )

    def _check_shape(self, ids: Tensor, count: int) -> None:
        batch_size, seq_len = self.options.micro_batch_size, self.options.seq_len
        want = (count * batch_size, seq_len)
        if tuple(ids.shape) != want or not count:
            raise ConfigError(
                f"the pipeline was built for batches of {count or 1} × {batch_size} sequences of {seq_len} "
                f"tokens, and one of shape {tuple(ids.shape)} came: give it {want} or build another"
            )


class StaticShapeStage(PipelineStage):
    """torch's stage with the shapes of its input and output given, so that it runs no trial forward to find them."""

    def __init__(
        self,
        stage: Stage,
        seq_len: int,
        device: torch.device,
        group: dist.ProcessGroup,
        *,
        receives: Tensor,
        sends: Tensor,
        seeds: MicroBatchSeeds | None = None,
    ) -> None:
        super().__init__(
            stage.module, stage.index, stage.count, device, input_args=receives, output_args=sends, group=group
        )
        self._seq_len, self._sends, self._seeds = seq_len, sends, seeds

    def forward_maybe_with_nosync(self, *args: Any, **kwargs: Any) -> Any:
        # Not as an argument of the schedule's step: zero-bubble backward in torch 2.11 treats each one as a tensor.
        return self.submod(*args, seq_len=self._seq_len, **kwargs)

    def forward_one_chunk(
        self,
        fwd_chunk_id: int,
        args: tuple[Any, ...],
        kwargs: dict[str, Any] | None = None,
        save_forward_output: bool = True,
    ) -> Any:
        if self._seeds:
            self._seeds.start(fwd_chunk_id, self.stage_index)
        output = super().forward_one_chunk(fwd_chunk_id, args, kwargs, save_forward_output)
        if self.is_last:
            if not self.has_backward:
                # torch would keep every micro-batch's logits until the schedule ends, and no backward reads them
                self.fwd_cache[fwd_chunk_id] = ((), [])
        elif isinstance(output, DTensor) or output.shape != self._sends.shape:
            raise PlanError(
                f"pipeline stage {self.stage_index} hands on {type(output).__name__} {tuple(output.shape)}, and the "
                f"next stage waits for a local tensor {tuple(self._sends.shape)}: give the last module of each layer "
                "use_local_output: true, and the norms style sequence where the sequence is sharded"
            )
        return output


def _meta(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta", requires_grad=dtype.is_floating_point)

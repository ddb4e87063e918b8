"""Pipeline parallelism: a runner that takes the place of forward and backward in a training step.

Micro-batches flow through the stages as torch's schedules order them; what crosses a boundary is the hidden states'
local part (a shard of the sequence where the plan shards it, so tp ranks send nothing twice). Gradients are summed over
micro-batches and reduced over the data axes once, after the last.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe, ScheduleInterleaved1F1B
from torch.distributed.pipelining.schedules import ScheduleInterleavedZeroBubble, ScheduleLoopedBFS
from torch.distributed.tensor import DTensor

from colrow.config import PipelineSection
from colrow.errors import ConfigError, PlanError
from colrow.parallel.loss import loss_context, tp_degree
from colrow.parallel.pipeline_split import layer_costs, split_layers
from colrow.parallel.pipeline_stage import Stage, Tie, cut_stages
from colrow.plans.plan import Plan
from colrow.sharding.grad_norm import align_gradients
from colrow.sharding.layout import local_tensor
from colrow.styles.linear_head import PendingTargets, expect_targets

Loss = Callable[[Tensor, Tensor], Tensor]
"""Logits [B, T, V] and targets [B, T] to the mean loss over them, a scalar."""

_SCHEDULES: dict[str, Any] = {
    "gpipe": ScheduleGPipe,
    "1f1b": Schedule1F1B,
    "interleaved_1f1b": ScheduleInterleaved1F1B,
    "zero_bubble": ScheduleInterleavedZeroBubble,
}


def build_pipeline(
    model: nn.Module,
    plan: Plan,
    mesh: DeviceMesh,
    loss: Loss,
    section: PipelineSection,
    prepare: Callable[[Stage], None],
    *,
    micro_batches: int,
    micro_batch: int,
    seq_len: int,
    dtype: torch.dtype,
) -> PipelineRunner:
    """Cut `model` into stages, make this rank's ready with `prepare`, and return what runs them.

    Args:
        model: the whole single-device model, on the meta device; it stays as it is.
        mesh: has the axes pp and tp.
        loss: the mean loss of one micro-batch; not called where the plan's loss is `linear`, which the head computes.
        prepare: does to `stage.module`, in place, what would be done to a whole model: `parallelize` (with
            `absent=stage.absent`), activation checkpointing, compile, `apply_data_parallel`, memory and weights.
        micro_batches: micro-batches of this data rank in a step.
        micro_batch: sequences in one.
        seq_len: tokens in a sequence.
        dtype: of hidden states: the compute dtype.

    Raises:
        ConfigError: the schedule cannot run so many micro-batches or stages (`check_pipeline` says so earlier).
    """
    count = mesh["pp"].size() * section.stages_per_rank
    config: Any = model.config
    cut = section.split or split_layers(layer_costs(config, seq_len, micro_batch), count)
    stages = cut_stages(model, mesh, cut)
    for stage in stages:
        prepare(stage)
    return PipelineRunner(
        stages,
        plan,
        mesh,
        loss,
        schedule=section.schedule,
        micro_batches=micro_batches,
        micro_batch=micro_batch,
        seq_len=seq_len,
        dtype=dtype,
    )


class PipelineRunner:
    """This rank's prepared stages and their schedule; the arguments are `build_pipeline`'s."""

    def __init__(
        self,
        stages: list[Stage],
        plan: Plan,
        mesh: DeviceMesh,
        loss: Loss,
        *,
        schedule: str,
        micro_batches: int,
        micro_batch: int,
        seq_len: int,
        dtype: torch.dtype,
    ) -> None:
        self.stages, self.plan, self.mesh, self.loss = stages, plan, mesh, loss
        self.schedule, self.micro_batches = schedule, micro_batches
        self.micro_batch, self.seq_len, self.dtype = micro_batch, seq_len, dtype
        self.group: dist.ProcessGroup = mesh["pp"].get_group()
        self.ties = stages[0].ties
        here = torch.cuda.current_device() if mesh.device_type == "cuda" else None
        self.device = torch.device(mesh.device_type if here is None else f"cuda:{here}")
        self._head_computes_loss = plan.loss == "linear"
        self._train: Any = self._schedule(_SCHEDULES[schedule], micro_batches)
        self._evaluate: dict[int, Any] = {}
        self._tied = False

    def forward_backward(self, ids: Tensor, targets: Tensor) -> Tensor:
        """Add the gradients of the mean loss over all micro-batches, reduced over the data axes, to `.grad`.

        Gradients of parameters that two stages share are summed; clip and step as without a pipeline. Inside a step
        nothing waits for the device.

        Args:
            ids, targets: [micro_batches * micro_batch, seq_len], the same on every stage of this data rank.

        Returns:
            The mean loss over this data rank's micro-batches, a scalar on every stage.
        """
        self._check_shape(ids, self.micro_batches)
        self._tie_once()
        total = self._run(self._train.step, ids, targets, self.micro_batches)
        self._sum_tied_gradients()
        return total

    @torch.no_grad()
    def evaluate(self, ids: Tensor, targets: Tensor) -> Tensor:
        """The mean loss of the micro-batches in `ids` and `targets` ([n * micro_batch, seq_len]), forward alone; a
        scalar on every stage."""
        count = ids.shape[0] // self.micro_batch
        self._check_shape(ids, count)
        self._tie_once()
        if count not in self._evaluate:
            # Stages of their own: buffers of a training schedule want gradients.
            kind = ScheduleGPipe if len(self.stages) == 1 else ScheduleLoopedBFS
            self._evaluate[count] = self._schedule(kind, count)
        return self._run(self._evaluate[count].eval, ids, targets, count)

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The parameters of this rank's stages, under the whole model's names."""
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
        """Give copies of another stage's parameters its value. The runner's first use does so by itself."""
        for tie, param, peer in self._tied_here():
            local = local_tensor(param.detach())
            if self._holds(tie.original_stage):
                dist.send(local.contiguous(), group=self.group, group_dst=peer)
            else:
                value = torch.empty_like(local, memory_format=torch.contiguous_format)
                dist.recv(value, group=self.group, group_src=peer)
                local.copy_(value)

    def _tie_once(self) -> None:
        if not self._tied:
            self.copy_tied_weights()
            self._tied = True

    def _run(self, step: Callable[..., Any], ids: Tensor, targets: Tensor, count: int) -> Tensor:
        inputs = (ids.contiguous(),) if self.stages[0].first else ()
        losses: list[Tensor] = []
        outputs = {"target": targets, "losses": losses} if self.stages[-1].last else {}
        if self._head_computes_loss and outputs:
            parts = [PendingTargets(part, targets.numel(), -100) for part in targets.chunk(count)]
            expect_targets(self.stages[-1].module, parts)
        with loss_context(self.plan, self.mesh):
            step(*inputs, **outputs, return_outputs=False)
        total = torch.zeros((), device=self.device, dtype=_loss_dtype(self.dtype))
        for loss in losses:
            value = loss.detach()
            total += value.full_tensor() if isinstance(value, DTensor) else value
        dist.all_reduce(total, group=self.group)
        return total

    def _sum_tied_gradients(self) -> None:
        for _, param, peer in self._tied_here():
            if not param.requires_grad:
                continue
            assert param.grad is not None
            align_gradients([param])  # the embedding's gradient comes whole, the head's as a shard
            mine = local_tensor(param.grad)
            theirs = torch.empty_like(mine, memory_format=torch.contiguous_format)
            exchange = [
                dist.P2POp(dist.isend, mine.contiguous(), group=self.group, group_peer=peer),
                dist.P2POp(dist.irecv, theirs, group=self.group, group_peer=peer),
            ]
            for work in dist.batch_isend_irecv(exchange):
                work.wait()
            mine.add_(theirs)  # a + b is b + a: both copies get the same bits, so they never drift apart

    def _tied_here(self) -> Iterator[tuple[Tie, nn.Parameter, int]]:
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

    def _schedule(self, kind: Any, micro_batches: int) -> Any:
        stages = [self._stage(stage) for stage in self.stages]
        single = kind in (ScheduleGPipe, Schedule1F1B)
        if single and len(stages) > 1:
            raise ConfigError(
                f"pipeline.schedule={self.schedule} runs one stage on each rank, and there are {len(stages)}: "
                "use schedule interleaved_1f1b"
            )

        def loss(output: Tensor, targets: Tensor) -> Tensor:
            """This micro-batch's part of the mean over all of them."""
            return output if self._head_computes_loss else self.loss(output, targets) / micro_batches

        try:
            return kind(stages[0] if single else stages, micro_batches, loss_fn=loss, scale_grads=False)
        except ValueError as error:
            raise ConfigError(f"pipeline.schedule={self.schedule}: {error}") from error

    def _stage(self, stage: Stage) -> PipelineStage:
        config: Any = stage.module.config
        shards = tp_degree(self.mesh) if self.plan.sequence_parallel() else 1
        hidden = (self.micro_batch, self.seq_len // shards, config.hidden_size)
        logits = (self.micro_batch, self.seq_len, config.vocab_size)
        last = _meta((), _loss_dtype(self.dtype)) if self._head_computes_loss else _meta(logits, self.dtype)
        return _LlamaStage(
            stage,
            self.seq_len,
            self.device,
            self.group,
            receives=_meta((self.micro_batch, self.seq_len), torch.int64) if stage.first else _meta(hidden, self.dtype),
            sends=last if stage.last else _meta(hidden, self.dtype),
        )

    def _check_shape(self, ids: Tensor, count: int) -> None:
        want = (count * self.micro_batch, self.seq_len)
        if tuple(ids.shape) != want or not count:
            raise ConfigError(
                f"the pipeline was built for batches of {count or 1} × {self.micro_batch} sequences of {self.seq_len} "
                f"tokens, and one of shape {tuple(ids.shape)} came: give it {want} or build another"
            )


class _LlamaStage(PipelineStage):
    """torch's stage, told every shape beforehand so that no trial run of the model is needed."""

    def __init__(
        self,
        stage: Stage,
        seq_len: int,
        device: torch.device,
        group: dist.ProcessGroup,
        *,
        receives: Tensor,
        sends: Tensor,
    ) -> None:
        super().__init__(
            stage.module, stage.index, stage.count, device, input_args=receives, output_args=sends, group=group
        )
        self._seq_len, self._sends = seq_len, sends

    def forward_maybe_with_nosync(self, *args: Any, **kwargs: Any) -> Any:
        # Not as an argument of the schedule's step: a zero-bubble backward of torch 2.11 takes each for a tensor.
        return self.submod(*args, seq_len=self._seq_len, **kwargs)

    def forward_one_chunk(
        self,
        fwd_chunk_id: int,
        args: tuple[Any, ...],
        kwargs: dict[str, Any] | None = None,
        save_forward_output: bool = True,
    ) -> Any:
        output = super().forward_one_chunk(fwd_chunk_id, args, kwargs, save_forward_output)
        if self.is_last:
            if not self.has_backward:
                self.fwd_cache[fwd_chunk_id] = ((), [])  # the logits of an evaluation go with their micro-batch
        elif isinstance(output, DTensor) or output.shape != self._sends.shape:
            raise PlanError(
                f"pipeline stage {self.stage_index} hands on {type(output).__name__} {tuple(output.shape)}, and the "
                f"next stage waits for a local tensor {tuple(self._sends.shape)}: give the last module of each layer "
                "use_local_output: true, and the norms style sequence where the sequence is sharded"
            )
        return output


def _meta(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta", requires_grad=dtype.is_floating_point)


def _loss_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32

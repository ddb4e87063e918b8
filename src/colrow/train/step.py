"""One optimizer step: micro-batches forward and backward, one gradient, its norm, the update.

[Note: normalisation] The loss of a step is the mean over all tokens of the global batch. A rank divides the sum over
its own tokens by their number, and data parallelism averages the gradients over ranks; since every rank has equally
many tokens, that is the global mean. A rank returns its own mean: averaged over the
data-parallel ranks it is the loss. An auxiliary loss that the model returns is one of a micro-batch (a router's balance
is no sum over tokens): each counts by its share of the tokens, so that they are averaged.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule

from colrow.config_sections import TrainSection
from colrow.data.loader import Batch
from colrow.errors import ConfigError
from colrow.parallel.data_parallel import set_last_micro_batch
from colrow.parallel.loss import loss_and_output, loss_context, model_loss
from colrow.parallel.outputs import main_tensor, output_tensors, untrained_losses
from colrow.parallel.random_state import MicroBatchSeeds
from colrow.parallel.weight_copies import WeightCopies
from colrow.plans.plan import Plan
from colrow.sharding.grad_norm import align_gradients, clip_scale, grad_norm
from colrow.sharding.layout import full_tensor
from colrow.styles.fast.peak_history import PeakHistory
from colrow.train.attention import preferred_attention
from colrow.train.buffers import BufferSnapshot, WrittenBuffers
from colrow.train.corruption import CorruptionCheck
from colrow.train.cuda_graph import GraphChoice, GraphedFunction
from colrow.train.optimizer import AdamW, set_learning_rate
from colrow.train.schedule import learning_rate

if TYPE_CHECKING:
    from colrow.parallel.pipeline import PipelineRunner


class ForwardBackward(Protocol):
    """Runs micro-batches and leaves the gradient of their mean loss, averaged over data-parallel ranks, in `.grad`.

    Attributes:
        weights: the copies that the model computes with, where there are some ([Note: precision]).
    """

    weights: WeightCopies | None

    @property
    def auxiliary(self) -> dict[str, Tensor]:
        """The auxiliary losses in the last step's loss, unweighted, by name: the rank's means, which nothing has waited
        for."""

    @property
    def untrained(self) -> tuple[str, ...]:
        """Losses that the model has returned and that are not in the loss."""

    def parameters(self) -> Iterable[nn.Parameter]:
        """This rank's parameters."""

    def counted_parameters(self) -> Iterable[nn.Parameter]:
        """The parameters that the gradient norm counts: without copies of another pipeline stage's."""

    def __call__(self, batches: Sequence[Batch]) -> Tensor:
        """This rank's micro-batches -> their mean loss, a scalar; the same on all stages and tp ranks."""

    def evaluate(self, batches: Sequence[Batch]) -> Tensor:
        """Their mean loss, without gradients. Targets of -100 add nothing, and count in the divisor."""


def mean_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean over tokens of -log p(target), in fp32 (fp64 for fp64 logits). Logits [B, T, V], targets [B, T]."""
    logits = logits if logits.dtype == torch.float64 else logits.float()
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


class SingleStageModel:
    """Forward and backward of a model without a pipeline.

    Gradients of all micro-batches but the last stay on their rank; the last one reduces the sum.

    Args:
        auxiliary: weights of losses that the model returns beside its logits, by name.
    """

    def __init__(
        self,
        model: nn.Module,
        plan: Plan,
        mesh: DeviceMesh,
        device: torch.device,
        weights: WeightCopies | None = None,
        seeds: MicroBatchSeeds | None = None,
        auxiliary: Mapping[str, float] | None = None,
    ) -> None:
        self.weights, self._seeds = weights, seeds
        self._auxiliary_weights = dict(auxiliary or {})
        self.auxiliary: dict[str, Tensor] = {}
        self.untrained: tuple[str, ...] = ()
        self._model, self._plan, self._mesh, self._device = model, plan, mesh, device
        self._run_micro_batch: Callable[[Tensor, Tensor, int], Tensor] = self._forward_backward
        self._graph: GraphedFunction | None = None

    def parameters(self) -> Iterable[nn.Parameter]:
        return self._model.parameters()

    counted_parameters = parameters

    def enable_cuda_graph(self, eager_calls: int) -> GraphedFunction:
        """Replay a CUDA graph for each micro-batch, after the first `eager_calls` of them."""
        self._graph = GraphedFunction(self._forward_backward, eager_calls, self._model, self.weights)
        self._run_micro_batch = self._graph
        return self._graph

    def __call__(self, batches: Sequence[Batch]) -> Tensor:
        tokens = sum(targets.numel() for _, targets in batches)
        total = torch.zeros((), device=self._device)
        # `accumulate` exits after the last backward: it moves gradients to where the optimizer finds them
        with self.weights.accumulate(len(batches)) if self.weights else nullcontext():
            for i, (ids, targets) in enumerate(batches):
                set_last_micro_batch(self._model, i == len(batches) - 1)
                if self.weights:
                    self.weights.begin_micro_batch(last=i == len(batches) - 1)
                if self._seeds:
                    self._seeds.start(i)
                total = total + self._run_micro_batch(ids, targets, tokens)  # fp64 where the model is
        if not self._auxiliary_weights:
            return total
        self.auxiliary = dict(zip(self._auxiliary_weights, total[1:].unbind(), strict=True))
        return total[0]

    def _forward_backward(self, ids: Tensor, targets: Tensor, tokens: int) -> Tensor:
        """One micro-batch: its sum of losses over `tokens`, those of all micro-batches, so that the sums add up; with
        auxiliary losses [1 + their number], likewise."""
        with loss_context(self._plan, self._mesh), preferred_attention(self._device):
            loss, output = loss_and_output(self._model, self._plan, self._mesh, ids, targets, num_valid=tokens)
            self.untrained = untrained_losses(output, self._auxiliary_weights)
            if not self._auxiliary_weights:
                del output  # logits that backward does not need: 1 GiB at 16k tokens, V = 128k, tp 4
                loss.backward()
                return full_tensor(loss.detach())
            share, loss = targets.numel() / tokens, full_tensor(loss)
            auxiliary = [share * full_tensor(value).to(loss.dtype) for value in self._auxiliary_losses(output)]
            del output
            for weight, value in zip(self._auxiliary_weights.values(), auxiliary, strict=True):
                loss = loss + weight * value
            loss.backward()
        return torch.stack([loss, *auxiliary]).detach()

    def _auxiliary_losses(self, output: Any) -> list[Tensor]:
        """The weighted losses of an output. Raises ConfigError where it lacks one."""
        scalars = {name: tensor for name, tensor in output_tensors(output) if tensor.dim() == 0}
        for name in self._auxiliary_weights:
            if name not in scalars:
                raise ConfigError(
                    f"train.auxiliary_losses has a weight for {name}, and {type(self._model).__name__} returns no such "
                    f"scalar: it returns {', '.join(scalars) or 'none'}"
                )
        return [scalars[name] for name in self._auxiliary_weights]

    @torch.no_grad()
    def evaluate(self, batches: Sequence[Batch]) -> Tensor:
        # made here, and added to in place: what is made within must not outlive it
        total = torch.zeros((), dtype=torch.float64, device=self._device)
        with self._use_copies(), self._graph.lent_memory() if self._graph else nullcontext():
            for ids, targets in batches:
                with loss_context(self._plan, self._mesh), preferred_attention(self._device):
                    total += full_tensor(model_loss(self._model, self._plan, self._mesh, ids, targets, num_valid=1))
        reshard(self._model)
        return total / max(sum(targets.numel() for _, targets in batches), 1)

    @torch.no_grad()
    def logits(self, ids: Tensor) -> Tensor:
        """[B, T] -> [B, T, V]."""
        with self._use_copies():
            return main_tensor(self._model(ids))

    def _use_copies(self) -> AbstractContextManager[None]:
        return self.weights.use_copies() if self.weights else nullcontext()


class PipelinedModel:
    """Forward and backward of this rank's pipeline stages. Every stage knows the loss."""

    weights: WeightCopies | None = None
    untrained: tuple[str, ...] = ()

    def __init__(self, runner: PipelineRunner, device: torch.device) -> None:
        self._runner, self._device = runner, device
        self.auxiliary: dict[str, Tensor] = {}

    def parameters(self) -> Iterable[nn.Parameter]:
        return self._runner.parameters()

    def counted_parameters(self) -> Iterable[nn.Parameter]:
        return self._runner.counted_parameters()

    def __call__(self, batches: Sequence[Batch]) -> Tensor:
        with preferred_attention(self._device):
            return self._runner.forward_backward(*_joined(batches))

    def evaluate(self, batches: Sequence[Batch]) -> Tensor:
        with preferred_attention(self._device):
            loss = self._runner.evaluate(*_joined(batches))
        for stage in self._runner.stages:
            reshard(stage.module)
        return loss


@dataclass
class Step:
    """Everything that an optimizer step needs.

    Args:
        params: this rank's parameters as the optimizer holds them.
        counted: those whose gradients count in the norm: without copies of another pipeline stage's.
        norm_groups: groups of the axes over which ranks hold different shards of the gradient.
        seeds: those of `forward_backward`; they get the number of the step.
        modules: those that `forward_backward` runs; their buffers are put back where a step is skipped, and
            the peaks of `fp8: delayed` are theirs.
        buffers: theirs, which data ranks may write differently ([Note: written buffers]).
        corruption: with `train.replay_every`.
        graph_choice: with `train.cuda_graph: auto`.
    """

    forward_backward: ForwardBackward
    params: list[nn.Parameter]
    counted: list[nn.Parameter]
    optimizer: AdamW
    norm_groups: list[dist.ProcessGroup]
    section: TrainSection
    seeds: MicroBatchSeeds | None = None
    modules: Sequence[nn.Module] = ()
    buffers: WrittenBuffers | None = None
    corruption: CorruptionCheck | None = None
    graph_choice: GraphChoice | None = None
    _run_update: Callable[[], Tensor] = field(init=False)
    _peaks: PeakHistory = field(init=False)

    def __post_init__(self) -> None:
        self._run_update = self._update
        self._peaks = PeakHistory(self.modules)

    def enable_cuda_graph(self, eager_calls: int) -> GraphedFunction:
        """Replay one CUDA graph for the update, after the first `eager_calls` steps."""
        weights = self.forward_backward.weights
        self._run_update = graph = GraphedFunction(self._update, eager_calls, weights=weights)
        return graph

    def __call__(self, step: int, batches: Sequence[Batch]) -> tuple[Tensor, Tensor]:
        """Run step `step` (from 0) on this rank's micro-batches. Collective.

        With `on_nonfinite: skip`, a step whose loss or norm is not finite on some rank changes nothing.

        Returns:
            This rank's mean loss, and the norm of all ranks' gradient before clipping: scalars on the device, which
            nothing has waited for (`skip` has).
        """
        with self.graph_choice.around() if self.graph_choice else nullcontext(), self._peaks.step():
            return self._run(step, batches)

    def _run(self, step: int, batches: Sequence[Batch]) -> tuple[Tensor, Tensor]:
        """The step itself: see `__call__`."""
        skips = self.section.on_nonfinite == "skip"
        buffers = BufferSnapshot(self.modules if skips else ())  # before a forward writes NaN into them
        if self.seeds:
            self.seeds.step = step
        if self.buffers:
            self.buffers.begin()
        if self.corruption:
            loss = self.corruption.forward_backward(step, batches)
            self.corruption.before_update(step)
        else:
            loss = self.forward_backward(batches)
        set_learning_rate(self.optimizer, learning_rate(step, self.section))
        norm = self._update_if_finite(loss, buffers) if skips else self._run_update()
        if self.corruption:
            self.corruption.after_update()
        if self.buffers:  # last of the collectives: on every rank after those of the update
            self.buffers.combine()
        self.optimizer.zero_grad(set_to_none=True)
        if weights := self.forward_backward.weights:
            weights.drop_gradients()
        return loss, norm

    def _update(self) -> Tensor:
        """From gradients to new parameters; returns the norm."""
        holders, norm = self._gradients()
        self._apply(holders, norm)
        return norm

    def _update_if_finite(self, loss: Tensor, buffers: BufferSnapshot) -> Tensor:
        """`_update` where loss and norm are finite on every rank; else buffers and all else stay as before the step."""
        holders, norm = self._gradients()
        if finite_everywhere(loss, norm):
            self._apply(holders, norm)
        else:
            buffers.restore()
        return norm

    @torch.no_grad()
    def _gradients(self) -> tuple[dict[nn.Parameter, nn.Parameter], Tensor]:
        """What holds each parameter's gradient, aligned with the parameter, and the norm."""
        weights = self.forward_backward.weights
        holders = {param: weights.grad_holder(param) if weights else param for param in self.params}
        align_gradients(holders.values())
        counted, squares = [holders[param] for param in self.counted], weights.squares() if weights else None
        return holders, grad_norm(counted, self.norm_groups, squares)

    @torch.no_grad()
    def _apply(self, holders: Mapping[nn.Parameter, nn.Parameter], norm: Tensor) -> None:
        weights = self.forward_backward.weights
        scale = None if self.section.grad_clip is None else clip_scale(norm, self.section.grad_clip)
        gradients = {param: holder.grad for param, holder in holders.items() if holder.grad is not None}
        if weights:
            self.optimizer.update(gradients, scale, weights.copies, weights.first_read(), weights.start_next)
            weights.mark_current(gradients)  # the kernel wrote the copies too; else the next step would cast them again
        else:
            self.optimizer.update(gradients, scale)


def finite_everywhere(*values: Tensor) -> bool:
    """Whether these scalars are finite on every rank, so that all ranks decide alike. Collective over the default
    group; waits for the device."""
    # float, since NCCL has no maximum of bool
    bad = (~torch.stack([value.detach().double() for value in values]).isfinite()).any().float()
    dist.all_reduce(bad, op=dist.ReduceOp.MAX)
    return not bad.item()


def reshard(model: nn.Module) -> None:
    """Free what FSDP2 gathered for a forward that no backward follows."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def _joined(batches: Sequence[Batch]) -> Batch:
    ids, targets = zip(*batches, strict=True)
    return torch.cat(ids), torch.cat(targets)

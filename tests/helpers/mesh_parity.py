"""Parity of any mesh with one process: the same global batches, clipping on, and what differs after some steps."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from colrow.mesh import Mesh, MeshAxes
from colrow.models.llama import Llama
from colrow.parallel.activation_checkpoint import apply_activation_checkpoint
from colrow.parallel.compile import compile_forward
from colrow.parallel.data_parallel import apply_data_parallel, set_last_micro_batch
from colrow.parallel.loss import loss_context, model_loss
from colrow.parallel.parallelize import parallelize
from colrow.parallel.pipeline import PipelineOptions, PipelineRunner
from colrow.parallel.pipeline_split import layer_costs, split_layers
from colrow.parallel.pipeline_stage import Stage, split_stages
from colrow.plans.plan import Plan
from colrow.sharding.grad_norm import align_gradients, grad_norm
from colrow.sharding.layout import full_tensor, packed_of
from helpers.parity import batch, build, clip_gradients, cross_entropy, optimizer_of, relative, train_reference

GLOBAL_BATCH, MAX_NORM = 8, 0.5


@dataclass(frozen=True)
class Case:
    """One arrangement. `micro` is the number of micro-batches: gradient accumulation without a pipeline."""

    mesh: Mesh
    model: str = "gqa"
    micro: int = 1
    preset: str = "llama"
    loss: Any = "vocab_parallel"
    plan: Plan | None = None
    """In place of the preset."""
    checkpoint: Any = "none"
    reshard: bool | None = None
    schedule: Any = "1f1b"
    stages_per_rank: int = 1
    split: tuple[int, ...] | None = None
    compile: str | None = None
    steps: int = 2
    sabotage: str | None = None
    """What a negative control leaves out."""


@dataclass
class Result:
    """Relative errors against one process, by what they are of."""

    errors: dict[str, float] = field(default_factory=dict)

    def of(self, prefix: str) -> float:
        """The largest error among those of this name."""
        return max(error for name, error in self.errors.items() if name.startswith(prefix))

    @property
    def worst(self) -> tuple[str, float]:
        return max(self.errors.items(), key=lambda item: item[1])


class _Single:
    """The model without a pipeline, under the runner's names."""

    def __init__(self, case: Case, model: nn.Module, plan: Plan, mesh: DeviceMesh) -> None:
        self.case, self.model, self.plan, self.mesh = case, model, plan, mesh

    def forward_backward(self, ids: Tensor, targets: Tensor) -> Tensor:
        total = torch.zeros((), dtype=torch.float64, device=ids.device)
        parts = list(zip(ids.chunk(self.case.micro), targets.chunk(self.case.micro), strict=True))
        for i, (x, y) in enumerate(parts):
            set_last_micro_batch(self.model, i == len(parts) - 1)
            with loss_context(self.plan, self.mesh):
                loss = model_loss(self.model, self.plan, self.mesh, x, y)
                loss = loss / (1 if self.case.sabotage == "scale" else len(parts))
                loss.backward()
            value = loss.detach()
            total += value.full_tensor() if isinstance(value, DTensor) else value
        return total

    def named_parameters(self) -> Iterable[tuple[str, nn.Parameter]]:
        return self.model.named_parameters()

    def parameters(self) -> Iterable[nn.Parameter]:
        return self.model.parameters()

    counted_parameters = parameters


def run_case(device: str, case: Case) -> Result:
    """Train one process's model and the parallel one side by side; collective over the default group."""
    want = train_reference(case.model, device, case.steps, GLOBAL_BATCH, MAX_NORM)
    mesh = case.mesh.build(device, dist.get_world_size())
    plan = case.plan or Plan.preset(case.preset, case.loss)
    runner = _runner(case, build(case.model, device), plan, mesh)
    result = Result()
    names = [name for name, _ in runner.named_parameters()]
    optimizer = optimizer_of(runner.parameters())
    axes = MeshAxes(mesh)
    rank = 0 if case.sabotage == "data" else axes.data_rank
    for step in range(1 if case.sabotage else case.steps):
        ids, targets = batch(device, size=GLOBAL_BATCH, seed=step)
        got = runner.forward_backward(ids.chunk(case.mesh.dp)[rank], targets.chunk(case.mesh.dp)[rank])
        for axis in ("dp_replicate", "dp_shard"):
            dist.all_reduce(got, group=mesh[axis].get_group())
        align_gradients(runner.parameters())
        groups = axes.norm_groups()
        counted = runner.parameters() if case.sabotage == "count" else runner.counted_parameters()
        norm = grad_norm(counted, [] if case.sabotage == "norm" else groups)

        assert [name for name, _ in runner.named_parameters()] == names
        if step == 0:
            result.errors |= _differences("grad ", runner, want.gradients, lambda p: p.grad)
        result.errors[f"loss {step}"] = abs(got.item() / case.mesh.dp / want.losses[step] - 1)
        result.errors[f"norm {step}"] = abs(norm.item() / want.norms[step] - 1)
        clip_gradients(runner.parameters(), norm, MAX_NORM)
        optimizer.step()
        optimizer.zero_grad()
    if isinstance(runner, _Single):
        # The older `replicate` leaves an empty model behind after the first step.
        assert runner.model.state_dict().keys() == want.model.state_dict().keys()
    if not case.sabotage:
        result.errors |= _differences("trained ", runner, want.parameters, lambda p: p)
    if isinstance(runner, PipelineRunner):
        ids, targets = batch(device, size=GLOBAL_BATCH, seed=99)
        for part, count in ((ids, 1), (ids[: GLOBAL_BATCH // 2], 2)):  # two sizes of evaluation
            with torch.no_grad():
                expected = cross_entropy(want.model(part), targets[: len(part)])
            if case.mesh.dp == 1 and not case.sabotage:
                value = runner.evaluate(part, targets[: len(part)])
                result.errors[f"evaluation {count}"] = abs(value.item() / expected.item() - 1)
    return result


def run_cases(device: str, cases: dict[str, Case]) -> dict[str, Result]:
    """All of them, in order; collective."""
    results = {}
    for name, case in cases.items():
        try:
            results[name] = run_case(device, case)
        except BaseException as error:
            raise RuntimeError(f"case {name}") from error
    return results


def _runner(case: Case, model: Llama, plan: Plan, mesh: DeviceMesh) -> Any:
    def prepare(module: nn.Module, blocks: list[nn.Module], absent: frozenset[str] = frozenset()) -> None:
        parallelize(module, plan, mesh, absent=absent)
        if case.checkpoint == "selective":
            apply_activation_checkpoint(blocks, case.checkpoint, compiled=bool(case.compile))
        if case.compile:
            for block in blocks:
                compile_forward(block, backend=case.compile)
        if case.checkpoint == "full":
            apply_activation_checkpoint(blocks, case.checkpoint)
        apply_data_parallel(module, mesh, blocks, param_dtype=None, reshard_after_forward=case.reshard)

    if case.mesh.pp == 1:
        prepare(model, list(model.layers))
        return _Single(case, model, plan, mesh)

    def prepare_stage(stage: Stage) -> None:
        prepare(stage.module, stage.blocks, stage.absent)
        if case.sabotage == "copy" and stage.last:
            with torch.no_grad():
                stage.module.get_parameter("lm_head.weight").mul_(1.01)

    size, count = GLOBAL_BATCH // case.mesh.dp // case.micro, case.mesh.pp * case.stages_per_rank
    stages = split_stages(model, mesh, case.split or split_layers(layer_costs(model.config, 16, size), count))
    for stage in stages:
        prepare_stage(stage)
    runner = PipelineRunner(
        stages,
        plan,
        mesh,
        (lambda x, y: 2 * cross_entropy(x, y)) if case.sabotage == "scale" else cross_entropy,
        PipelineOptions(case.schedule, case.micro, size, seq_len=16, dtype=torch.float64),
    )
    if case.sabotage == "tie":
        runner._sum_tied_gradients = lambda: None  # type: ignore[method-assign]
    return runner


def _differences(
    prefix: str, runner: Any, expected: dict[str, Tensor], of: Callable[[nn.Parameter], Tensor | None]
) -> dict[str, float]:
    errors = {}
    for name, param in runner.named_parameters():
        got = of(param)
        assert got is not None, f"{name} has no gradient"
        packed = None if isinstance(runner, PipelineRunner) else packed_of(runner.model, name)
        errors[prefix + name] = relative(full_tensor(got.detach(), packed), expected[name])
    return errors

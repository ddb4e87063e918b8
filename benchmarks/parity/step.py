"""One small model on one mesh beside one process: loss, gradients, five optimizer steps, and a resume between them.

The same four micro-batches make a step everywhere: a data rank runs its share of them, in order; one process runs all.
The reference is plain torch, with colrow's optimizer groups, schedule and seeds of random numbers.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence, Set
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.parity.models import MODELS, V
from colrow.checkpoint.distributed import Checkpoints
from colrow.config import RunConfig, parse_config
from colrow.data.loader import Batch
from colrow.mesh import Mesh, MeshAxes
from colrow.models.build import Source
from colrow.parallel.precision import Precision
from colrow.parallel.random_state import Generators, MicroBatchSeeds
from colrow.sharding.layout import held_regions, local_tensor, packed_of
from colrow.train import setup
from colrow.train.optimizer import build_optimizer, set_learning_rate
from colrow.train.schedule import learning_rate
from colrow.train.setup import Training
from colrow.train.weight_decay import decay_by_name, decaying_parameters

STEPS, MICRO_BATCHES, SEQUENCES, SEQ_LEN = 5, 4, 2, 8


@dataclass
class Errors:
    """Relative errors against one process, the largest of each: max |a - b| / max |b|; inf where only one has it."""

    loss: float = 0.0
    gradients: float = 0.0
    parameters: float = 0.0
    """After all steps."""
    buffers: float = 0.0
    """Those that are stored, after each step."""
    resumed: float = 0.0
    """Of losses, relative, and parameters, absolute, between a run that was saved and loaded in the middle and the
    uninterrupted one."""
    unused: set[str] = field(default_factory=set)
    """Parameters whose gradient is None in some step."""

    @property
    def worst(self) -> float:
        return max(self.loss, self.gradients, self.parameters, self.buffers)


class _Double(Precision):
    """fp64 throughout."""

    @property
    def fsdp_param_dtype(self) -> torch.dtype | None:
        return None


Held = list[tuple[tuple[Any, ...], Tensor]]
"""What a rank holds of a tensor: regions of the unsharded one, and their values."""


@dataclass
class Trained:
    """What one process sees, or with `Held` in a tensor's place what a rank sees."""

    losses: list[float] = field(default_factory=list)
    gradients: list[dict[str, Any]] = field(default_factory=list)
    buffers: list[dict[str, Any]] = field(default_factory=list)
    parameters: dict[str, Any] = field(default_factory=dict)


def config_of(mesh: Mesh, **section: Any) -> RunConfig:
    return parse_config(
        {
            "run": {"dir": "unused"},
            "model": {"python": "benchmarks.parity.models:MODELS"},
            "data": {"corpus": "stdlib", "seq_len": SEQ_LEN},
            "mesh": mesh.model_dump(),
            "train": {
                "steps": STEPS,
                "global_batch": MICRO_BATCHES * SEQUENCES,
                "micro_batch": SEQUENCES,
                "lr": 1e-2,
                "grad_clip": 0.5,
                "compile": False,
                "cuda_graph": False,  # its update reads the learning rate in fp32
                **section,
            },
        }
    )


def micro_batches(step: int) -> list[Batch]:
    """All of a step: random ids [2, 8] and targets."""
    generator = torch.Generator().manual_seed(step)
    ids = torch.randint(0, V, (MICRO_BATCHES, SEQUENCES, SEQ_LEN + 1), generator=generator)
    return [(x[:, :-1], x[:, 1:]) for x in ids]


@functools.cache
def one_process(name: str, device: str, data_ranks: int = 1) -> Trained:
    """Plain torch on one process.

    Args:
        data_ranks: matters where forward writes buffers. Each data rank's micro-batches start from the step's buffers,
            and those that ranks wrote become the mean over them.
    """
    model, config, seen = MODELS[name].model().to(device), config_of(Mesh()), Trained()
    named = dict(model.named_parameters(remove_duplicate=False))  # a pipeline stage may hold either name
    decaying = decaying_parameters([model], decay_by_name(model, config.train))
    optimizer = build_optimizer(model.parameters(), config.train, decaying)
    seeds = MicroBatchSeeds(Generators([model], device), config.run.seed)
    for step in range(STEPS):
        total, seeds.step = 0.0, step
        before, after = _buffers(model), []
        for rank in range(data_ranks):
            _copy(before, model)
            for number in range(rank, MICRO_BATCHES, data_ranks):
                ids, targets = (x.to(device) for x in micro_batches(step)[number])
                seeds.start(number)
                loss = _loss(model(ids), targets, MODELS[name].auxiliary) / MICRO_BATCHES
                loss.backward()
                total += loss.item()
            after.append(_buffers(model))
        _copy({key: _mean(value, [found[key] for found in after]) for key, value in before.items()}, model)
        seen.losses.append(total)
        seen.gradients.append({key: p.grad.clone() for key, p in named.items() if p.grad is not None})
        assert config.train.grad_clip is not None
        nn.utils.clip_grad_norm_(model.parameters(), config.train.grad_clip)
        set_learning_rate(optimizer, learning_rate(step, config.train))
        optimizer.step()
        optimizer.zero_grad()
        seen.buffers.append(_buffers(model))
    seen.parameters = {key: p.detach().clone() for key, p in named.items()}
    return seen


def _loss(output: Any, targets: Tensor, auxiliary: dict[str, float]) -> Tensor:
    """Of a micro-batch: cross entropy, and the losses of the output by their weights."""
    logits = output if isinstance(output, Tensor) else output.logits
    loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
    return loss + sum(weight * getattr(output, key) for key, weight in auxiliary.items())


def _buffers(model: nn.Module) -> dict[str, Tensor]:
    stored = model.state_dict()
    return {key: local_tensor(value).clone() for key, value in model.named_buffers() if key in stored}


def _copy(buffers: dict[str, Tensor], model: nn.Module) -> None:
    for key, value in buffers.items():
        model.get_buffer(key).copy_(value)


def _mean(before: Tensor, after: Sequence[Tensor]) -> Tensor:
    """Of what data ranks made of a buffer: the mean (of integers, the maximum) over those that changed it."""
    changed = [value for value in after if not torch.equal(value, before)] or [before]
    return torch.stack(changed).mean(0) if before.is_floating_point() else torch.stack(changed).amax(0)


def on_ranks(
    device: str, name: str, degrees: Mesh, folder: Path | None = None, steps: int = STEPS, **section: Any
) -> Errors:
    """The model on a mesh of the default group's ranks; collective.

    Args:
        folder: where the checkpoint of the middle is written; without one nothing is saved and loaded.
        steps: the first of those of the reference; all where something is saved.
        section: further keys of the config's `train`; with `precision` the model is not fp64.
    """
    errors, writes = Errors(), bool(_buffers(MODELS[name].model()))
    want = one_process(name, device, degrees.dp if writes else 1)
    got = train(set_up(device, name, degrees, **section), range(steps), folder)
    errors.loss = max(abs(a / b - 1) for a, b in zip(got.losses, want.losses, strict=False))
    for a, b in zip(got.gradients, want.gradients, strict=False):
        errors.gradients = max(errors.gradients, _largest(a, b, got.parameters.keys()))
        errors.unused |= got.parameters.keys() - a.keys()
    for stored, expected in zip(got.buffers, want.buffers, strict=False):
        errors.buffers = max(errors.buffers, _largest(stored, expected, got.buffers[0].keys()))
    if steps == STEPS:
        errors.parameters = _largest(got.parameters, want.parameters, got.parameters.keys())
    if folder is not None:
        resumed = set_up(device, name, degrees, **section)
        Checkpoints(folder, mesh=degrees, tied=resumed.tied).load(STEPS // 2, resumed.modules, resumed.optimizer)
        again = train(resumed, range(STEPS // 2, STEPS))
        apart = [abs(a / b - 1) for a, b in zip(again.losses, got.losses[STEPS // 2 :], strict=True)]
        errors.resumed = max(*apart, *(_apart(again.parameters[key], held) for key, held in got.parameters.items()))
    return errors


def set_up(device: str, name: str, degrees: Mesh, **section: Any) -> Training:
    """The model of this name, ready to train on a mesh of the default group's ranks; collective."""
    mesh = degrees.build(device, dist.get_world_size())
    config, plan = config_of(degrees, **section), MODELS[name].plan_of()
    source = Source(MODELS[name].model(), name, None, "built", auxiliary=MODELS[name].auxiliary)
    if "precision" in section:
        source.model.float()
        return setup.set_up(config, mesh, torch.device(device), source, plan)
    double = _Double(torch.float64, keeps_copies=False)
    with mock.patch.object(setup, "choose_precision", return_value=double):
        return setup.set_up(config, mesh, torch.device(device), source, plan)


def train(training: Training, steps: Sequence[int], folder: Path | None = None) -> Trained:
    """Run `steps`; with a folder, save in the middle."""
    axes, seen, step = MeshAxes(training.mesh), Trained(), training.step
    names = {p: key for module in training.modules for key, p in module.named_parameters()}
    packed = {p: packed_of(module, key) for module in training.modules for key, p in module.named_parameters()}

    def held(param: nn.Parameter, tensor: Tensor) -> Held:
        local = local_tensor(tensor.detach())
        regions = held_regions(tensor.detach(), packed[param])
        return [(region.slices, local[place.slices].cpu().clone()) for region, place in regions.items()]

    update = step.optimizer.update

    def capture(gradients: Any, *rest: Any) -> None:
        seen.gradients.append({names[p]: held(p, grad) for p, grad in gradients.items()})
        update(gradients, *rest)

    step.optimizer.update = capture  # type: ignore[method-assign]
    dp = axes.size("dp_replicate") * axes.size("dp_shard")
    for number in steps:
        mine = micro_batches(number)[axes.data_rank :: dp]  # as data.loader deals them
        loss, _ = step(number, [(ids.to(training.device), y.to(training.device)) for ids, y in mine])
        loss = loss.double() * axes.loss_weight
        dist.all_reduce(loss)
        seen.losses.append(loss.item())
        buffers = (item for module in training.modules for item in _buffers(module).items())
        seen.buffers.append({key: [((...,), value.cpu())] for key, value in buffers})
        if folder is not None and number + 1 == STEPS // 2:
            saver = Checkpoints(folder, mesh=Mesh(**_degrees(axes)), tied=training.tied)
            saver.save(number + 1, training.modules, training.optimizer, {"step": number + 1})
            saver.wait()
    seen.parameters = {key: held(p, p) for p, key in names.items()}
    return seen


def _degrees(axes: MeshAxes) -> dict[str, int]:
    return {axis: axes.size(axis) for axis in ("pp", "dp_replicate", "dp_shard", "tp")}


def _largest(got: dict[str, Held], want: dict[str, Tensor], here: Set[str]) -> float:
    """The largest relative error; `here` are the names that this rank's pipeline stages hold."""
    if got.keys() != want.keys() & here:
        return float("inf")
    return max((_relative(held, want[key].cpu()) for key, held in got.items()), default=0.0)


def _relative(held: Held, want: Tensor) -> float:
    scale = want.double().abs().max().clamp_min(1e-300)
    differences = [(value - want[index]).double().abs().max() for index, value in held if value.numel()]
    return max(((difference / scale).item() for difference in differences), default=0.0)


def _apart(again: Held, held: Held) -> float:
    """The largest difference of what a rank holds in two runs."""
    return max(((a - b).abs().max().item() for (_, a), (_, b) in zip(again, held, strict=True) if a.numel()), default=0)

"""Steps of the flat data engine one by one, and replayed; on CPUs by a stand-in (`helpers.taped_graph`)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple
from unittest import mock

import torch

from benchmarks.parity import step as parity
from benchmarks.parity.step import config_of, micro_batches, set_up
from colrow.config_sections import FsdpSection
from colrow.mesh import Mesh, MeshAxes
from colrow.parallel.flat_weights import FlatWeights
from colrow.sharding.layout import local_tensor
from colrow.train import setup
from colrow.train.setup import Training
from helpers.flat_peers import flat, simulated_peers
from helpers.taped_graph import taped_graphs

STEPS = 6
"""Two run eagerly; the third captures."""
EVALUATED = 3


class Case(NamedTuple):
    """A run: `micro_batches` of a step over all data ranks, and what is left out."""

    mesh: Mesh
    micro_batches: int
    fsdp: FsdpSection = FsdpSection()
    model: str = "llama"
    without: str = ""


@dataclass
class Seen:
    """What a rank saw."""

    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    evaluations: list[float] = field(default_factory=list)
    parameters: list[torch.Tensor] = field(default_factory=list)
    captured: list[bool] = field(default_factory=list)
    graphs: list[int] = field(default_factory=list)
    """Of a micro-batch, and of the update."""


CASES: dict[int, dict[str, Case]] = {
    2: {
        "shard2": Case(flat(dp_shard=2), 6),
        "shard2-one": Case(flat(dp_shard=2), 2),
        "replicate2": Case(flat(dp_replicate=2), 6),
        "shard2-kept": Case(flat(dp_shard=2), 4, FsdpSection(reshard_after_forward=False)),
        "shard2-cast": Case(flat(dp_shard=2), 4, FsdpSection(keep_shards=False)),
        "shard2-tied": Case(flat(dp_shard=2), 4, model="llama, tied, odd vocabulary"),
        "shard2-peers": Case(flat(dp_shard=2), 6, FsdpSection(gather="copy_engine")),
        "shard2-exchange": Case(flat(dp_shard=2), 6, FsdpSection(exchange="copy_engine")),
        "shard2-engines": Case(flat(dp_shard=2), 4, FsdpSection(gather="copy_engine", exchange="copy_engine")),
        "without state": Case(flat(dp_shard=2), 6, without="state"),
        "without restore": Case(flat(dp_shard=2), 6, without="restore"),
    },
    4: {
        "tp2-shard2": Case(flat(dp_shard=2, tp=2), 6),
        "tp2-shard2-bare": Case(flat(dp_shard=2, tp=2), 6, model="bare matrices"),
        "replicate2-shard2": Case(flat(dp_replicate=2, dp_shard=2), 12),
        "tp2-replicate2": Case(flat(dp_replicate=2, tp=2), 6),
    },
}
ON_GPUS = {"shard2-exchange", "shard2-engines"}
"""Flags of slots are waited for on the host where a copy engine is simulated: a replay would not wait."""


@contextmanager
def changed(device: str, case: Case, eager_steps: int) -> Iterator[None]:
    config = config_of(case.mesh, cuda_graph=True, global_batch=2 * case.micro_batches)
    left_out: dict[str, Any] = {"state": lambda weights: (), "restore": lambda weights, state: None}
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(setup, "EAGER_STEPS", eager_steps))
        stack.enter_context(mock.patch.object(parity, "MICRO_BATCHES", case.micro_batches))
        stack.enter_context(
            mock.patch.object(parity, "config_of", return_value=config.model_copy(update={"fsdp": case.fsdp}))
        )
        if case.without:
            stack.enter_context(mock.patch.object(FlatWeights, case.without, left_out[case.without]))
            stack.enter_context(mock.patch.object(FlatWeights, "restore", left_out["restore"]))
        if device == "cpu":
            stack.enter_context(taped_graphs())
            stack.enter_context(simulated_peers())
        yield


def train(training: Training, device: str) -> Seen:
    axes, seen = MeshAxes(training.mesh), Seen()
    for number in range(STEPS):
        mine = micro_batches(number)[axes.data_rank :: axes.size("dp_replicate") * axes.size("dp_shard")]
        batches = [(ids.to(device), targets.to(device)) for ids, targets in mine]
        loss, norm = training.step(number, batches)
        seen.losses.append(loss.item())
        seen.norms.append(norm.item())
        seen.captured.append(training.captured)
        if number == EVALUATED:  # leaves other blocks in the buffers than a step does
            seen.evaluations.append(training.step.forward_backward.evaluate(batches).item())
    params = (param for module in training.modules for param in module.parameters())
    seen.parameters = [local_tensor(param.detach()).cpu().clone() for param in params]
    seen.graphs = [len(graph._graphs) for graph in training.graphs]
    training.close()
    return seen


def eager_and_replayed(device: str, case: Case) -> tuple[Seen, Seen]:
    """The same steps, never captured and captured in the third."""
    both = []
    for eager_steps in (STEPS, 2):
        with changed(device, case, eager_steps):
            both.append(train(set_up(device, case.model, case.mesh), device))
    return both[0], both[1]


def apart_when_replayed(device: str, case: Case) -> float:
    """The largest difference between the two."""
    eager, replayed = eager_and_replayed(device, case)
    assert replayed.captured[-1]
    numbers = [(a - b) for a, b in zip(eager.losses + eager.norms, replayed.losses + replayed.norms, strict=True)]
    tensors = [(a - b).abs().max().item() for a, b in zip(eager.parameters, replayed.parameters, strict=True)]
    return max(*map(abs, numbers), *tensors)

"""`train.replay_every`: the search for silent corruption, in what a rank computes and in what it keeps.

What it computes: see [Note: replay]. What it keeps: weights and optimizer state are hashed after each update and before
the next, and must not have changed; ranks along an axis that differ only in their batches hold the same weights, and
compare hashes. Both are looked at in every step that is repeated, and before a save.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from colrow.mesh import AXES, ROLES, MeshAxes
from colrow.sharding.layout import local_tensor
from colrow.train.fingerprint import memory_hashes
from colrow.train.replay import NondeterministicError, SilentCorruptionError, StepReplay

if TYPE_CHECKING:
    from colrow.data.loader import Batch


@dataclass(frozen=True)
class _Report:
    rank: int
    place: tuple[int, ...]
    """Coordinates that ranks with the same shards have in common."""
    changed: tuple[str, ...]
    """Tensors that changed although nothing wrote them."""
    parameters: dict[str, int]


class CorruptionCheck:
    """What a step and a save check. Each method but `after_update` raises SilentCorruptionError on every rank."""

    def __init__(self, replay: StepReplay, kept: KeptState) -> None:
        self._replay, self._kept = replay, kept

    def report_to(self, say: Callable[[str], None]) -> None:
        """Print lines by `say`."""
        self._replay.say = say

    def forward_backward(self, step: int, batches: Sequence[Batch]) -> Tensor:
        """`StepReplay.__call__`."""
        return self._replay(step, batches, lambda: self._kept.require_intact(f"in step {step + 1}"))

    def before_update(self, step: int) -> None:
        if self._replay.due(step):
            self._kept.require_intact(f"in step {step + 1}")
        else:
            self._kept.compare()

    def after_update(self) -> None:
        self._kept.mark()

    def before_save(self, step: int) -> None:
        """Check what is about to be saved after `step` steps."""
        self._kept.require_intact(f"before step-{step} was saved")


class KeptState:
    """Hashes of this rank's weights and optimizer state, from each update to the next.

    Args:
        named: this rank's parameters, by name.
        copies: those that the model computes with, where there are some.
    """

    def __init__(
        self,
        named: Mapping[str, nn.Parameter],
        optimizer: torch.optim.Optimizer,
        copies: Mapping[nn.Parameter, Tensor] | None,
        axes: MeshAxes,
    ) -> None:
        self._named, self._optimizer, self._copies = named, optimizer, copies or {}
        # Ranks along an axis whose ranks differ only in the batches that they read hold the same weights.
        self._place = tuple(axes.rank(axis) for axis in AXES if ROLES[axis].parameters)
        self._names: list[str] = []
        self._hashes = self._changed = torch.zeros(0)

    def mark(self) -> None:
        """After an update: what is there now stays until the next one."""
        tensors = dict(self._tensors())
        hashes = memory_hashes(tensors.values())
        if list(tensors) != self._names:  # the optimizer makes a parameter's state when it first has a gradient
            intact = torch.zeros((), dtype=torch.bool, device=hashes.device)
            changed = dict(zip(self._names, self._changed.unbind(), strict=True))
            self._names, self._changed = list(tensors), torch.stack([changed.get(name, intact) for name in tensors])
        self._hashes = hashes

    def compare(self) -> None:
        """Before an update. Does not wait for the device."""
        if self._names:
            self._changed |= memory_hashes(tensor for _, tensor in self._tensors()) != self._hashes

    def require_intact(self, when: str) -> None:
        """Collective over all ranks.

        Args:
            when: for the error's text.

        Raises:
            SilentCorruptionError: on every rank; a rank's state changed since the last call without an update, or
                replicas hold different weights.
            NondeterministicError: the state of every rank changed.
        """
        self.compare()
        changed = [name for name, flag in zip(self._names, self._changed.tolist(), strict=True) if flag]
        names = [name for name, param in self._named.items() if local_tensor(param).numel()]
        hashes = memory_hashes(local_tensor(self._named[name]) for name in names).tolist()
        report = _Report(dist.get_rank(), self._place, tuple(changed), dict(zip(names, hashes, strict=True)))
        reports: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(reports, report)
        # One rank's weights change by a fault of its hardware; those of all ranks by the code they all run.
        if len(reports) > 1 and all(report.changed for report in reports):
            raise NondeterministicError(
                f"train.replay_every: weights changed between two updates on every rank ({reports[0].changed[0]}), so "
                "the model's code writes them, which cannot be told from corruption: set train.replay_every to 0"
            )
        if any(report.changed for report in reports):
            raise SilentCorruptionError(_changed_text(when, reports))
        for text in _different_replicas(when, reports):
            raise SilentCorruptionError(text)

    def _tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Local tensors with elements, by name."""
        for name, param in self._named.items():
            held = {name: param, f"{name} (compute copy)": self._copies.get(param)}
            held |= {f"{name} ({key})": value for key, value in self._optimizer.state.get(param, {}).items()}
            for key, value in held.items():
                if isinstance(value, Tensor) and value.device == param.device and local_tensor(value).numel():
                    yield key, local_tensor(value)


def _changed_text(when: str, reports: list[_Report]) -> str:
    found = [f"rank {report.rank}: {', '.join(report.changed[:3])}" for report in reports if report.changed]
    return (
        f"silent corruption: found {when}, memory changed between two updates on {'; '.join(found)}. "
        "Replace or test the hardware, and continue from a checkpoint that was saved before"
    )


def _different_replicas(when: str, reports: list[_Report]) -> Iterator[str]:
    groups: dict[tuple[int, ...], list[_Report]] = defaultdict(list)
    for report in reports:
        groups[report.place].append(report)
    for group in groups.values():
        for name in group[0].parameters:
            ranks_by_hash: dict[int, list[int]] = defaultdict(list)
            for report in group:
                ranks_by_hash[report.parameters[name]].append(report.rank)
            if len(ranks_by_hash) > 1:
                yield _replicas_text(when, name, sorted(ranks_by_hash.values(), key=len))


def _replicas_text(when: str, name: str, by_value: list[list[int]]) -> str:
    text = f"silent corruption: found {when}, replicas hold different values of {name}: "
    if len(by_value[-1]) > len(by_value[-2]):
        wrong = sorted(rank for ranks in by_value[:-1] for rank in ranks)
        text += f"rank{'s' if len(wrong) > 1 else ''} {', '.join(map(str, wrong))} against {len(by_value[-1])} others"
    else:
        text += f"{' against '.join(str(ranks) for ranks in by_value)} (ranks), and none has a majority"
    return text + ". Replace or test the hardware, and continue from a checkpoint that was saved before"

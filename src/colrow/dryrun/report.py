"""What a plan does to a model, as data: parameters, collectives, and the path through one block."""

from __future__ import annotations

import re
from dataclasses import dataclass
from math import prod
from typing import Any

from torch import nn
from torch.distributed.tensor import Replicate

from colrow.dryrun.calls import GivenInputs
from colrow.dryrun.dry_run import dry_run
from colrow.dryrun.result import Collective, DryRun, Output
from colrow.errors import PlanError, first_line
from colrow.mesh import Mesh
from colrow.models.blocks import block_stacks
from colrow.plans.patterns import is_within, with_stars
from colrow.plans.plan import Plan
from colrow.sharding.placements import format_placement

Shape = tuple[int, ...]


@dataclass(frozen=True)
class ParameterRow:
    """One parameter: its global shape, its placement over tp, the local shape, and the reason."""

    name: str
    shape: Shape
    placement: str
    local_shape: Shape
    reason: str
    bytes: int
    local_bytes: int


@dataclass(frozen=True)
class PathStep:
    """One module on the path of the activations through a block, in the order of execution."""

    name: str
    depth: int
    style: str
    weights: str
    output: Output | None
    before: tuple[Collective, ...]
    after: tuple[Collective, ...]
    backward: tuple[Collective, ...]


@dataclass(frozen=True)
class PlanReport:
    """A plan, applied to a model at a degree, as data."""

    plan: Plan
    tp: int
    batch_size: int
    seq_len: int
    parameters: list[ParameterRow]
    block: str
    """The repeated block, with `*` for its number; empty when the model has none."""
    blocks: int
    path: list[PathStep]
    run: DryRun

    @property
    def block_collectives(self) -> list[Collective]:
        """The collectives of one block, forward then backward, in order."""
        first = _first(self.block)
        return [c for c in self.run.collectives if self.block and is_within(c.where, first)]

    @property
    def other_collectives(self) -> list[Collective]:
        """The collectives outside the blocks: embedding, head, loss, and gradients summed at the end."""
        family = re.compile(re.escape(self.block).replace(r"\*", r"\d+") + r"(\..*)?") if self.block else None
        return [c for c in self.run.collectives if family is None or not family.fullmatch(c.where)]

    @property
    def notes(self) -> list[str]:
        """Why a parameter is not split as it could be, dim by dim; once where it is the same in all layers."""
        return list(dict.fromkeys(f"{with_stars(name)}: {why}" for name, why in self.plan.notes.items()))

    def to_data(self) -> dict[str, Any]:
        """What `colrow plan --json` prints."""
        return {
            "parameters": [
                {
                    "name": row.name,
                    "shape": list(row.shape),
                    "placement": row.placement,
                    "local_shape": list(row.local_shape),
                    "reason": row.reason,
                }
                for row in self.parameters
            ],
            "collectives": [c.to_data() for c in self.run.collectives],
        }


def report(
    model: nn.Module,
    plan: Plan,
    tp: int,
    batch_size: int = 1,
    seq_len: int = 128,
    *,
    inputs: GivenInputs | None = None,
) -> PlanReport:
    """What `plan` does to `model` over tp ranks. The model may be on the meta device, and is not changed.

    Raises:
        PlanError: the plan does not fit the model at this degree, or the model does not run under it.
    """
    layouts = plan.parameters(model, tp)
    rows = []
    for name, param in model.named_parameters():
        layout = layouts[name]
        size = param.element_size()
        rows.append(
            ParameterRow(
                name,
                tuple(param.shape),
                format_placement(layout.placement) + (" of each segment" if layout.packed else ""),
                layout.local_shape,
                layout.reason,
                param.numel() * size,
                prod(layout.local_shape) * size,
            )
        )
    run = dry_run(model, plan, Mesh(tp=tp), batch_size, seq_len, inputs=inputs)
    if run.failure is not None:  # sizes fit, and the model's code does not run on the shards
        where, error = run.failure.where or "the model", run.failure.error
        raise PlanError(
            f"plan {plan.name} does not run at tp={tp}: {where} raises {type(error).__name__}: {first_line(error)}: "
            "`colrow check` says what is wrong"
        ) from error
    block, blocks = repeated_block(model)
    path = _path(model, plan, run, rows, _first(block)) if block else []
    return PlanReport(plan, tp, batch_size, seq_len, rows, block, blocks, path, run)


def repeated_block(model: nn.Module) -> tuple[str, int]:
    """The pattern of the largest stack of like blocks, and its length: (`layers.*`, 32). ("", 0) without one."""
    like = [
        stack
        for stack in block_stacks(model)
        if list(stack.blocks) == [str(i) for i in range(len(stack.blocks))]
        and len({type(block) for block in stack.blocks.values()}) == 1
    ]
    if not like:
        return "", 0
    largest = max(like, key=lambda stack: sum(param.numel() for param in stack.container.parameters()))
    return f"{largest.name}.*".removeprefix("."), len(largest.blocks)


def _first(block: str) -> str:
    return block.replace("*", "0")


def _path(model: nn.Module, plan: Plan, run: DryRun, rows: list[ParameterRow], block: str) -> list[PathStep]:
    styles = plan.styles_of(model)
    own: dict[str, list[ParameterRow]] = {}
    for row in rows:
        own.setdefault(row.name.rpartition(".")[0], []).append(row)
    inside = [name for name, _ in model.named_modules() if is_within(name, block)]
    steps = []
    for name in inside:
        if name != block and name not in styles and name not in own:
            continue
        here = [c for c in run.collectives if c.where == name]
        forward = [c for c in here if c.pass_ == "forward"]
        outputs, style = run.outputs.get(name), styles.get(name)
        # an all-gather comes before the module, unless the style gathers its output
        enters = "all_gather" if getattr(style, "output", None) != Replicate() else None
        weights = ", ".join(
            f"{row.name.rpartition('.')[2]} {row.placement} {'×'.join(map(str, row.local_shape))}"
            for row in own.get(name, [])
        )
        steps.append(
            PathStep(
                name=name.removeprefix(block).lstrip(".") or block,
                depth=name.count(".") - block.count("."),
                style=style.name if style else "replicate" if name in own else "",
                weights=weights,
                output=outputs[0] if outputs else None,
                before=tuple(c for c in forward if c.op == enters),
                after=tuple(c for c in forward if c.op != enters),
                backward=tuple(c for c in here if c.pass_ == "backward"),
            )
        )
    return steps

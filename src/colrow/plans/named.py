"""The Plan that a name stands for, in a config or on a command line: a preset, a derived plan, or a file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

from torch import nn

from colrow.config_sections import DeriveSection
from colrow.errors import ConfigError, did_you_mean
from colrow.plans.derive_options import DERIVED, DeriveOptions
from colrow.plans.loss import LOSSES
from colrow.plans.plan import Plan
from colrow.plans.presets import PRESETS

NO_REQUESTS = DeriveSection()


def named_plan(
    name: str,
    model: nn.Module,
    tp: int,
    loss: str | None = None,
    requests: DeriveSection = NO_REQUESTS,
    inputs: Any = None,
    say: Callable[[str], None] | None = None,
) -> Plan:
    """The plan of this name: a preset, `huggingface`, `derive`, `derive-fast`, `derive-overlap`, or a file.

    Args:
        tp: the degree that a derived plan is for.
        loss: how a preset or a derived plan computes the loss, `vocab_parallel` unless given; another declares its own.
        requests: what a derived plan must leave unsharded, and what it must split.
        inputs: example inputs, on which a plan is derived.
        say: called with a line where a derivation takes long.

    Raises:
        ConfigError: there is no such preset or file, no such loss, or the plan's own loss is another one; or a plan
            that is not derived has requests.
        PlanError: the model states no plan, or gets none of the styles requested, or the file holds none.
    """
    if loss is not None and loss not in LOSSES:
        raise ConfigError(f"unknown loss {loss!r}{did_you_mean(loss, LOSSES)}")
    if name not in DERIVED and requests != NO_REQUESTS:
        raise ConfigError(
            f"keep_whole and split are requests to a derived plan, and plan is {name}",
            *({"plan": derived} for derived in DERIVED),
            {"derive.keep_whole": (), "derive.split": ()},
        )
    if name in PRESETS:
        return Plan.preset(name, cast(Any, loss) or "vocab_parallel")
    if name == "huggingface":
        plan = Plan.from_huggingface(model)
    elif name in DERIVED:
        plan = Plan.derive(model, tp=tp, options=derive_options(name, loss, requests), inputs=inputs, say=say)
    elif Path(name).exists():
        plan = Plan.load(name)
    else:
        raise ConfigError(
            f"plan: there is no preset and no file {name!r}: choose from {', '.join(PRESETS)}, huggingface, "
            f"{', '.join(DERIVED)}, or give the path of a plan's YAML"
        )
    # presets and derived plans are made for the loss that was requested; others say which one they were made for
    if loss is not None and loss != plan.loss:
        raise ConfigError(
            f"loss: {loss} was requested, but the plan {plan.name} declares {plan.loss}, which its head's style "
            "belongs to: leave loss out, or change both in the plan's file"
        )
    return plan


def derive_options(name: str, loss: str | None = None, requests: DeriveSection = NO_REQUESTS) -> DeriveOptions:
    """The options that the name of a derived plan stands for, with what a user requests."""
    return DeriveOptions(
        styles=DERIVED[name],
        loss=cast(Any, loss) or "vocab_parallel",
        keep_whole=requests.keep_whole,
        split=requests.split,
    )

"""The learning rate as a pure function of the step: warm-up, then cosine, linear, or warm-up-stable-decay.

A resumed run needs nothing but its step to go on with the same rates.
"""

from __future__ import annotations

import math

from colrow.config_sections import TrainSection
from colrow.errors import AtMost, ConfigError


def learning_rate(step: int, section: TrainSection) -> float:
    """The rate of optimizer step `step`, counted from 0 to `section.steps - 1`.

    It rises linearly over `warmup_steps`, reaching the peak at the last of them, and ends on `lr × min_lr_ratio` at
    the last step. `wsd` holds the peak until the last `decay_steps`, which fall linearly (Hu et al. 2024, MiniCPM).
    """
    if step < section.warmup_steps:
        return section.lr * (step + 1) / section.warmup_steps
    return section.lr * (section.min_lr_ratio + (1.0 - section.min_lr_ratio) * _share(step, section))


def decay_steps(section: TrainSection) -> int:
    """Steps over which the rate falls: for `wsd` the last tenth unless given, else all after the warm-up."""
    after_warmup = section.steps - section.warmup_steps
    if section.schedule != "wsd":
        return after_warmup
    return section.decay_steps or min(max(section.steps // 10, 1), after_warmup)


def check_schedule(section: TrainSection) -> None:
    """Raise a ConfigError when warm-up and decay do not fit into the steps."""
    if section.warmup_steps >= section.steps:
        raise ConfigError(
            f"train.warmup_steps={section.warmup_steps} leaves no step of train.steps={section.steps} for training at "
            "the full rate",
            {"train.warmup_steps": AtMost(max(0, section.steps - (section.decay_steps or 1)))},
        )
    if section.decay_steps is None:
        return
    if section.schedule != "wsd":
        raise ConfigError(
            f"train.decay_steps={section.decay_steps} is for schedule wsd, not for {section.schedule}, which decays "
            "over all steps",
            {"train.decay_steps": None},
            {"train.schedule": "wsd"},
        )
    if section.warmup_steps + section.decay_steps > section.steps:
        raise ConfigError(
            f"train.warmup_steps={section.warmup_steps} and train.decay_steps={section.decay_steps} together exceed "
            f"train.steps={section.steps}",
            {"train.decay_steps": AtMost(section.steps - section.warmup_steps)},
        )


def _share(step: int, section: TrainSection) -> float:
    """How much of the way from the last rate up to the peak: 1 before the decay, 0 at the last step."""
    decay = decay_steps(section)
    progress = max(0, step + 1 - (section.steps - decay)) / decay
    if section.schedule == "cosine":
        return 0.5 * (1.0 + math.cos(math.pi * min(progress, 1.0)))
    return 1.0 - min(progress, 1.0)

"""`forecast: warn | stop`: what a step will take and cost, before the ranks start; refused where it cannot fit."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import nn

from colrow.config import RunConfig
from colrow.errors import ConfigError, PlanError
from colrow.forecasting.choices import options_of
from colrow.forecasting.devices import Device, device_named, name_of
from colrow.forecasting.forecast import MARGIN, Forecaster, Options
from colrow.forecasting.memory import GIB
from colrow.plans.plan import Plan


def forecast_lines(config: RunConfig, model: nn.Module, plan: Plan) -> list[str]:
    """What to print, with this host's GPUs; nothing without GPUs, or with `forecast: off`.

    Raises:
        ConfigError: with `forecast: stop`, a rank needs more memory than a GPU has, even if the forecast is too high by
            its margin; the text names the nearest setting that fits.
    """
    if config.forecast == "off" or config.device == "cpu" or not torch.cuda.is_available():
        return []
    name = torch.cuda.get_device_name()
    known = name_of(name)
    if known is None:
        return [f"forecast   none: no rates are known of {name}"]
    device = replace(device_named(known), memory=float(torch.cuda.mem_get_info()[1]))
    return lines_on(device, torch.cuda.device_count(), config, model, plan)


def lines_on(device: Device, per_host: int, config: RunConfig, model: nn.Module, plan: Plan) -> list[str]:
    """`forecast_lines` on given GPUs, `per_host` of them on a host."""
    forecaster = Forecaster(model, device, per_host)
    options = options_of(config)
    try:
        row = forecaster.row(plan, config.mesh, options)
    except (ConfigError, PlanError) as error:
        return [f"forecast   none: {error}"]
    memory = f"{row.memory.device / GIB:.3g} GiB of {device.memory / GIB:.3g}"
    if (1 - MARGIN) * row.memory.device <= device.memory:
        rate = row.tokens_per_second_per_gpu
        return [f"forecast   {memory}, {rate:,.0f} ± {rate * device.band:,.0f} tokens/s per GPU"]
    nearest = next((words for words, other in _smaller(options) if forecaster.row(plan, config.mesh, other).fits), None)
    fix = f"use {nearest}" if nearest else "use more GPUs, shorter sequences, or a smaller model"
    text = f"forecast: a rank needs {memory}: {fix}; `colrow forecast` compares meshes"
    if config.forecast == "stop":
        raise ConfigError(f"{text}; forecast: warn starts all the same")
    return [f"warning    {text}"]


def _smaller(options: Options) -> Iterator[tuple[str, Options]]:
    """Settings that need less memory, nearest first, with the keys to set."""
    modes = ("none", "selective", "full")
    size = options.micro_batch
    while True:
        for recompute in modes[modes.index(options.recompute) :]:
            other = replace(options, micro_batch=size, recompute=recompute)  # type: ignore[arg-type]
            other = replace(other, micro_batches=options.micro_batches * options.micro_batch // size)
            if other != options:
                yield f"train.micro_batch {size} with train.activation_checkpoint {recompute}", other
        if size == 1 or size % 2:
            return
        size //= 2

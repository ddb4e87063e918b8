"""A run's forecast: printed while the ranks set up, refused where it cannot fit, and compared with the run.

Only on GPUs. It takes some seconds of one core, so the launcher makes it beside its ranks; and it is kept as
forecast.json in the run's folder, under a digest of all that it depends on: a continued or restarted run does not
compute it again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace

import torch
from torch import nn

import colrow
from colrow.config import RunConfig
from colrow.data.disk import atomic_write, read_kept
from colrow.errors import ConfigError, first_line
from colrow.forecasting.choices import options_of
from colrow.forecasting.devices import Device, device_named, name_of
from colrow.forecasting.forecast import Forecaster, Options
from colrow.forecasting.memory import GIB
from colrow.plans.plan import Plan
from colrow.run.progress import labelled
from colrow.train.cuda_graph import can_be_captured

FILE = "forecast.json"
Gpus = tuple[Device, int] | str | None
"""What `gpus_here` found."""


@dataclass(frozen=True)
class Forecast:
    """What a run should see.

    Attributes:
        key: digest of what it depends on.
        band: half of the band around tokens/s, as a share.
        fits: with the allocator's reserve and 3% of the device left.
        cannot_fit: not even without the reserve, and if the forecast is 3% too high.
        fix: where it does not fit, the nearest setting that does, as keys to set.
    """

    key: str
    tokens_per_second_per_gpu: float
    band: float
    allocated_gib: float
    device_gib: float
    limit_gib: float
    parts_ms: Mapping[str, float]
    bottleneck: str
    fits: bool = True
    cannot_fit: bool = False
    fix: str = ""

    def lines(self, config: RunConfig) -> list[str]:
        """What to print.

        Raises:
            ConfigError: with `forecast: stop`, a rank cannot fit.
        """
        memory, rate = f"{self.device_gib:.3g} GiB of {self.limit_gib:.3g}", self.tokens_per_second_per_gpu
        line = labelled("forecast", f"{memory}, {rate:,.0f} ± {rate * self.band:,.0f} tokens/s per GPU")
        if self.fits:
            return [line]
        if not self.cannot_fit:
            return [line, labelled("warning", f"forecast: little memory is left: if it runs out, {self.fix}")]
        text = f"forecast: a rank needs {memory}: {self.fix}; `colrow forecast` compares meshes"
        if config.forecast == "stop":
            raise ConfigError(f"{text}; forecast: warn starts all the same")
        return [labelled("warning", text)]


def forecast_run(config: RunConfig, model: nn.Module, plan: Plan, gpus: Gpus) -> tuple[Forecast | None, list[str]]:
    """The forecast of the run on these GPUs, the one in its folder where that is of the same run, and what to print.

    Raises:
        ConfigError: with `forecast: stop`, a rank cannot fit; the text names the nearest setting that does.
    """
    if gpus is None or isinstance(gpus, str):
        return None, [labelled("forecast", f"none: no rates are known of {gpus}")] * (gpus is not None)
    found = kept_forecast(config, model, plan, gpus)
    if found is None:
        try:
            found = forecast_on(*gpus, config, model, plan)
        except Exception as error:  # a model that cannot be walked must not keep a run from starting
            return None, [labelled("forecast", f"none: {first_line(error)}")]
    return found, found.lines(config)


def keep_forecast(config: RunConfig, forecast: Forecast | None) -> None:
    """Write it into the run's folder, which exists."""
    if forecast is not None:
        atomic_write(config.run.dir / FILE, json.dumps(asdict(forecast), indent=1) + "\n")


def gpus_here(config: RunConfig) -> Gpus:
    """This host's GPUs, and their number; the name of those without rates; None where nothing is forecast.

    Reads properties of the driver: a context on a GPU would take half a GiB of it for as long as the launcher lives.
    """
    if config.forecast == "off" or config.device == "cpu" or not torch.cuda.is_available():
        return None
    found = torch.cuda.get_device_properties(0)
    known = name_of(found.name)
    if known is None:
        return str(found.name)
    return replace(device_named(known), memory=float(found.total_memory)), torch.cuda.device_count()


def kept_forecast(config: RunConfig, model: nn.Module, plan: Plan, gpus: Gpus) -> Forecast | None:
    """The forecast in the run's folder, where it is one of this run on these GPUs."""
    return forecast_reader(config, model, plan, gpus)()


def forecast_reader(config: RunConfig, model: nn.Module, plan: Plan, gpus: Gpus) -> Callable[[], Forecast | None]:
    """`kept_forecast`, to be called later: the launcher forecasts while its ranks set up, which changes the model."""
    if gpus is None or isinstance(gpus, str):
        return lambda: None
    key, file = _key(*gpus, config, model, plan), config.run.dir / FILE

    def read() -> Forecast | None:
        kept = read_kept(file, Forecast)
        return kept if kept is not None and kept.key == key else None

    return read


def forecast_on(device: Device, per_host: int, config: RunConfig, model: nn.Module, plan: Plan) -> Forecast:
    """The forecast of the run on given GPUs, `per_host` of them on a host. Raises as `Forecaster.row` does."""
    forecaster, options = Forecaster(model, device, per_host), options_of(config)
    row = forecaster.row(plan, config.mesh, options)
    if config.train.cuda_graph == "auto" and row.time.parts["cpu"] > 0 and can_be_captured(config, "cuda"):
        replayed = forecaster.row(plan, config.mesh, replace(options, cuda_graph=True))
        # the time of replayed steps, the memory of eager ones: the first steps are eager, and set the peak
        row = replace(row, time=replayed.time, tokens_per_second_per_gpu=replayed.tokens_per_second_per_gpu)
    fix = ""
    if not row.fits:
        smaller = (words for words, other in _smaller(options) if forecaster.row(plan, config.mesh, other).fits)
        fix = f"use {next(smaller, 'more GPUs, shorter sequences, or a smaller model')}"
    return Forecast(
        key=_key(device, per_host, config, model, plan),
        tokens_per_second_per_gpu=row.tokens_per_second_per_gpu,
        band=row.time.band / row.time.seconds,
        allocated_gib=row.memory.allocated / GIB,
        device_gib=row.memory.device / GIB,
        limit_gib=device.memory / GIB,
        parts_ms=row.parts_ms,
        bottleneck=row.bottleneck,
        fits=row.fits,
        cannot_fit=row.cannot_fit,
        fix=fix,
    )


def _key(device: Device, per_host: int, config: RunConfig, model: nn.Module, plan: Plan) -> str:
    params = [
        (name, tuple(p.shape), str(p.dtype), p.requires_grad)
        for name, p in model.named_parameters(remove_duplicate=False)
    ]
    of_model = (repr(model), repr(getattr(model, "config", None)), params)
    run = (repr(options_of(config)), config.train.cuda_graph, repr(config.mesh), plan.to_yaml(), repr(device), per_host)
    return hashlib.sha256(repr((colrow.__version__, torch.__version__, of_model, run)).encode()).hexdigest()


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
        # halves only: a half divides the global batch where the micro-batch did
        if size == 1 or size % 2:
            return
        size //= 2

"""The forecast of an arm, to stand beside what it took."""

from __future__ import annotations

from contextlib import suppress
from functools import cache
from typing import Any

from colrow.config import RunConfig
from colrow.errors import ConfigError, PlanError
from colrow.mesh import AXES
from colrow.models.build import build_source
from colrow.plans.derive_options import DERIVED
from colrow.run import preflight
from colrow.run.forecast_line import forecast_on, gpus_here


def forecast_data(config: RunConfig) -> dict[str, Any]:
    """Milliseconds of a step, GiB allocated, and milliseconds of exposed collectives; None without GPUs of known rates,
    and for plans that are derived, which takes longer than the measurement."""
    return _forecast_data(config.model_dump_json())


@cache
def _forecast_data(text: str) -> dict[str, Any]:
    """`forecast_data` of a config as JSON text, which can be a key: computed once for all rounds of an arm."""
    config = RunConfig.model_validate_json(text)
    gpus = gpus_here(config)
    row = None
    if config.plan not in DERIVED and gpus is not None and not isinstance(gpus, str):
        model = build_source(config.model, config.run.seed).model
        with suppress(ConfigError, PlanError):  # a measurement stands without a forecast
            row = forecast_on(*gpus, config, model, preflight.choose_plan(config, model))
    return {
        "forecast_ms": sum(row.parts_ms.values()) if row else None,
        "forecast_allocated_gib": row.allocated_gib if row else None,
        "forecast_exposed_ms": sum(row.parts_ms.get(axis, 0.0) for axis in AXES) if row else None,
    }

"""Where a model is split into pipeline stages, and what a schedule requires of a config. No process group is needed.

A split is written as the first layer of each stage after the first: (8, 16, 24) makes four stages. The embedding goes
with the first layer and the head with the last, so the balance counts their costs there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, partial
from itertools import accumulate, count
from math import inf
from typing import Any

import torch
from torch import nn

from colrow.config import RunConfig
from colrow.errors import ConfigError
from colrow.models.llama import LlamaConfig
from colrow.models.shapes import flops_per_token

# The embedding has no matmul. What it costs is its gradient, a dense [V, D] table for every micro-batch: written as
# zeros, filled, and added to the sum, about 12 bytes an element. An H100 does some 200 FLOP in the time of one byte.
_EMBEDDING_FLOP = 12 * 200


def first_layers(config: RunConfig, model: nn.Module) -> tuple[int, ...]:
    """The split of `config` for `split_stages`: as `pipeline.split` has it, else the balanced one; () without pp."""
    if config.mesh.pp == 1:
        return ()
    model_config: Any = model.config
    costs = layer_costs(model_config, config.data.seq_len, config.train.micro_batch)
    return config.pipeline.split or split_layers(costs, stage_count(config))


def layer_costs(config: LlamaConfig, seq_len: int, micro_batch_size: int) -> list[float]:
    """FLOPs for one token of each layer, forward and backward; the first counts the embedding too, the last the head.

    Args:
        seq_len: tokens in a sequence.
        micro_batch_size: sequences in a micro-batch.
    """
    table = config.vocab_size * config.hidden_size
    layers = flops_per_token(config, seq_len, causal=True) - 6 * table
    costs = [layers / config.num_hidden_layers] * config.num_hidden_layers
    costs[0] += _EMBEDDING_FLOP * table / (seq_len * micro_batch_size)
    costs[-1] += 6 * table
    return costs


def split_layers(costs: Sequence[float], stages: int) -> tuple[int, ...]:
    """The split into `stages` runs of layers whose most expensive run is cheapest: first layer of each later stage.

    Of such splits the evenest (least sum of squares), and of those the one with fewer layers at the front, where more
    micro-batches are in flight.

    Raises:
        ConfigError: there are more stages than layers.
    """
    layers = len(costs)
    if stages > layers:
        raise ConfigError(f"{stages} pipeline stages are more than the model's {layers} layers: use {layers} or fewer")
    before = [0.0, *accumulate(costs)]

    def run(first: int, end: int) -> float:
        """Cost of layers first..end as a share of all, rounded so that equal runs compare equal."""
        return round((before[end] - before[first]) / before[-1], 9)

    def ends(first: int, stages: int) -> range:
        return range(first + 1, layers - stages + 2)

    @cache
    def lowest_maximum(first: int, stages: int) -> float:
        if stages == 1:
            return run(first, layers)
        return min(max(run(first, end), lowest_maximum(end, stages - 1)) for end in ends(first, stages))

    limit = lowest_maximum(0, stages)  # the slowest stage sets the pace; the rest is evened out below it

    @cache
    def evenest(first: int, stages: int) -> tuple[float, tuple[int, ...]]:
        if stages == 1:
            return _square_within(run(first, layers), limit), ()
        rests = ((end, *evenest(end, stages - 1)) for end in ends(first, stages))
        return min(
            (round(_square_within(run(first, end), limit) + rest, 9), (end, *split)) for end, rest, split in rests
        )

    return evenest(0, stages)[1]


def _square_within(run: float, limit: float) -> float:
    return run * run if run <= limit else inf


def stage_count(config: RunConfig) -> int:
    """Pipeline stages over all ranks."""
    return config.mesh.pp * config.pipeline.stages_per_rank


def require_parts(model: nn.Module) -> nn.ModuleList:
    """The model's layers. Raises ConfigError when the model does not run without some of its parts."""
    layers = getattr(model, "layers", None)
    if not isinstance(layers, nn.ModuleList) or not hasattr(model, "embed_tokens"):
        raise ConfigError(
            f"a pipeline needs a model whose parts can be left out, with embed_tokens, layers, norm and lm_head, and "
            f"{type(model).__name__} is none: use model.shape or model.implementation: colrow, or set mesh.pp to 1"
        )
    return layers


def check_pipeline(config: RunConfig, layers: int) -> None:
    """Raise ConfigError, with the fix, when the pipeline of this config cannot run on a model of `layers` layers."""
    _check(config, layers, partial(_working, config, layers))


def _check(config: RunConfig, layers: int, working: Callable[..., list[dict[str, Any]]]) -> None:
    """`check_pipeline`. `working` gives those of some changes that an error should offer."""
    pp, pipeline = config.mesh.pp, config.pipeline
    if pp == 1:
        return
    looped = pipeline.schedule in ("interleaved_1f1b", "zero_bubble")
    if pipeline.stages_per_rank > 1 and not looped:
        raise ConfigError(
            f"pipeline.schedule={pipeline.schedule} runs one stage on each rank, and stages_per_rank is "
            f"{pipeline.stages_per_rank}",
            *working({"pipeline.schedule": "interleaved_1f1b"}, {"pipeline.stages_per_rank": 1}),
        )
    if pipeline.stages_per_rank == 1 and pipeline.schedule == "interleaved_1f1b":
        raise ConfigError(
            "pipeline.schedule=interleaved_1f1b needs several stages on each rank",
            *working({"pipeline.stages_per_rank": 2}, {"pipeline.schedule": "1f1b"}),
        )
    _check_split(config, layers, working)
    _check_micro_batches(config)
    if pipeline.schedule == "zero_bubble":
        other = _ONE_STAGE if pipeline.stages_per_rank > 1 else {"pipeline.schedule": "1f1b"}
        if config.train.activation_checkpoint == "selective":
            raise ConfigError(
                "pipeline.schedule=zero_bubble runs backward in two parts, and what selective checkpointing keeps is "
                "gone after the first",
                {"train.activation_checkpoint": "full"},
                {"train.activation_checkpoint": "none"},
                other,
            )
        cuda = config.device == "cuda" or (config.device == "auto" and torch.cuda.is_available())
        if cuda if config.train.compile is None else config.train.compile:
            raise ConfigError(
                "pipeline.schedule=zero_bubble splits backward into two parts, which a compiled backward cannot be",
                {"train.compile": False},
                other,
            )


def fit_micro_batch(config: RunConfig) -> RunConfig:
    """`config` with the largest micro-batch of at most `train.micro_batch` that global batch, mesh and schedule allow.

    Raises:
        ConfigError: no micro-batch fits, whatever its size; the text names the nearest global batches that one fits.
    """
    if (size := _largest_fit(config, config.train.global_batch)) is not None:
        return config.model_copy(update={"train": config.train.model_copy(update={"micro_batch": size})})
    dp, pp, batch = config.mesh.dp, config.mesh.pp, config.train.global_batch
    over = f"{dp} data-parallel ranks" + (f" and pp={pp} with schedule {config.pipeline.schedule}" if pp > 1 else "")
    shares = range((batch - 1) // dp, 0, -1), count(batch // dp + 1)
    found = [next((n * dp for n in each if _largest_fit(config, n * dp)), None) for each in shares]
    near = [n for n in found if n is not None]
    fixes = [{"train.global_batch": n} for n in near]
    raise ConfigError(f"train.global_batch={batch} cannot be split over {over}", *fixes)


def _largest_fit(config: RunConfig, global_batch: int) -> int | None:
    share, rest = divmod(global_batch, config.mesh.dp)
    pp, schedule = config.mesh.pp, config.pipeline.schedule
    most = share if schedule == "gpipe" else share // pp  # of a pipeline each stage needs a micro-batch
    sizes = [] if rest else range(min(config.train.micro_batch, most), 0, -1)
    fits = (n for n in sizes if share % n == 0 and (pp == 1 or _runs(schedule, pp, share // n)))
    return next(fits, None)


_ONE_STAGE = {"pipeline.schedule": "1f1b", "pipeline.stages_per_rank": 1}


def _working(config: RunConfig, layers: int, *changes: dict[str, Any]) -> list[dict[str, Any]]:
    """Which of the changes make the pipeline run, each tried; where none does, the first of larger ones that does, and
    where something else is wrong too, the first."""
    larger: list[dict[str, Any]] = [_ONE_STAGE, {**_ONE_STAGE, "pipeline.split": None}]
    larger += [{**change, "mesh.pp": n} for n in range(config.mesh.pp - 1, 0, -1) for change in ({}, *larger)]
    working = [change for change in changes if _runs_with(config, layers, change)]
    working = working or [change for change in larger if _runs_with(config, layers, change)][:1]
    return working or [*changes, {"mesh.pp": 1}][:1]


def _runs_with(config: RunConfig, layers: int, change: dict[str, Any]) -> bool:
    try:
        _check(fit_micro_batch(config.with_values(change)), layers, lambda *changes: [])
    except ConfigError:
        return False
    return True


def _check_split(config: RunConfig, layers: int, working: Callable[..., list[dict[str, Any]]]) -> None:
    pp, per_rank, stages = config.mesh.pp, config.pipeline.stages_per_rank, stage_count(config)
    if stages > layers:
        fixes = working(*({"mesh.pp": n} for n in range(min(pp, layers // per_rank), 1, -1)))
        raise ConfigError(
            f"mesh.pp={pp}{f' × stages_per_rank={per_rank}' if per_rank > 1 else ''} makes {stages} pipeline stages, "
            f"more than the model's {layers} layers",
            *fixes,
        )
    split = config.pipeline.split
    if split is None:
        return
    balanced = [{"pipeline.split": value} for value in (list(split_layers([1.0] * layers, stages)), None)]
    if len(split) != stages - 1:
        raise ConfigError(
            f"pipeline.split={list(split)} makes {len(split) + 1} stages, and pp={pp} × stages_per_rank={per_rank} "
            f"needs {stages} (give {stages - 1} first layers)",
            *balanced,
        )
    ascending = all(a < b for a, b in zip((0, *split), (*split, layers), strict=True))
    if not ascending:
        raise ConfigError(
            f"pipeline.split={list(split)} does not rise within 1..{layers - 1}: each entry is the first layer of a "
            "stage after the first",
            *balanced,
        )


def _check_micro_batches(config: RunConfig) -> None:
    pp, schedule, train = config.mesh.pp, config.pipeline.schedule, config.train
    count = config.micro_batches
    if _runs(schedule, pp, count):
        return
    unit = config.mesh.dp * train.micro_batch
    near = [n for n in range(max(1, count - pp), count + 2 * pp + 1) if _runs(schedule, pp, n)]
    above = next(n for n in near if n > count)
    below = [n for n in near if n < count]
    needs = f"at least {pp}" if schedule == "1f1b" else "complete rounds of at least pp"
    raise ConfigError(
        f"pipeline.schedule={schedule} over pp={pp} needs {needs} micro-batches, and global_batch={train.global_batch} "
        f"with dp={config.mesh.dp} and micro_batch={train.micro_batch} makes {count}",
        *({"train.global_batch": n * unit} for n in (*below[-1:], above)),
        {"pipeline.schedule": "gpipe"},
    )


def _runs(schedule: str, pp: int, count: int) -> bool:
    if schedule == "gpipe":
        return True
    # torch's schedules of several stages run count // pp rounds, all of one length
    return count >= pp and (schedule == "1f1b" or count % (count // pp) == 0)

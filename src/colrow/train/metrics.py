"""A run's metrics: metrics.jsonl always, TensorBoard and Weights & Biases when configured.

metrics.jsonl has one object for each step, counted from 1: `step`, `loss`, `grad_norm`, `lr`, `tokens` (since the
run's start), `tokens_per_second` (over all ranks), on GPUs `memory_gib` (allocator's peak of a rank), `mfu_causal` and
`mfu_full`; the steps that are evaluated also have `val_loss` and `perplexity`. Each auxiliary loss stands by its name,
unweighted: `loss` holds them weighted, `val_loss` is the cross entropy alone. With `train.on_nonfinite: skip` each has
`skipped`, the number of steps skipped so far. A skipped step has `position`, the sequences before its batch; a step
that jumps has it too, and `jump`, a text of what jumped.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

from colrow.config import RunConfig
from colrow.config_sections import LogSection
from colrow.data.disk import atomic_write, writing
from colrow.errors import ConfigError
from colrow.yaml_text import refuse_endless

Record = dict[str, Any]
FILE = "metrics.jsonl"


def perplexity(loss: float) -> float:
    """exp(loss); inf where that overflows."""
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf


class Sink(Protocol):
    """Takes the record of each step."""

    def write(self, record: Record) -> None: ...

    def close(self) -> None: ...


class Metrics:
    """Hands each record to metrics.jsonl and to the sinks that the config asks for.

    Args:
        step: the last step that counts. Records of later ones are removed: they will be run again.
    """

    def __init__(self, config: RunConfig, step: int) -> None:
        self.path = config.run.dir / FILE
        truncate(self.path, step)
        self._file = self.path.open("a", encoding="utf-8")
        self._sinks = open_sinks(config, step)

    def write(self, record: Record) -> None:
        """Add one record; it is in the file when this returns."""
        with writing(self.path):
            self._file.write(json.dumps(record) + "\n")
            self._file.flush()
        for sink in self._sinks:
            sink.write(record)

    def sync(self) -> None:
        """Have the records on the disk, before a checkpoint is that makes them the only ones of their steps."""
        with writing(self.path):
            os.fsync(self._file.fileno())

    def close(self) -> None:
        with writing(self.path):
            self._file.close()
        for sink in self._sinks:
            sink.close()

    def __enter__(self) -> Metrics:
        return self

    def __exit__(self, cls: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()


def read_metrics(path: Path) -> list[Record]:
    """The records of a metrics.jsonl, in order; empty when there is none. Lines that are none are left out: a last one
    that was torn, or damaged ones."""
    if not path.exists():
        return []
    refuse_endless(path, ConfigError)
    records = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(record, dict) and _is_step(record.get("step")):
            records.append(record)
    return records


def _is_step(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def truncate(path: Path, step: int, also: Callable[[Record], bool] = lambda _: False) -> None:
    """Keep the records up to `step`, and those that `also` names, in place of a run's file whose later steps no
    checkpoint holds."""
    kept = [record for record in read_metrics(path) if record["step"] <= step or also(record)]
    atomic_write(path, "".join(json.dumps(record) + "\n" for record in kept))


def require_sinks(section: LogSection) -> None:
    """Raise a ConfigError, with what to install, for a configured sink whose package is missing."""
    for wanted, module, extra in (
        (section.tensorboard, "tensorboard", "tensorboard"),
        (section.wandb, "wandb", "wandb"),
    ):
        if wanted and importlib.util.find_spec(module) is None:
            raise ConfigError(
                f"log.{extra}: true needs the package {module}, which is not installed: "
                f"pip install 'colrow[{extra}]', or set log.{extra} to false"
            )


def open_sinks(config: RunConfig, step: int) -> list[Sink]:
    """The sinks that the config asks for, going on after `step`."""
    require_sinks(config.log)
    sinks: list[Sink] = []
    if config.log.tensorboard:
        sinks.append(_TensorBoard(config.run.dir / "tensorboard", step))
    if config.log.wandb:
        sinks.append(_Wandb(config))
    return sinks


class _TensorBoard:
    def __init__(self, folder: Path, step: int) -> None:
        from torch.utils.tensorboard.writer import SummaryWriter

        self._writer = SummaryWriter(str(folder), purge_step=step + 1)

    def write(self, record: Record) -> None:
        for key, value in record.items():
            if key != "step":
                self._writer.add_scalar(key, value, record["step"])

    def close(self) -> None:
        self._writer.close()


class _Wandb:
    """A run of Weights & Biases that a resumed run continues: its id stands in the run's folder."""

    def __init__(self, config: RunConfig) -> None:
        import wandb

        id_file = config.run.dir / "wandb.id"
        if not id_file.exists():
            atomic_write(id_file, wandb.util.generate_id())  # half an id would be another run's
        self._run = wandb.init(
            project=config.log.wandb_project,
            name=config.run.dir.name,
            id=id_file.read_text(encoding="ascii"),
            resume="allow",
            dir=str(config.run.dir),
            config=config.model_dump(mode="json"),
        )

    def write(self, record: Record) -> None:
        self._run.log({key: value for key, value in record.items() if key != "step"}, step=record["step"])

    def close(self) -> None:
        self._run.finish()

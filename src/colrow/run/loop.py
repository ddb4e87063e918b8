"""The training loop: steps, evaluations, checkpoints, metrics, and the ends that a run can come to."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from colrow.checkpoint.distributed import Checkpoints
from colrow.config import RunConfig
from colrow.data.loader import BatchOrder, DataAxisSampler, Loader
from colrow.data.prepare import PreparedData
from colrow.forecasting.devices import peak_flops
from colrow.forecasting.memory import GIB
from colrow.mesh import MeshAxes
from colrow.models.shapes import mfu
from colrow.run import startup
from colrow.run.batch_check import check_same_batch
from colrow.run.executed import executed_paths, steps_until_known
from colrow.run.forecast_line import Forecast
from colrow.run.hang import TRAINING
from colrow.run.heartbeat import Heartbeat, compilations
from colrow.run.nonfinite import NonfiniteSteps
from colrow.run.pace import Pace
from colrow.run.progress import TrainingProgress, labelled
from colrow.run.resume import ResumePoint
from colrow.train.evaluate import Evaluation
from colrow.train.metrics import Metrics, Record, perplexity
from colrow.train.schedule import learning_rate
from colrow.train.setup import Training


@dataclass
class Outcome:
    """How the loop ended."""

    step: int
    """Steps that are done."""
    saved: int
    """The step of the newest checkpoint; 0 when there is none."""
    stopped: bool
    """Whether a signal ended it before the last step."""
    val_loss: float | None = None
    skipped: int = 0
    """Steps of the run that were not finite and left out."""
    jumped: int = 0
    """Steps since this start whose loss or gradient norm jumped."""


@dataclass
class _Pending:
    """A step whose results the device may still be computing."""

    step: int
    sequences: int
    """Consumed since the run's start, this step's included."""
    stats: Tensor
    """[loss over all ranks, gradient norm, number of ranks that ask to stop, auxiliary losses over all ranks], fp64."""
    start: DeviceTimestamp
    end: DeviceTimestamp


class DeviceTimestamp:
    """A point of the device's own timeline, so that a step's time is right however late the host reads it."""

    def __init__(self, device: torch.device) -> None:
        self._event = torch.cuda.Event(enable_timing=True) if device.type == "cuda" else None
        self._time = time.perf_counter()
        if self._event is not None:
            self._event.record()

    def wait(self) -> float:
        """Block the host until the device has reached this point. Returns the seconds that it blocked."""
        start = time.perf_counter()
        if self._event is not None:
            self._event.synchronize()
        return time.perf_counter() - start

    def seconds_since(self, earlier: DeviceTimestamp) -> float:
        """The device must have reached both points."""
        # At least a nanosecond: tokens per second divide by it, and two readings of a coarse clock may be equal.
        if self._event is None or earlier._event is None:
            return max(self._time - earlier._time, 1e-9)
        return max(earlier._event.elapsed_time(self._event) / 1e3, 1e-9)


@dataclass(frozen=True)
class Watchers:
    """Who looks at a run on this rank, and who asks it to stop.

    Attributes:
        progress: prints lines, on the first rank.
        stop_requested: called once a step on each rank; when any rank returns True, all stop.
        heartbeat: gets what this rank does, for those who watch whether it hangs.
        forecast: reads what the run should see, on the rank that prints.
    """

    progress: TrainingProgress
    stop_requested: Callable[[], bool] = lambda: False
    heartbeat: Heartbeat = field(default_factory=Heartbeat)
    forecast: Callable[[], Forecast | None] = lambda: None


class Loop:
    """Runs a `Training` from where it stands to the last step.

    On GPUs the results of a step are read while the next one runs, so that the host never waits for the device; on
    CPUs they are read at once. All ranks read the same sums, so all decide alike: to stop, or that the run diverged.
    """

    def __init__(
        self, config: RunConfig, training: Training, data: PreparedData, checkpoints: Checkpoints, watchers: Watchers
    ) -> None:
        self._config, self._training, self._checkpoints, self._data = config, training, checkpoints, data
        self._progress, self._heartbeat = watchers.progress, watchers.heartbeat
        self._stop_requested = watchers.stop_requested
        axes, self._device = MeshAxes(training.mesh), training.device
        self._loss_weight = axes.loss_weight
        order = BatchOrder(data.train.windows(config.data.seq_len), config.train.global_batch, config.run.seed)
        sampler = DataAxisSampler(order, axes.data_rank, config.mesh.dp, config.train.micro_batch)
        self._loader = Loader(data.train, config.data.seq_len, sampler, self._device)
        self._evaluation = Evaluation(config, data, axes.data_rank, self._loss_weight, self._device)
        self._same_batch_groups = axes.same_batch_groups()
        if training.step.corruption:
            training.step.corruption.report_to(self._progress.say)
        self._lag = 1 if self._device.type == "cuda" else 0  # steps whose results are not read yet
        self._pending: list[_Pending] = []
        self._last: Record | None = None
        self._step_end = DeviceTimestamp(self._device)
        self._pace = Pace(config, steps_until_known(training), watchers.forecast, self._progress.say)

    def run(self, at: ResumePoint, metrics: Metrics | None) -> Outcome:
        """Train from `at` to the last step, a signal, or an error. Collective.

        Args:
            metrics: on the first rank; None on the others.

        Raises:
            DivergedError: the loss or the gradient's norm is not finite, and such steps are not skipped, or too many in
                a row were; nothing of them has been saved.
        """
        config, start, sequences = self._config, at.step, at.sequences
        self._metrics = metrics
        self._nonfinite = NonfiniteSteps(config, self._checkpoints, at.skipped, metrics is not None, self._progress.say)
        self._nonfinite.go_on_after(start)
        self._step_end = DeviceTimestamp(self._device)
        # the second step, or the first after compilation and capture: there what a user waits for is over
        self._known_at = start + max(2, steps_until_known(self._training))
        saved, val_loss, stop = start, None, False
        self._progress.start(start)
        for step in range(start, config.train.steps):
            done = step + 1
            self._heartbeat.enter("capture" if self._captures(step - start) else TRAINING)
            batches = list(self._loader.batches(sequences))
            sequences += config.train.global_batch
            if self._checks_batches(step, start):
                check_same_batch(batches, self._same_batch_groups, step)
            with compilations(self._heartbeat), self._pace.tracing():
                loss, norm = self._training.step(step, batches)
            if step == start and (untrained := self._training.step.forward_backward.untrained):
                self._progress.say(untrained_line(untrained))
            stats, start_of_step = self._step_stats(loss, norm), self._step_end
            self._step_end = DeviceTimestamp(self._device)
            # Not read yet: on a GPU the device still runs the step, and the host goes on to queue the next one.
            self._pending.append(_Pending(done, sequences, stats, start_of_step, self._step_end))
            if done == start + steps_until_known(self._training):
                self._progress.say(labelled("ran", executed_paths(self._training, config.data.seq_len)))
            evaluates = self._evaluates(done)
            saves = self._saves(done)
            lag = 0 if evaluates or saves else self._lag  # both need this step's record
            stop = self._flush_pending(lag, hold_last=evaluates) or stop
            if evaluates:
                with self._heartbeat.during("evaluation"):
                    val_loss = self._evaluate()
            if saves or stop:
                stop = self._flush_pending(0) or stop
                with self._heartbeat.during("saving"):
                    self._save(ResumePoint(done, sequences, self._nonfinite.skipped))
                saved = done
            self._heartbeat.beat(done)
            if stop:
                break
        self._flush_pending(0)
        with self._heartbeat.during("saving"):
            self._checkpoints.wait()
        done = self._last["step"] if self._last else start
        return Outcome(
            done, saved, done < config.train.steps, val_loss, self._nonfinite.skipped, self._nonfinite.jumped
        )

    def close(self) -> None:
        """End the background readers."""
        self._loader.close()
        self._evaluation.close()

    def _evaluates(self, done: int) -> bool:
        every = self._config.eval.every
        return every > 0 and (done % every == 0 or done == self._config.train.steps)

    def _saves(self, done: int) -> bool:
        every, last = self._config.checkpoint.every, self._config.checkpoint.last
        if done == self._config.train.steps:
            return last
        return every > 0 and done % every == 0

    def _captures(self, steps: int) -> bool:
        """Whether CUDA graphs are not all captured after so many steps of this start."""
        return bool(self._training.graphs) and steps < steps_until_known(self._training)

    def _checks_batches(self, step: int, start: int) -> bool:
        every = self._config.train.check_batch_every
        return bool(self._same_batch_groups) and (step == start or (every > 0 and step % every == 0))

    def _step_stats(self, loss: Tensor, norm: Tensor) -> Tensor:
        """[loss over all ranks, norm, how many ranks ask to stop, auxiliary losses over all ranks], on the device; one
        small all-reduce."""
        # A signal reaches ranks at different steps: one that stopped alone would leave the others in a collective.
        wants_stop = torch.full((), float(self._stop_requested()), device=self._device, dtype=torch.float64)
        losses = [loss, *self._training.step.forward_backward.auxiliary.values()]
        summed = torch.stack([*(each.double() * self._loss_weight for each in losses), wants_stop])
        dist.all_reduce(summed)
        stats = torch.stack([summed[0], norm.detach().double(), summed[-1], *summed[1:-1]])
        if self._device.type == "cuda":
            host = torch.empty(len(stats), dtype=torch.float64, pin_memory=True)  # pageable memory would block the host
            host.copy_(stats, non_blocking=True)  # complete when the step's end timestamp is
            return host
        return stats

    def _flush_pending(self, lag: int, hold_last: bool = False) -> bool:
        """Read and record the results of all pending steps but the last `lag`. Returns whether a rank asked to stop.

        Args:
            hold_last: do not write the last step's record, to which an evaluation will be added.
        """
        stop = False
        for _ in range(len(self._pending) - lag):
            pending = self._pending.pop(0)
            waited = pending.end.wait()
            loss, norm, stops, *auxiliary = pending.stats.tolist()
            seconds = pending.end.seconds_since(pending.start)
            record = self._record(pending, loss, norm, seconds)
            for name, value in zip(self._training.source.auxiliary, auxiliary, strict=True):
                record[f"auxiliary_{name}" if name in record else name] = value  # a model may call its own one `loss`
            record = self._nonfinite.examine(record, pending.sequences - self._config.train.global_batch)
            stop = stop or stops > 0
            if self._device.type == "cuda":
                self._pace.add(seconds, waited if lag else None, record["memory_gib"])
            self._last = record
            if hold_last and not self._pending:  # `_evaluate` writes it, with the validation loss
                continue
            self._write(record)
        return stop

    def _record(self, pending: _Pending, loss: float, norm: float, seconds: float) -> Record:
        """A step's line of metrics.jsonl: figures and rate, on GPUs memory and MFU too."""
        config = self._config
        rate = config.tokens_per_step / seconds
        record: dict[str, Any] = {
            "step": pending.step,
            "loss": loss,
            "grad_norm": norm,
            "lr": learning_rate(pending.step - 1, config.train),
            "tokens": pending.sequences * config.data.seq_len,
            "tokens_per_second": round(rate, 1),
        }
        if self._device.type == "cuda":
            record["memory_gib"] = round(torch.cuda.max_memory_allocated(self._device) / GIB, 3)
            peak, shape = peak_flops(torch.cuda.get_device_name(self._device)), self._training.source.config
            if peak is not None and shape is not None:
                shares = mfu(shape, config.data.seq_len, rate / config.mesh.world_size, peak)
                record |= {name: round(share, 4) for name, share in shares.items()}
        return record

    def _evaluate(self) -> float:
        """Evaluate, and write the step's record with the result."""
        assert self._last is not None
        val_loss = self._evaluation(self._training.step.forward_backward, self._training.modules)
        if not math.isfinite(val_loss):
            raise self._nonfinite.diverged({**self._last, "loss": val_loss})
        self._write({**self._last, "val_loss": val_loss, "perplexity": perplexity(val_loss)})
        self._step_end = DeviceTimestamp(self._device)  # the next step's rate leaves this time out
        return val_loss

    def _write(self, record: Record) -> None:
        if self._metrics is not None:
            if record["step"] >= self._known_at and (text := startup.finish(self._config.run.dir)):
                self._progress.say(labelled("started", text))
            self._metrics.write(record)
        self._progress.step(record)

    def _save(self, at: ResumePoint) -> None:
        extra = at.to_json(self._config, self._data)
        if corruption := self._training.step.corruption:
            corruption.before_save(at.step)
        if self._metrics is not None:
            self._metrics.sync()
        start = time.perf_counter()
        self._checkpoints.save(at.step, self._training.modules, self._training.optimizer, extra)
        waited = time.perf_counter() - start
        self._step_end = DeviceTimestamp(self._device)
        background = ", the rest is in the background" if self._config.checkpoint.asynchronous else ""
        self._progress.say(f"            saved step-{at.step}, training waited {waited:.1f} s{background}")


def untrained_line(names: Sequence[str]) -> str:
    """What to print of losses that a model returns and a run does not train."""
    first = names[0]
    return (
        f"warning    the model returns {', '.join(names)} beside its logits, not trained:\n"
        f"           set train.auxiliary_losses to weights, such as {{{first}: 0.01}}"
    )

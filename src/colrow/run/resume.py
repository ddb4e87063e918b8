"""Continuing a run from the newest complete checkpoint of its folder.

[Note: position]
A checkpoint stores its position in the data: the number of sequences that the run has consumed. With the seed it
decides every batch that follows, so a run goes on with the next sequence whatever its global batch was and is now.
Checkpoints of versions that stored none stand at their step × the global batch of the config that trained them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch.distributed as dist

from colrow.checkpoint.distributed import Checkpoints
from colrow.checkpoint.manifest import JSON
from colrow.config import RunConfig, load_config
from colrow.data.prepare import PreparedData
from colrow.errors import ConfigError
from colrow.run.preflight import require_same_text
from colrow.run.run_folder import CONFIG
from colrow.train.metrics import FILE, read_metrics
from colrow.train.setup import Training


@dataclass(frozen=True)
class ResumePoint:
    """Where a run stands."""

    step: int = 0
    """Optimizer steps that are done."""
    sequences: int = 0
    """Sequences of `data.seq_len` tokens consumed since the run's start, over all ranks: see [Note: position]."""
    skipped: int = 0
    """Steps among `step` that were not finite and changed nothing (`train.on_nonfinite: skip`)."""

    def to_json(self, config: RunConfig, data: PreparedData) -> dict[str, JSON]:
        """What a checkpoint stores beside the model and the optimizer."""
        return {
            "step": self.step,
            "corpus": data.fingerprint,
            "seed": config.run.seed,
            "sequences": self.sequences,
            "tokens": self.sequences * config.data.seq_len,
            "epochs": self.epochs(config, data),
            "skipped": self.skipped,
        }

    def epochs(self, config: RunConfig, data: PreparedData) -> float:
        """How often the training text has been read."""
        return self.sequences / data.train.windows(config.data.seq_len)

    def line(self, config: RunConfig, data: PreparedData) -> str:
        """The text that a continued run prints."""
        tokens = self.sequences * config.data.seq_len
        return (
            f"after step {self.step}: {self.sequences:,} sequences, {tokens:,} tokens, "
            f"{self.epochs(config, data):.2f} epochs"
        )


def resume(config: RunConfig, training: Training, data: PreparedData, checkpoints: Checkpoints) -> ResumePoint:
    """Load the newest complete checkpoint of the run's folder, if there is one. Collective. Returns where it stands.

    Raises:
        CheckpointError: it is of another model or vocabulary.
        DataError: the corpus has changed since it was saved.
        ConfigError: the seed or the sequence length has.
    """
    found: list[ResumePoint | None] = [None]
    if dist.get_rank() == 0:
        latest = checkpoints.latest()
        # before the load: this rank alone may read the folder's config, which it writes again when all have loaded
        found = [None if latest is None else ResumePoint(latest.step, _sequences_of_older(latest.step, config))]
    dist.broadcast_object_list(found, src=0)
    older = found[0]
    if older is None:
        return ResumePoint()
    # The config owns the options: weight decay or betas that changed take effect (resume_rules.py).
    extra = checkpoints.load(older.step, training.modules, training.optimizer, keep_options=True)
    require_same_text(config, extra, data.fingerprint)
    sequences, skipped = extra.get("sequences", older.sequences), extra.get("skipped", 0)
    assert isinstance(sequences, int)
    assert isinstance(skipped, int)
    at = ResumePoint(older.step, sequences, skipped)
    _require_same_order(extra, at, config)
    return at


def _require_same_order(extra: Mapping[str, JSON], at: ResumePoint, config: RunConfig) -> None:
    """Raise a ConfigError where seed or sequence length are not the checkpoint's: its position would mean other text.

    A start compares them with the folder's config.yaml (resume_rules.py), but that file may be gone.
    """
    tokens = at.sequences * config.data.seq_len
    for key, stored, now in (("run.seed", "seed", config.run.seed), ("data.seq_len", "tokens", tokens)):
        if extra.get(stored, now) != now:
            raise ConfigError(
                f"{key} is not that of the checkpoints in {config.run.dir}, so the text would come in another order: "
                f"restore it, or set run.dir to another folder to start a new run"
            )


def _sequences_of_older(step: int, config: RunConfig) -> int:
    """The position of a checkpoint that stores none.

    The step's own record says it (its tokens were counted so). The folder's config alone would not do: a start with
    another global batch that ended before its first checkpoint has left that config there.
    """
    for record in read_metrics(config.run.dir / FILE):
        if record["step"] == step and isinstance(tokens := record.get("tokens"), int):
            return tokens // config.data.seq_len
    previous = config.run.dir / CONFIG
    return step * (load_config(previous) if previous.exists() else config).train.global_batch

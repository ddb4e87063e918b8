"""What RUN_OR_EXPORT names: a model, its stored weights and its tokenizer; and the ranks that share them."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import nn

from colrow.checkpoint.carried import Carried
from colrow.checkpoint.distributed import Checkpoints
from colrow.checkpoint.huggingface import load_weights
from colrow.cli.ranks import world_size_here
from colrow.config import load_config
from colrow.config_sections import DeriveSection, ModelSection
from colrow.data.tokenizer import Tokenizer, load_tokenizer
from colrow.dryrun.calls import most_positions
from colrow.errors import CheckpointError, ConfigError
from colrow.models.build import Source, build_source
from colrow.models.llama import LlamaConfig
from colrow.plans.derive_options import DERIVED, DeriveOptions
from colrow.plans.named import named_plan
from colrow.plans.plan import Plan
from colrow.plans.presets import PRESETS
from colrow.run.run_folder import CHECKPOINTS, CONFIG, PLAN, TOKENIZER
from colrow.run.trust import require_trusted


@dataclass(frozen=True)
class SavedModel:
    """A model without values, and where they are.

    Args:
        context: tokens of the sequences that it was trained on.
        carried: what an export of it takes over.
        checkpoints, step, planned: for a run, the last as its config names the plan; for an export, `folder` holds the
            weights.
        dtype: of exports, as the run's config requests it.
    """

    source: Source
    tokenizer: Tokenizer
    context: int | None
    folder: Path
    carried: Carried
    checkpoints: Checkpoints | None = None
    step: int | None = None
    planned: str | None = None
    requests: DeriveSection = field(default_factory=DeriveSection)
    dtype: str | None = None

    @property
    def model(self) -> nn.Module:
        """On the meta device, unless the run built it in Python."""
        return self.source.model

    def plan(self, tp: int) -> Plan:
        """The plan that shares the model between `tp` ranks, with all logits on each rank.

        A run's own, chosen again for this degree; where it is a file whose head computes the loss and no logits, and
        for an export of a model that no preset is made for, one that is derived.

        Raises:
            PlanError: no plan splits the model at this degree.
        """
        if self.planned is None:
            return Plan.preset("llama") if self.source.config is not None else _derived(self.model, tp)
        if self.planned in PRESETS or self.planned in DERIVED:
            return named_plan(self.planned, self.model, tp, "replicated", self.requests)
        plan = named_plan(self.planned, self.model, tp)
        return plan if plan.loss != "linear" else _derived(self.model, tp)

    @property
    def config(self) -> LlamaConfig | dict[str, Any]:
        """What config.json is made from.

        Raises:
            ConfigError: the model has no config of the Hugging Face kind.
        """
        if (config := self.source.exported_config) is not None:
            return config
        raise ConfigError(
            f"{type(self.model).__name__} has no config of the Hugging Face kind (a LlamaConfig, or one of "
            "transformers): give the model such an attribute `config`, or read the checkpoint with "
            "colrow.checkpoint.distributed.Checkpoints"
        )

    def load(self) -> None:
        """Load the weights into the model, which must have memory. Collective."""
        if self.checkpoints is None:
            load_weights(self.model, self.folder)
        else:
            assert self.step is not None
            self.checkpoints.load(self.step, self.model)


def open_saved(path: Path, step: int | None = None, trust_code: bool = False) -> SavedModel:
    """The model in a run's folder, at its newest complete checkpoint unless given a step, or in a Hugging Face folder.

    Raises:
        ConfigError: building the model would run code that the folder names, and `trust_code` is not set.
        CheckpointError: the folder is neither, or the run has no such checkpoint.
    """
    if (path / CONFIG).exists():
        return _run(path, step, trust_code)
    if not (path / "config.json").exists():
        raise CheckpointError(
            f"{path} is neither a run's folder ({CONFIG}) nor a Hugging Face folder (config.json): give one of them, "
            "such as runs/laptop"
        )
    if step is not None:
        raise CheckpointError(f"{path} is a Hugging Face folder and has no steps: leave --step out")
    source = build_source(ModelSection(huggingface=str(path), trust_code=trust_code), seed=0)
    tokenizer = load_tokenizer(path)
    carried = Carried.of(path, path, tokenizer, trust_code)
    return SavedModel(source, tokenizer, most_positions(source.model), path, carried)


def _run(path: Path, step: int | None, trust_code: bool) -> SavedModel:
    """The model of a run's folder."""
    config = load_config(path / CONFIG)
    require_trusted(config, path / CONFIG, trust_code)
    source = build_source(config.model, config.run.seed)
    if not (path / TOKENIZER).exists():
        raise CheckpointError(f"{path} holds no {TOKENIZER}: copy the run's tokenizer there")
    tokenizer = load_tokenizer(path / TOKENIZER)
    checkpoints = Checkpoints(path / CHECKPOINTS, vocabulary=tokenizer.digest)
    if step is None:
        newest = checkpoints.latest()
        if newest is None:
            command = shlex.join(["colrow", "checkpoints", str(path)])
            raise CheckpointError(f"{path} has no complete checkpoint: `{command}` lists what is there")
        step = newest.step
    planned = config.plan
    if planned not in (*PRESETS, *DERIVED, "huggingface") and not Path(planned).exists():
        planned = str(path / PLAN)  # the file that it was read from is gone: the run keeps what it resolved to
    carried = Carried.of(source.folder, config.data.tokenizer.path, tokenizer, config.model.trust_code)
    return SavedModel(
        source=source,
        tokenizer=tokenizer,
        context=config.data.seq_len,
        folder=path,
        carried=carried,
        checkpoints=checkpoints,
        step=step,
        planned=planned,
        requests=config.derive,
        dtype=config.export.dtype,
    )


def _derived(model: nn.Module, tp: int) -> Plan:
    return Plan.derive(model, tp, options=DeriveOptions(loss="replicated"))


@contextmanager
def torchrun_ranks(backend: str) -> Iterator[int]:
    """Join the default process group under torchrun. Yields the number of ranks, 1 without torchrun."""
    world_size = world_size_here()
    if world_size == 1:
        yield 1
        return
    dist.init_process_group(backend)
    yield world_size
    dist.destroy_process_group()  # not after an error: it would wait for ranks that are gone

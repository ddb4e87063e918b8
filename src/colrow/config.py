"""One tree of frozen models: every key of a run's YAML, which is also a flag.

What changes results has no hidden default; what changes speed has a good one.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import ModelWrapValidatorHandler, PrivateAttr, ValidationError, model_validator

from colrow.config_sections import (
    CheckpointSection,
    DataSection,
    DeriveSection,
    EvalSection,
    ExportSection,
    ForecastMode,
    FsdpSection,
    LogSection,
    ModelSection,
    PipelineSection,
    RunSection,
    SampleSection,
    Section,
    TrainSection,
)
from colrow.errors import ConfigError, did_you_mean
from colrow.mesh import Mesh, divisors
from colrow.yaml_text import read_text, read_yaml

_MOST_BYTES = 1 << 18
"""Most bytes of a config: PyYAML reads 1 MiB in a second or more."""

AUTO = "auto"
AUTO_KEYS = ("mesh", "train.micro_batch")
"""Keys whose value `auto` is replaced before a run starts, by what the forecast says is fastest."""


class RunConfig(Section):
    """One training run."""

    run: RunSection
    model: ModelSection
    data: DataSection
    mesh: Mesh = Mesh()
    """How the ranks are arranged, on each axis; `auto`: this host's GPUs and the data engine with its carriers, as the
    forecast says is fastest."""
    plan: str = "llama"
    """A preset's name, `huggingface`, `derive`, `derive-fast`, `derive-overlap`, or a file."""
    derive: DeriveSection = DeriveSection()
    loss: Literal["vocab_parallel", "replicated", "linear"] | None = None
    """How a preset or a derived plan computes the loss; vocab_parallel unless given."""
    check: bool = True
    """Stop before the ranks start where `colrow check` finds errors in the plan."""
    verify: Literal["auto", "always", "never"] = "auto"
    """Verify the plan on a reduced model before the ranks start, and start only if it is proved; auto: where the check
    leaves something unproven, or the model is not one of colrow's own."""
    forecast: ForecastMode = "stop"
    """On GPUs, print what a step will take and cost before the ranks start, and after twenty steps how far off that
    was; where a rank cannot fit, warn or stop."""
    train: TrainSection
    eval: EvalSection = EvalSection()
    checkpoint: CheckpointSection = CheckpointSection()
    export: ExportSection = ExportSection()
    pipeline: PipelineSection = PipelineSection()
    fsdp: FsdpSection = FsdpSection()
    log: LogSection = LogSection()
    sample: SampleSection = SampleSection()
    device: Literal["auto", "cpu", "cuda"] = "auto"
    _auto: frozenset[str] = PrivateAttr(default=frozenset())

    @model_validator(mode="wrap")
    @classmethod
    def _note_auto(cls, tree: Any, validate: ModelWrapValidatorHandler[RunConfig]) -> RunConfig:
        """Note the keys that say `auto`, and let the rest see one process and one sequence in their place."""
        # wrap, not before: what is noted must be put on the model that validation makes
        auto = set()
        if isinstance(tree, dict) and tree.get("mesh") == AUTO:
            auto.add("mesh")
            tree = {**tree, "mesh": {}}
        if isinstance(tree, dict) and isinstance(train := tree.get("train"), dict) and train.get("micro_batch") == AUTO:
            auto.add("train.micro_batch")
            tree = {**tree, "train": {**train, "micro_batch": 1}}
        config = validate(tree)
        config._auto = config._auto | auto
        return config

    @property
    def auto(self) -> frozenset[str]:
        """The keys of `AUTO_KEYS` that are still to be chosen: until then they have values that mean nothing."""
        return self._auto

    def with_chosen(self, mesh: Mesh, micro_batch: int, gather: str, exchange: str) -> RunConfig:
        """With these in the place of `auto`; what was given stays. The carriers belong to the mesh's data engine."""
        values: dict[str, Any] = {}
        if "train.micro_batch" in self.auto:
            values["train.micro_batch"] = micro_batch
        if "mesh" in self.auto:
            values |= {"mesh": mesh, "fsdp.gather": gather, "fsdp.exchange": exchange}
        chosen = self.with_values(values)
        chosen._auto = frozenset()
        return chosen

    def with_values(self, values: Mapping[str, Any]) -> RunConfig:
        """With these values, by dotted key. They are not validated."""
        changed = self
        for dotted, value in values.items():
            changed = _with_value(changed, dotted, value)
        return changed

    def require_chosen(self) -> None:
        """Raise a ConfigError where a key still says `auto`."""
        if self.auto:
            keys = " and ".join(f"{key}: {AUTO}" for key in AUTO_KEYS if key in self.auto)
            raise ConfigError(f"{keys} is for `colrow train` and `colrow forecast`: give a value here")

    @property
    def tokens_per_step(self) -> int:
        """Tokens of a global batch."""
        return self.train.global_batch * self.data.seq_len

    @property
    def micro_batches(self) -> int:
        """Micro-batches of each data-parallel rank in a step. Raises ConfigError as `micro_batch_count` does."""
        return micro_batch_count(self.train.global_batch, self.train.micro_batch, self.mesh.dp)


def _with_value(section: Any, dotted: str, value: Any) -> Any:
    """A copy of a config or section with one key changed."""
    name, _, key = dotted.partition(".")
    return section.model_copy(update={name: _with_value(getattr(section, name), key, value) if key else value})


def micro_batch_count(global_batch: int, micro_batch: int, dp: int) -> int:
    """Micro-batches that each of `dp` data-parallel ranks runs in a step.

    Raises:
        ConfigError: global_batch is no multiple of micro_batch × dp; it names the nearest values that fit.
    """
    unit = micro_batch * dp
    if global_batch % unit == 0:
        return global_batch // unit
    below = global_batch // unit * unit
    fixes: list[dict[str, Any]] = [{"train.global_batch": n} for n in (below, below + unit) if n]
    if global_batch % dp == 0:
        share = global_batch // dp
        below = max(n for n in divisors(share) if n <= micro_batch)
        above = min((n for n in divisors(share) if n >= micro_batch), default=share)
        fixes += [{"train.micro_batch": n} for n in sorted({below, above})]
    raise ConfigError(
        f"train.global_batch={global_batch} is not divisible by {unit} (train.micro_batch={micro_batch} × {dp} "
        f"data-parallel rank{'' if dp == 1 else 's'})",
        *fixes,
    )


def load_config(path: Path | str, overrides: dict[str, Any] | None = None, *, auto: bool = False) -> RunConfig:
    """The config in a YAML file, with `overrides` (`{"mesh.tp": 4}`) put over it.

    Args:
        auto: the caller chooses what says `auto`.

    Raises:
        ConfigError: the file cannot be read, is not YAML, or holds an unknown key or an impossible value.
    """
    path = Path(path)
    tree = read_yaml(read_text(path, "config", ConfigError, _MOST_BYTES), f"config {path}", ConfigError)
    if not isinstance(tree, dict):
        raise ConfigError(f"config {path} holds no mapping: it needs the keys run, model, data, train")
    for dotted, value in (overrides or {}).items():
        _set(tree, dotted, value)
    config = parse_config(tree, str(path))
    if not auto:
        config.require_chosen()
    return config


def parse_config(tree: dict[str, Any], source: str = "config") -> RunConfig:
    """The config in a tree of plain values. Raises ConfigError, one line for each thing that is wrong."""
    try:
        return RunConfig.model_validate(tree)
    except ValidationError as error:
        raise ConfigError("\n".join(f"{source}: {_describe(item)}" for item in error.errors())) from error


def dump_config(config: RunConfig) -> str:
    """YAML that load_config reads back to an equal config."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def _set(tree: dict[str, Any], dotted: str, value: Any) -> None:
    *parents, last = dotted.split(".")
    for key in parents:
        if tree.get(key) == AUTO and key in AUTO_KEYS:
            tree[key] = {}
        tree = tree.setdefault(key, {})
        if not isinstance(tree, dict):
            raise ConfigError(f"{dotted}: {key} is a value, not a section")
    tree[last] = value


def _describe(item: Any) -> str:
    where = ".".join(str(part) for part in item["loc"])
    match item["type"]:
        case "extra_forbidden":
            return f"unknown key {where}{_nearest(*map(str, item['loc']))}"
        case "missing":
            return f"{where} is missing"
        case "model_type" | "model_attributes_type":
            auto = f", or {AUTO}" if where in AUTO_KEYS else ""
            return f"{where} is a section: give its keys, such as {where}.KEY{auto} (given: {shortened(item['input'])})"
        case _:
            auto = f", or {AUTO}" if where in AUTO_KEYS else ""
            auto = f"; mesh: {AUTO} chooses all axes" if where.startswith("mesh.") and item["input"] == AUTO else auto
            return f"{where or 'config'}: {describe_value(item, auto)}"


def _nearest(*path: str) -> str:
    """What was meant by an unknown key, as `did_you_mean` says it, in the form that a flag has."""
    *parents, last = path
    section: Any = RunConfig
    for part in parents:
        section = section.model_fields[part].annotation
    fields = section.model_fields
    if not parents:  # a key of a section, without it
        in_sections = [
            f"{key}.{last}" for key, field in fields.items() if last in getattr(field.annotation, "model_fields", {})
        ]
        if in_sections:
            return f"; did you mean {' or '.join(map(repr, in_sections))}?"
    return did_you_mean(last, fields, ".".join([*parents, ""]))


def describe_value(item: Any, more: str = "") -> str:
    """What pydantic finds wrong with a value, what else there is to say, and the value."""
    message = re.sub(", (unable to|got a number).*", "", item["msg"].removeprefix("Value error, "))
    return message if "(given: " in message else f"{message}{more} (given: {shortened(item['input'])})"


def shortened(value: Any) -> str:
    """A value for a message of one line."""
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."

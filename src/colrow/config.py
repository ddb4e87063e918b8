"""One tree of frozen models: every key of a run's YAML, which is also a flag.

What changes results has no hidden default; what changes speed has a good one.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ModelWrapValidatorHandler,
    NonNegativeFloat,
    PositiveFloat,
    PrivateAttr,
    ValidationError,
    model_validator,
)

from colrow.errors import ConfigError, did_you_mean
from colrow.mesh import Mesh, divisors
from colrow.yaml_text import read_text, read_yaml

# torch, numpy and the files of a run hold 64 bits
NonNegativeInt = Annotated[int, Field(ge=0, lt=2**63)]
PositiveInt = Annotated[int, Field(gt=0, lt=2**63)]

AUTO = "auto"
AUTO_KEYS = ("mesh", "train.micro_batch")
"""Keys whose value `auto` is replaced before a run starts, by what the forecast says is fastest."""


def _path(value: Any) -> Any:
    """A path as a person writes it. Raises ValueError for one that names nothing, or that no folder is called."""
    if isinstance(value, Path):
        return value
    if not isinstance(value, str):
        raise ValueError("Input should be a path: put it in quotes")
    if not value.strip():
        raise ValueError("Input is empty: give a path, or . for the current folder")
    if not value.isprintable():
        raise ValueError("Input holds characters that no path should have")
    return str(Path(value).expanduser())  # in JSON, as the jobs of a benchmark are, only text becomes a path


GivenPath = Annotated[Path, BeforeValidator(_path)]


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class RunSection(_Section):
    dir: GivenPath
    """The run's folder: resolved config, metrics, checkpoints, export."""
    seed: NonNegativeInt = 0
    """Of initial weights, batch order, and the random numbers that the model draws."""


class ModelSection(_Section):
    """Exactly one of `shape`, `huggingface`, `python`."""

    shape: str | None = None
    """A named shape: laptop, article, llama2-7b, llama3-8b, llama3-70b, qwen3-8b."""
    huggingface: str | None = None
    """A folder with config.json and safetensors."""
    python: str | None = None
    """`package.module:callable` that returns an nn.Module. Importing and calling it runs its code."""
    trust_code: bool = False
    """Run the Python code that a `huggingface` folder brings for its model (`auto_map` in config.json)."""
    implementation: Literal["auto", "colrow", "transformers"] = "auto"
    """For `huggingface`: colrow's own Llama, or the class of the transformers library; auto: colrow's where it fits."""
    layers: Annotated[int, Field(gt=0, le=10_000)] | None = None
    """Overrides the number of layers of a named shape."""
    reduced: str | None = None
    """`package.module:callable` that returns a smaller model with the same layers, to verify the plan on."""

    @model_validator(mode="after")
    def _one_source(self) -> ModelSection:
        given = [k for k in ("shape", "huggingface", "python") if getattr(self, k) is not None]
        if len(given) != 1:
            fix = "set the others to null, and layers too unless a shape is left" if given else "such as shape: laptop"
            raise ValueError(f"give one of shape, huggingface, python (given: {', '.join(given) or 'none'}): {fix}")
        return self


class TokenizerSection(_Section):
    """A byte-level BPE trained on the corpus, unless `path` names a tokenizer.json or a Hugging Face folder."""

    vocab_size: PositiveInt | None = None
    """Size of the vocabulary to train; the model's unless given."""
    path: GivenPath | None = None
    """An existing tokenizer to use."""


class DataSection(_Section):
    corpus: str
    """`stdlib`, a glob of text, JSONL or Parquet files, or `hf:NAME` for a dataset of the `datasets` library."""
    seq_len: PositiveInt
    """Tokens in one sequence."""
    tokenizer: TokenizerSection = TokenizerSection()
    special_tokens: Literal["text", "encode"] = "text"
    """What a text that spells a special token, such as `<|im_start|>`, becomes: plain text, or that token. Texts of
    chats that were rendered before need `encode`."""
    text_key: str = "text"
    """The field of a JSONL line, Parquet row, or dataset row that holds the text."""
    validation_fraction: float = Field(default=0.02, gt=0.0, lt=1.0)
    """Fraction of the documents that is held out."""
    cache: GivenPath = Path(".cache/colrow")
    """Folder of tokenizers and token shards, shared by runs."""
    workers: Annotated[int, Field(gt=0, le=4096)] | None = None
    """Processes that tokenize; one per core unless given."""


class HangLimits(_Section):
    """Seconds that a phase of a run may take without a sign of life from a rank."""

    start: PositiveFloat = 1800.0
    """Until the first step: imports, the plan's proof, joining the other ranks, weights."""
    tokenization: PositiveFloat = 86_400.0
    compilation: PositiveFloat = 1800.0
    """By torch.compile, in any step."""
    capture: PositiveFloat = 600.0
    """The steps until CUDA graphs are captured."""
    evaluation: PositiveFloat = 1800.0
    saving: PositiveFloat = 1800.0
    export: PositiveFloat = 1800.0
    """The end of a run: sample, plot, and export."""


_Beta = Annotated[float, Field(ge=0.0, lt=1.0)]


class TrainSection(_Section):
    steps: PositiveInt
    """Optimizer steps."""
    global_batch: Annotated[int, Field(gt=0, le=10_000_000)]
    """Sequences in one optimizer step, over all ranks."""
    micro_batch: PositiveInt
    """The most sequences in one forward pass of a data-parallel rank; what fits batch and mesh is taken and printed.
    `auto`: chosen by the forecast."""
    lr: PositiveFloat
    """Peak learning rate."""
    min_lr_ratio: float = Field(default=0.1, ge=0.0, le=1.0)
    """Final learning rate, as a fraction of the peak."""
    schedule: Literal["cosine", "linear", "wsd"] = "cosine"
    warmup_steps: NonNegativeInt = 0
    decay_steps: PositiveInt | None = None
    """For `wsd`: steps of the final decay; a tenth of all unless given."""
    weight_decay: NonNegativeFloat = 0.1
    """Of matrices and embeddings; norms and biases do not decay."""
    no_decay: tuple[str, ...] = ()
    """Parameters or modules that do not decay either, such as `*.router.weight`, `embed_tokens`; `*` matches dots."""
    betas: tuple[_Beta, _Beta] = (0.9, 0.95)
    eps: PositiveFloat = 1e-8
    auxiliary_losses: dict[str, float] | None = None
    """Weights of losses that the model returns beside its logits, by name; those of its own loss unless given."""
    grad_clip: PositiveFloat | None = 1.0
    """Largest gradient norm; null turns clipping off."""
    on_nonfinite: Literal["stop", "skip"] = "stop"
    """When loss or gradient is NaN or infinite: end the run, or leave the step's update out."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """Compute precision; auto is bf16 over fp32 master weights on GPUs, fp32 on CPUs."""
    fp8: Literal["tensorwise"] | None = None
    """Run the matmuls of a plan's fast styles in fp8, with one scale a tensor: changes results, needs Ada or Hopper."""
    compile: bool | None = None
    """Compile each block with torch.compile; unless given, on GPUs only."""
    fused_kernels: bool = True
    """Compiled blocks on GPUs use colrow's kernels where these move less memory than the compiler's: SwiGLU."""
    cuda_graph: bool | Literal["auto"] = False
    """Replay steps as CUDA graphs, with tp alone; `auto`: if the GPU waits for the CPU in the fourth step."""
    activation_checkpoint: Literal["none", "selective", "full"] = "none"
    """What backward recomputes instead of keeping: selective: cheap operations and half the matmuls; full: all."""
    log_every: PositiveInt = 1
    """Steps between printed lines."""
    check_batch_every: NonNegativeInt = 100
    """Steps between checks that the ranks of a tp or pp group read the same batch; 0: only in the first step."""
    replay_every: NonNegativeInt = 0
    """Steps between searches for silent corruption, by a step repeated bit for bit and hashes of weights; 0: none."""
    hang_timeout: PositiveFloat | None = 120.0
    """Seconds without a sign of life from a rank after which the run is ended, and the rank is named; null: never."""
    hang_limits: HangLimits = HangLimits()
    """The same for phases that take longer."""

    @property
    def is_graphed(self) -> bool:
        """Whether CUDA graphs are certain. `auto` is not: `cuda_graph.with_graph_chosen` replaces it at set-up."""
        return self.cuda_graph is True


class EvalSection(_Section):
    every: NonNegativeInt = 0
    """Steps between evaluations; the last step is evaluated too. 0 turns evaluation off."""
    batches: PositiveInt = 8
    """Global batches in one evaluation; fewer where the validation text has fewer: each sequence counts once."""


class CheckpointSection(_Section):
    every: NonNegativeInt = 0
    """Steps between checkpoints; 0 saves only at a stop and after the last step."""
    last: bool = True
    """Save after the last step too."""
    keep: PositiveInt = 2
    """Number of newest checkpoints that are kept."""
    asynchronous: bool = False
    """Write in the background: training waits only for the copy to host memory."""
    export: bool = True
    """Write a Hugging Face folder, `export/`, at the end of the run."""


class DeriveSection(_Section):
    keep_whole: tuple[str, ...] = ()
    """Modules or parameters that a derived plan leaves unsharded, such as 'blocks.*.attn'."""
    split: tuple[str, ...] = ()
    """Modules or parameters whose matrices a derived plan must split; where one cannot be, the run does not start."""


class ExportSection(_Section):
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Of an export's weights; unless given, that of the Hugging Face folder that the weights came from, or float32."""


class PipelineSection(_Section):
    schedule: Literal["gpipe", "1f1b", "interleaved_1f1b", "zero_bubble"] = "1f1b"
    split: tuple[int, ...] | None = None
    """First layer of each stage after the first; balanced by cost unless given."""
    stages_per_rank: PositiveInt = 1
    """Pipeline stages on each rank, for interleaved_1f1b."""


class FsdpSection(_Section):
    reshard_after_forward: bool | None = None
    """Free gathered parameters after a block's forward; unless given, if dp_shard > 1 and pp is 1."""
    gather: Literal["collectives", "copy_engine"] = "collectives"
    """With mesh.data_engine: flat: who gathers shards, the process group, or the copy engines of one host's GPUs."""
    exchange: Literal["collectives", "copy_engine"] = "collectives"
    """With mesh.data_engine: flat: who exchanges gradients between shards, likewise."""
    keep_shards: bool = True
    """With mesh.data_engine: flat: keep a rank's shards of blocks in the compute dtype too; else they are cast for each
    gather: 2 bytes a parameter less, sharded, and more time."""


class LogSection(_Section):
    tensorboard: bool = False
    wandb: bool = False
    wandb_project: str = "colrow"


class SampleSection(_Section):
    prompt: str | None = "def "
    """Prompt of the sample that is printed at the end; null prints none."""
    tokens: PositiveInt = 64
    temperature: NonNegativeFloat = 0.8
    """0 takes the likeliest token."""


class RunConfig(_Section):
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
    forecast: Literal["off", "warn", "stop"] = "stop"
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
        sections: dict[str, Any] = {}
        for dotted, value in values.items():
            name, _, key = dotted.partition(".")
            section = sections.get(name, getattr(self, name))
            sections[name] = section.model_copy(update={key: value}) if key else value
        return self.model_copy(update=sections)

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
    tree = read_yaml(read_text(path, "config", ConfigError), f"config {path}", ConfigError)
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
            section: Any = RunConfig
            for part in item["loc"][:-1]:
                section = section.model_fields[part].annotation
            return f"unknown key {where}{did_you_mean(str(item['loc'][-1]), section.model_fields)}"
        case "missing":
            return f"{where} is missing"
        case "model_type" | "model_attributes_type":
            auto = f", or {AUTO}" if where in AUTO_KEYS else ""
            return f"{where} is a section: give its keys, such as {where}.KEY{auto} (given: {shortened(item['input'])})"
        case _:
            auto = f", or {AUTO}" if where in AUTO_KEYS else ""
            auto = f"; mesh: {AUTO} chooses all axes" if where.startswith("mesh.") and item["input"] == AUTO else auto
            return f"{where or 'config'}: {describe_value(item, auto)}"


def describe_value(item: Any, more: str = "") -> str:
    """What pydantic finds wrong with a value, what else there is to say, and the value."""
    message = re.sub(", (unable to|got a number).*", "", item["msg"].removeprefix("Value error, "))
    return message if "(given: " in message else f"{message}{more} (given: {shortened(item['input'])})"


def shortened(value: Any) -> str:
    """A value for a message of one line."""
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."

"""The sections of a run's config: a frozen model each, one docstring a key, with its unit."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    NonNegativeFloat,
    PositiveFloat,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WrapValidator,
    model_validator,
)

# torch, numpy and the files of a run hold 64 bits
NonNegativeInt = Annotated[int, Field(ge=0, lt=2**63)]
PositiveInt = Annotated[int, Field(gt=0, lt=2**63)]


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


def _off(value: Any) -> Any:
    """YAML reads the word `off` as false."""
    return "off" if value is False else value


def _or_auto(value: Any, validate: ValidatorFunctionWrapHandler) -> Any:
    """One error of a union, under its key, where pydantic has one for each of the union's types."""
    try:
        return validate(value)
    except ValidationError:
        raise ValueError("Input should be true, false or auto") from None


ForecastMode = Annotated[Literal["off", "warn", "stop"], BeforeValidator(_off)]


class Section(BaseModel):
    """Frozen, without keys of other names, and without NaN or infinity."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class RunSection(Section):
    dir: GivenPath
    """The run's folder: resolved config, metrics, checkpoints, export."""
    seed: NonNegativeInt = 0
    """Of initial weights, batch order, and the random numbers that the model draws."""


class ModelSection(Section):
    """Exactly one of `shape`, `huggingface`, `python`."""

    shape: str | None = None
    """A named shape: laptop, article, llama2-7b, llama3-8b, llama3-70b, llama3.2-1b, qwen3-8b."""
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


class TokenizerSection(Section):
    """A byte-level BPE trained on the corpus, unless `path` names a tokenizer.json or a Hugging Face folder."""

    vocab_size: PositiveInt | None = None
    """Size of the vocabulary to train; the model's unless given."""
    path: GivenPath | None = None
    """An existing tokenizer to use."""


class DataSection(Section):
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


class HangLimits(Section):
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


class TrainSection(Section):
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
    fp8: Literal["tensorwise", "delayed", "rowwise", "blockwise"] | None = None
    """Run the matmuls of a plan's fast styles in fp8: changes results, needs Ada or Hopper. `tensorwise`: one scale a
    tensor. `delayed`: likewise, by the largest numbers of the last step for activations and gradients. `rowwise`: one
    for each row (token, feature), and weights' gradients are not rounded. `blockwise`: likewise, one for each 128
    numbers of a token and each 128 x 128 of a weight; needs Hopper."""
    compile: bool | None = None
    """Compile each block with torch.compile; unless given, on GPUs only."""
    fused_kernels: bool = True
    """Compiled blocks on GPUs use colrow's kernels where these move less memory than the compiler's: SwiGLU."""
    cuda_graph: Annotated[bool | Literal["auto"], WrapValidator(_or_auto)] = "auto"
    """Replay steps as CUDA graphs, on meshes of tp alone and of the flat data engine; `auto`: if the GPU waits for the
    CPU in the fourth step."""
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


class EvalSection(Section):
    every: NonNegativeInt = 0
    """Steps between evaluations; the last step is evaluated too. 0 turns evaluation off."""
    batches: PositiveInt = 8
    """Global batches in one evaluation; fewer where the validation text has fewer: each sequence counts once."""


class CheckpointSection(Section):
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


class DeriveSection(Section):
    keep_whole: tuple[str, ...] = ()
    """Modules or parameters that a derived plan leaves unsharded, such as 'blocks.*.attn'."""
    split: tuple[str, ...] = ()
    """Modules or parameters whose matrices a derived plan must split; where one cannot be, the run does not start."""


class ExportSection(Section):
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Of an export's weights; unless given, that of the Hugging Face folder that the weights came from, or float32."""


class PipelineSection(Section):
    schedule: Literal["gpipe", "1f1b", "interleaved_1f1b", "zero_bubble"] = "1f1b"
    split: tuple[int, ...] | None = None
    """First layer of each stage after the first; balanced by cost unless given."""
    stages_per_rank: PositiveInt = 1
    """Pipeline stages on each rank, for interleaved_1f1b."""


class FsdpSection(Section):
    reshard_after_forward: bool | None = None
    """Free gathered parameters after a block's forward; unless given, if dp_shard > 1 and pp is 1."""
    gather: Literal["collectives", "copy_engine"] = "collectives"
    """With mesh.data_engine: flat: who gathers shards, the process group, or the copy engines of one host's GPUs."""
    exchange: Literal["collectives", "copy_engine"] = "collectives"
    """With mesh.data_engine: flat: who exchanges gradients between shards, likewise."""
    keep_shards: bool = True
    """With mesh.data_engine: flat: keep a rank's shards of blocks in the compute dtype too; else they are cast for each
    gather: 2 bytes a parameter less, sharded, and more time."""
    gather_fp8: bool = False
    """With mesh.data_engine: flat and train.fp8: ranks round their shards of what 8-bit matmuls read, and gather these
    in 8 bits: the same results."""


class LogSection(Section):
    tensorboard: bool = False
    wandb: bool = False
    wandb_project: str = "colrow"


class SampleSection(Section):
    prompt: str | None = "def "
    """Prompt of the sample that is printed at the end; null prints none."""
    tokens: PositiveInt = 64
    temperature: NonNegativeFloat = 0.8
    """0 takes the likeliest token."""

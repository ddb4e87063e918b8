"""What each key of a config does when a run is continued with another value of it: one rule a key.

A run has one owner for each value. The checkpoint owns the weights, the optimizer's state, the step and the position in
the data; the config owns everything else, the optimizer's options included. `docs/guide/resume.md` has `rules_table()`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from colrow.config import RunConfig
from colrow.config_sections import HangLimits
from colrow.errors import ConfigError
from colrow.train.schedule import learning_rate

Effect = Literal["used", "used and printed", "refused"]


@dataclass(frozen=True)
class Rule:
    """What a new value of a key does.

    Attributes:
        effect: `used`: takes effect, without a line; `used and printed`: takes effect, and the first lines say
            `changed` with both values, and with what follows from it; `refused`: the run does not start.
        note: what follows, or why.
    """

    effect: Effect
    note: str


def _rules(effect: Effect, note: str, *keys: str) -> dict[str, Rule]:
    return dict.fromkeys(keys, Rule(effect, note))


RULES: dict[str, Rule] = {
    **_rules("used", "the folder may be moved or renamed", "run.dir"),
    **_rules("refused", "initial weights, order of the data", "run.seed"),
    **_rules(
        "refused",
        "another model is another run",
        *("model.shape", "model.huggingface", "model.python", "model.implementation", "model.layers"),
    ),
    **_rules("used", "a permission", "model.trust_code"),
    **_rules(
        "refused",
        "other text, or another order of it",
        *(
            "data.corpus",
            "data.seq_len",
            "data.special_tokens",
            "data.text_key",
            "data.validation_fraction",
        ),
    ),
    **_rules("refused", "another vocabulary; not where `data.tokenizer.path` gives one", "data.tokenizer.vocab_size"),
    **_rules("used", "the vocabulary's hash is compared with the checkpoint's", "data.tokenizer.path"),
    **_rules("used", "no effect on results", "data.cache", "data.workers"),
    **_rules(
        "used and printed",
        "a checkpoint loads on any mesh; figures agree to rounding",
        *("mesh.pp", "mesh.dp_replicate", "mesh.dp_shard", "mesh.tp"),
    ),
    **_rules("used and printed", "another way to compute the same figures", "plan", "loss"),
    **_rules("used and printed", "another derived plan", "derive.keep_whole", "derive.split"),
    **_rules("used", "from the next start on", "check", "verify", "forecast", "model.reduced"),
    **_rules(
        "used and printed",
        "a function of the step: the next step's learning rate, previous and new, is printed where it differs",
        *("train.steps", "train.lr", "train.min_lr_ratio", "train.schedule"),
        *("train.warmup_steps", "train.decay_steps"),
    ),
    **_rules(
        "used and printed",
        "the data go on with the next sequence; tokens a step and sequences of an evaluation are printed",
        "train.global_batch",
    ),
    **_rules(
        "used and printed",
        "figures agree to rounding, but for random numbers and auxiliary losses, which belong to a micro-batch",
        "train.micro_batch",
    ),
    **_rules(
        "used and printed",
        "from the next step on; moments and step counts are the checkpoint's",
        *("train.weight_decay", "train.no_decay", "train.betas", "train.eps", "train.grad_clip"),
    ),
    **_rules("used and printed", "from the next step on", "train.on_nonfinite"),
    **_rules("used and printed", "another objective, from the next step on", "train.auxiliary_losses"),
    **_rules("used and printed", "other rounding", "train.precision", "train.fp8"),
    **_rules(
        "used and printed",
        "speed and memory",
        *(
            "mesh.data_engine",
            "train.compile",
            "train.fused_kernels",
            "train.cuda_graph",
            "train.activation_checkpoint",
        ),
    ),
    **_rules(
        "used and printed",
        "what is printed and checked",
        *("train.log_every", "train.check_batch_every", "train.replay_every"),
    ),
    **_rules(
        "used",
        "when a run that hangs is ended",
        *("train.hang_timeout", *(f"train.hang_limits.{phase}" for phase in HangLimits.model_fields)),
    ),
    **_rules("used and printed", "from the next step on", "eval.every"),
    **_rules("used and printed", "other validation losses: the number of sequences is printed", "eval.batches"),
    **_rules(
        "used",
        "from the next step on",
        *("checkpoint.every", "checkpoint.last", "checkpoint.keep", "checkpoint.asynchronous", "checkpoint.export"),
        "export.dtype",
    ),
    **_rules("used", "speed and memory", "pipeline.schedule", "pipeline.split", "pipeline.stages_per_rank"),
    **_rules(
        "used",
        "speed and memory",
        *("fsdp.reshard_after_forward", "fsdp.gather", "fsdp.exchange", "fsdp.keep_shards", "fsdp.gather_fp8"),
    ),
    **_rules("used", "from the next step on", "log.tensorboard", "log.wandb", "log.wandb_project"),
    **_rules("used", "the text at the end", "sample.prompt", "sample.tokens", "sample.temperature"),
    **_rules("used", "figures agree to rounding", "device"),
}


def changes_between(before: RunConfig, now: RunConfig, step: int) -> list[str]:
    """A line for each change that is printed, and for what follows from it.

    Args:
        step: steps of the checkpoint that the run continues; 0 where there is none.

    Raises:
        ConfigError: keys changed that are refused; the text names them all.
    """
    old, new = values(before), values(now)
    differing = [key for key in sorted(old.keys() | new.keys()) if old.get(key) != new.get(key)]
    lines = {key: f"{key}: {old.get(key)} -> {new.get(key)}" for key in differing}
    if now.data.tokenizer.path is not None:
        lines.pop("data.tokenizer.vocab_size", None)
    refused = [lines[key] for key in lines if RULES[key].effect == "refused"]
    if refused:
        raise ConfigError(
            f"the run in {now.run.dir} was started with another config ({'; '.join(refused)}): "
            "set run.dir to another folder to start a new run, or restore these keys to continue this one"
        )
    printed = [lines[key] for key in lines if RULES[key].effect == "used and printed"]
    return printed + (list(_consequences(before, now, step)) if step else [])


def _consequences(before: RunConfig, now: RunConfig, step: int) -> Iterator[str]:
    if step < now.train.steps:
        rates = [f"{learning_rate(step, config.train):.3g}" for config in (before, now)]
        if rates[0] != rates[1]:
            yield f"learning rate of step {step + 1}: {rates[0]} -> {rates[1]}"
    tokens = [config.tokens_per_step for config in (before, now)]
    if tokens[0] != tokens[1]:
        yield f"tokens a step: {tokens[0]:,} -> {tokens[1]:,}; the data go on with the next sequence"
    evaluated = [config.eval.batches * config.train.global_batch for config in (before, now)]
    if before.eval.every and now.eval.every and evaluated[0] != evaluated[1]:
        yield f"most sequences of an evaluation: {evaluated[0]:,} -> {evaluated[1]:,}; val_loss is of other text"


def values(config: RunConfig) -> dict[str, Any]:
    """The config's values by dotted key."""
    found: dict[str, Any] = {}

    def walk(tree: dict[str, Any], prefix: str) -> None:
        for key, value in tree.items():
            # a mapping that has a rule is one value: train.auxiliary_losses
            if isinstance(value, dict) and prefix + key not in RULES:
                walk(value, f"{prefix}{key}.")
            else:
                found[prefix + key] = value

    walk(config.model_dump(mode="json"), "")
    return found


def rules_table() -> str:
    """The rules as a Markdown table, keys with one rule in one row."""
    rows = ["| keys | a new value is | what follows |", "| --- | --- | --- |"]
    for rule in dict.fromkeys(RULES.values()):
        keys = ", ".join(f"`{key}`" for key, other in RULES.items() if other == rule)
        rows.append(f"| {keys} | {rule.effect} | {rule.note} |")
    return "\n".join(rows)

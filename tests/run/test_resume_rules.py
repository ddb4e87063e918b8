"""Every key of the config has a rule for a run that is continued with another value, and follows it."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest

from colrow.config import RunConfig, parse_config
from colrow.errors import ConfigError
from colrow.run.resume_rules import RULES, changes_between, rules_table, values

Tree = dict[str, Any]

OTHER: dict[str, Any] = {
    "run.dir": "elsewhere",
    "model.shape": "article",
    "model.implementation": "transformers",
    "model.layers": 3,
    "data.corpus": "other/*.txt",
    "data.tokenizer.vocab_size": 300,
    "data.tokenizer.path": "tokenizer.json",
    "data.text_key": "content",
    "data.special_tokens": "encode",
    "data.cache": "other",
    "data.workers": 2,
    "plan": "llama-fast",
    "derive.keep_whole": ("embed_tokens",),
    "derive.split": ("lm_head",),
    "loss": "replicated",
    "verify": "always",
    "forecast": "warn",
    "model.reduced": "package:build",
    "train.schedule": "wsd",
    "train.decay_steps": 7,
    "train.no_decay": ("embed_tokens",),
    "train.auxiliary_losses": {"aux_loss": 0.1},
    "train.betas": (0.5, 0.5),
    "train.on_nonfinite": "skip",
    "train.precision": "fp32",
    "train.fp8": "tensorwise",
    "train.compile": True,
    "train.fused_kernels": False,
    "train.cuda_graph": False,
    "train.activation_checkpoint": "full",
    "pipeline.schedule": "gpipe",
    "pipeline.split": (1,),
    "mesh.data_engine": "flat",
    "fsdp.reshard_after_forward": False,
    "fsdp.gather": "copy_engine",
    "fsdp.exchange": "copy_engine",
    "export.dtype": "bfloat16",
    "log.wandb_project": "other",
    "sample.prompt": "class ",
    "device": "cuda",
}
"""Other values where none follows from the value at hand."""

ALSO: dict[str, Tree] = {
    "model.huggingface": {"model": {"huggingface": "folder"}},
    "model.python": {"model": {"python": "package:build"}},
    "train.decay_steps": {"train": {"schedule": "wsd"}},
}
"""Sections in which a key has another value only together with others."""


def with_other(tree: Tree, key: str) -> RunConfig:
    """The config with another value of one key."""
    other = copy.deepcopy(tree)
    *parents, last = key.split(".")
    if key in ("model.huggingface", "model.python"):
        return parse_config(other | ALSO[key])
    value = values(parse_config(tree))[key]
    section = other
    for parent in parents:
        section = section.setdefault(parent, {})
    if key in OTHER:
        section[last] = OTHER[key]
    elif isinstance(value, bool):
        section[last] = not value
    else:
        assert isinstance(value, int | float), f"{key} is {value!r} here: give another value of it in OTHER"
        section[last] = 2 * value or 1
        if key in ("data.validation_fraction", "train.min_lr_ratio"):
            section[last] = value / 2
    return parse_config(other)


def test_every_key_has_one_rule(tree: Tree) -> None:
    keys = values(parse_config(tree)).keys()
    assert not keys - RULES.keys(), f"say in RULES what a resume does with another {sorted(keys - RULES.keys())}"
    assert not RULES.keys() - keys, f"RULES names keys that no config has: {sorted(RULES.keys() - keys)}"


@pytest.mark.parametrize("key", RULES)
def test_another_value_does_what_the_rule_says(tree: Tree, key: str) -> None:
    before, now = parse_config(tree), with_other(tree, key)
    assert values(before)[key] != values(now)[key]
    if RULES[key].effect == "refused":
        with pytest.raises(ConfigError, match=rf"{key}: .* -> .*set run\.dir to another folder"):
            changes_between(before, now, 0)
        return
    printed = [line for line in changes_between(before, now, 0) if line.startswith(f"{key}: ")]
    assert len(printed) == (RULES[key].effect == "used and printed")


RATES = [
    ({"steps": 200}, 100, "learning rate of step 101: 0.0001 -> 0.000543"),  # the cosine was at its end
    ({"steps": 200}, 50, "learning rate of step 51: 0.000536 -> 0.000863"),
    ({"lr": 2e-3}, 50, "learning rate of step 51: 0.000536 -> 0.00107"),
    ({"schedule": "linear"}, 25, "learning rate of step 26: 0.000858 -> 0.000766"),
    ({"min_lr_ratio": 1.0}, 99, "learning rate of step 100: 0.0001 -> 0.001"),
    ({"warmup_steps": 60}, 50, "learning rate of step 51: 0.000536 -> 0.00085"),
]


@pytest.mark.parametrize(("changes", "step", "line"), RATES, ids=[f"{next(iter(c))}-{step}" for c, step, _ in RATES])
def test_a_learning_rate_that_changes_is_printed(tree: Tree, changes: Tree, step: int, line: str) -> None:
    before = parse_config(tree)
    now = parse_config(tree | {"train": tree["train"] | changes})
    assert changes_between(before, now, step)[-1] == line
    assert len(line) + len("changed    ") <= 80
    assert not [line for line in changes_between(before, now, 0) if line.startswith("learning rate")]


def test_other_batches_are_printed_with_what_follows(tree: Tree) -> None:
    evaluated = tree | {"eval": {"every": 5, "batches": 2}}
    before = parse_config(evaluated)
    now = parse_config(evaluated | {"train": tree["train"] | {"global_batch": 16}})
    assert changes_between(before, now, 3) == [
        "train.global_batch: 8 -> 16",
        "tokens a step: 256 -> 512; the data go on with the next sequence",
        "most sequences of an evaluation: 16 -> 32; val_loss is of other text",
    ]


def test_the_guide_has_the_table() -> None:
    guide = Path(__file__).parents[2] / "docs" / "guide" / "resume.md"
    has_table = rules_table() in guide.read_text(encoding="utf-8")
    assert has_table, "put what `rules_table()` gives in the place of the table in docs/guide/resume.md"

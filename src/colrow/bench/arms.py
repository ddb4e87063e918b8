"""Arms: ways to train the same model, measured beside each other.

An arm is a set of changes to a run's config. `NAME:key=value:key=value` on the command line takes a named arm and
changes it further (`fast:train.compile=false`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import yaml

from colrow.config import RunConfig, parse_config
from colrow.errors import ConfigError, did_you_mean

ARMS: dict[str, dict[str, Any]] = {
    # what tutorials teach: eager, q, k and v gathered, all heads on every rank
    "article": {"plan": "article", "loss": "vocab_parallel", "train.compile": False},
    "plain": {"plan": "llama", "loss": "vocab_parallel"},
    "linear": {"plan": "llama", "loss": "linear"},
    "fast": {"plan": "llama-fast", "loss": "linear"},
    "graph": {"plan": "llama-fast", "loss": "linear", "train.cuda_graph": True},
    "fp8": {"plan": "llama-fast", "loss": "linear", "train.fp8": "tensorwise"},
    "overlap": {"plan": "llama-overlap", "loss": "linear"},
    "overlap-graph": {"plan": "llama-overlap", "loss": "linear", "train.cuda_graph": True},
    "config": {},
}
"""`config` is the config as it stands. The others replay no graph unless they say so."""


def on_random_tokens(shape: str | None, seq_len: int, micro_batch: int = 1) -> dict[str, Any]:
    """The tree of a config: one step of one micro-batch of random tokens."""
    return {
        "run": {"dir": "."},
        "model": {"shape": shape},
        "data": {"corpus": "random", "seq_len": seq_len},
        "train": {"steps": 1, "global_batch": micro_batch, "micro_batch": micro_batch, "lr": 3e-4},
    }


def arm_config(base: RunConfig, arm: str) -> RunConfig:
    """The config of an arm.

    Raises:
        ConfigError: an unknown arm, or a change that the config does not know.
    """
    name, *changes = arm.split(":")
    if name not in ARMS:
        raise ConfigError(f"unknown arm {name!r}{did_you_mean(name, ARMS)}")
    tree = base.model_dump(mode="json")
    # `auto` would capture graphs for some arms and not for others: a named arm has one where its name says so
    named = {} if name == "config" else {"train.cuda_graph": False} | ARMS[name]
    for key, value in {**named, **_parsed(changes, arm)}.items():
        *parents, last = key.split(".")
        inner: Any = tree
        for parent in parents:
            inner = inner.get(parent)
            if not isinstance(inner, dict):
                raise ConfigError(f"arm {arm!r}: {key} names no key of a run's config")
        inner[last] = value
    return parse_config(tree, f"arm {arm!r}")


def _parsed(changes: list[str], arm: str) -> Mapping[str, Any]:
    parsed: dict[str, Any] = {}
    for change in changes:
        key, equals, value = change.partition("=")
        if not equals:
            raise ConfigError(f"arm {arm!r}: {change!r} is no key=value, such as train.compile=false")
        parsed[key] = yaml.safe_load(value)  # as in a config's file: `false` is a boolean
    return parsed

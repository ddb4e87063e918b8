"""Flags of a verb from a dataclass: one place, so that every verb's help and errors look alike."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import tyro

from colrow.errors import ConfigError

if TYPE_CHECKING:  # a wrong flag need not wait for torch
    from torch import nn

    from colrow.dryrun.calls import Inputs
    from colrow.plans.plan import Plan

T = TypeVar("T")


@dataclass(frozen=True)
class PlanFlags:
    """What plan, check and verify share: a model, a degree and a plan."""

    model: tyro.conf.Positional[str]
    """A named shape (llama3-8b), a Hugging Face folder or config.json, or package.module:callable."""
    tp: int
    """Tensor-parallel degree."""
    plan: str = "llama"
    """A preset's name, huggingface, derive, derive-fast, derive-overlap, or a file."""
    loss: str | None = None
    """For a preset: vocab_parallel, replicated or linear."""
    keep_whole: tuple[str, ...] = ()
    """For a derived plan: modules or parameters that stay unsharded, such as 'blocks.*.attn'."""
    split: tuple[str, ...] = ()
    """For a derived plan: modules or parameters whose matrices must be split."""
    inputs: str | None = None
    """package.module:callable that returns example inputs: a tensor, a tuple, or a mapping of keyword arguments. Unless
    given, the model's signature and layers say what it takes."""
    trust_code: bool = False
    """Run the Python code that a Hugging Face folder brings for its model."""
    json: bool = False
    """Print JSON instead."""

    def load_model(self) -> nn.Module:
        """The model, on the meta device where it is built here. Raises ConfigError for one that is not known."""
        from colrow.models.build import build_source, parse_model

        self.positive("tp")
        return build_source(parse_model(self.model, self.trust_code), seed=0).model

    def load_plan(self, model: nn.Module) -> Plan:
        """The plan for `model`. Raises ConfigError or PlanError as `named_plan` does."""
        from colrow.plans.named import named_plan

        requests: dict[str, Any] = {"keep_whole": self.keep_whole, "split": self.split}
        inputs = self.load_inputs()
        return named_plan(self.plan, model, self.tp, self.loss, inputs, **requests, say=_progress_line)

    def load_inputs(self) -> Inputs | None:
        """The inputs that the user's callable returns. Raises ConfigError where there is none, or it returns none."""
        if self.inputs is None:
            return None
        from colrow.dryrun.calls import Inputs
        from colrow.models.build import imported

        given = imported(self.inputs, "inputs")()
        try:
            return Inputs.of(given)
        except TypeError as error:
            raise ConfigError(
                f"--inputs {self.inputs} returns a {type(given).__name__}: return a tensor, a tuple or a mapping"
            ) from error

    def positive(self, *names: str) -> None:
        """Refuse what counts something and is less than one."""
        for name in names:
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"--{name.replace('_', '-')} {value}: use 1 or more")


def _progress_line(line: str) -> None:
    print(line, file=sys.stderr, flush=True)  # stdout has what is asked for, and JSON


def default_seq_len(model: nn.Module, tp: int, most: int) -> int:
    """The model's context, at most `most`, in tokens: the next smaller number that tp divides."""
    context = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    return max(min(context if isinstance(context, int) else 512, most) // tp, 1) * tp


def parse(flags: type[T], verb: str, argv: list[str]) -> T:
    """The flags in argv. Prints help and exits 0 for --help; names what is wrong and exits 2 for bad usage."""
    return tyro.cli(flags, prog=f"colrow {verb}", args=argv)

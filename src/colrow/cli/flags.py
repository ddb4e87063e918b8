"""Flags of a verb from a dataclass: one place, so that every verb's help and errors look alike."""

from __future__ import annotations

import dataclasses
import sys
from dataclasses import MISSING, dataclass
from typing import TYPE_CHECKING, Annotated, Any, TypeVar, cast, get_args, get_origin, get_type_hints

import tyro
from pydantic import Field, TypeAdapter, ValidationError

from colrow.cli.config_flags import Takes, flag_value, group_words, is_flag, kinds_of
from colrow.config import describe_value
from colrow.config_sections import DeriveSection
from colrow.errors import ConfigError, did_you_mean

if TYPE_CHECKING:  # a wrong flag need not wait for torch
    from torch import nn

    from colrow.dryrun.calls import Inputs
    from colrow.plans.plan import Plan

T = TypeVar("T")

_POSITIONAL = get_args(tyro.conf.Positional[str])[1]
_BOOLEANS = ("true", "false", "yes", "no", "on", "off")


@dataclass(frozen=True)
class PlanFlags:
    """What plan, check and verify share: a model, a degree and a plan."""

    model: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="MODEL")]
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

        requests = DeriveSection(keep_whole=self.keep_whole, split=self.split)
        return named_plan(self.plan, model, self.tp, self.loss, requests, self.load_inputs(), say=_progress_line)

    def load_inputs(self) -> Inputs | None:
        """The inputs that the user's callable returns. Raises ConfigError where there is none, or it returns none."""
        if self.inputs is None:
            return None
        from colrow.dryrun.calls import Inputs
        from colrow.models.build import imported_callable

        given = imported_callable(self.inputs, "inputs")()
        try:
            if isinstance(given, str):
                raise TypeError
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
    from colrow.dryrun.calls import most_positions

    return max(min(most_positions(model) or 512, most) // tp, 1) * tp


def parse(flags: type[T], verb: str, argv: list[str]) -> T:
    """The flags in argv: values are read and validated as those of a config are. Prints help and exits 0 for --help.

    Raises:
        ConfigError: what is wrong, in one line.
    """
    if "-h" in argv or "--help" in argv:
        tyro.cli(flags, prog=f"colrow {verb}", args=["--help"])
    hints = get_type_hints(flags, include_extras=True)
    fields = {field.name: _Field.of(field, hints[field.name]) for field in dataclasses.fields(cast(Any, flags))}
    words = group_words(argv, _Flags(fields).start)
    values: dict[str, Any] = {}
    for name, field in fields.items():
        if name in words:
            values[name] = field.value(words[name])
        elif field.is_required:
            raise ConfigError(f"{field.shown} is missing: see --help")
    return flags(**values)


@dataclass(frozen=True)
class _Field:
    """A flag, or a word of the command that has no flag.

    Args:
        shown: as the user writes it: `--seq-len`, or `MODEL`.
        aliases: further spellings: `-o`.
    """

    shown: str
    annotation: Any
    """The type with its bounds: `Annotated[float, Field(gt=0)]`."""
    kinds: frozenset[Any]
    is_positional: bool
    is_required: bool
    aliases: tuple[str, ...] = ()

    @property
    def is_switch(self) -> bool:
        return self.kinds == {bool}

    @staticmethod
    def of(field: dataclasses.Field[Any], annotation: Any) -> _Field:
        extras = get_args(annotation)[1:] if get_origin(annotation) is Annotated else ()
        is_positional = _POSITIONAL in extras
        return _Field(
            shown=field.name.upper() if is_positional else f"--{field.name.replace('_', '-')}",
            annotation=annotation,
            kinds=frozenset(kinds_of(annotation)),
            is_positional=is_positional,
            is_required=field.default is MISSING and field.default_factory is MISSING,
            aliases=tuple(alias for extra in extras for alias in getattr(extra, "aliases", None) or ()),
        )

    def value(self, words: list[str]) -> Any:
        """The value that the words spell. Raises ConfigError."""
        if not words and self.is_switch:
            words = ["true"]
        if not words:
            raise ConfigError(f"{self.shown} has no value: write {self.shown} VALUE")
        # as in a YAML file, then by pydantic: a flag and a config's key take and refuse the same
        values = [flag_value(word, self.kinds, self.shown) for word in words]
        try:
            return _validator(self.annotation, self.kinds).validate_python(values if tuple in self.kinds else values[0])
        except ValidationError as error:
            raise ConfigError(f"{self.shown}: {describe_value(error.errors()[0])}") from error


def _validator(annotation: Any, kinds: frozenset[Any]) -> TypeAdapter[Any]:
    if float in kinds:
        return TypeAdapter(Annotated[annotation, Field(allow_inf_nan=False)])
    return TypeAdapter(Annotated[annotation, Field(lt=2**63)] if int in kinds else annotation)  # as torch's integers


class _Flags:
    """The flags of a verb, and the words that need none, as `group_words` asks for them."""

    def __init__(self, fields: dict[str, _Field]) -> None:
        self.fields = fields
        named = [(name, field) for name, field in fields.items() if not field.is_positional]
        self.known = [field.shown for _, field in named]
        self.by_flag = {flag: name for name, field in named for flag in (field.shown, *field.aliases)}
        self.positional = [name for name, field in fields.items() if field.is_positional]

    def start(self, word: str) -> tuple[str, list[str], Takes]:
        flag, has_value, value = word.partition("=")
        flag = flag.replace("_", "-")
        negated = self.by_flag.get(flag.replace("--no-", "--", 1)) if flag.startswith("--no-") else None
        if negated and self.fields[negated].is_switch and not has_value:
            return negated, ["false"], _nothing
        if name := self.by_flag.get(flag):
            return (name, [value], _nothing) if has_value else (name, [], self._takes(self.fields[name]))
        # `-x` is no flag that is known; `-5` is a number, and `-` alone a value
        if is_flag(word) or (word.startswith("-") and not word[1:2].isdigit() and len(word) > 1):
            raise ConfigError(f"unknown flag {_short(flag)}{_meant(flag, self.known)}")
        if not self.positional:
            raise ConfigError(f"{_short(word)!r} belongs to no flag: see --help")
        return self.positional.pop(0), [word], _nothing

    def _takes(self, field: _Field) -> Takes:
        if field.is_switch:
            return lambda words, word: not words and word.lower() in _BOOLEANS
        several = tuple in field.kinds
        return lambda words, word: (several or not words) and not is_flag(word) and word not in self.by_flag


def _nothing(words: list[str], word: str) -> bool:
    return False


def _meant(flag: str, known: list[str]) -> str:
    """`; did you mean '--tp'?`, or where the flags are listed."""
    name = flag.lstrip("-").rpartition(".")[2]  # `--mesh.tp` of a config is `--tp` here
    near = did_you_mean(name, [each.lstrip("-") for each in known])
    return near.replace("'", "'--", 1) if "did you mean" in near else ": see --help"


def _short(word: str) -> str:
    return word if len(word) <= 24 else f"{word[:21]}..."

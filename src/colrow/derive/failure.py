"""Where a model's code fails when it is traced, and why, in words that name a module."""

from __future__ import annotations

import re
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import torch
from torch import Tensor, nn
from torch.fx import Node

from colrow.errors import PlanError, first_line
from colrow.torch_compat import path_in_torch

HERE, TORCH = Path(__file__).parents[1], Path(torch.__file__).parent
"""Code below these is no user's: a reason names no line of it."""
ADVICE = "write the plan by hand, or take a variant of the model whose sizes and branches do not depend on the data"
ALIKE = "would give every rank the same part of a constant"


class InternalError(Exception):
    """Code of this project failed while it watched a model's code: no failure of the model's, nor of a plan."""


@contextmanager
def own_code() -> Iterator[None]:
    """Around code of this project that runs among a model's: what fails in it shows as what it is. What torch raises
    there is of the model: sizes that depend on the data cannot be compared."""
    try:
        yield
    except Exception as error:
        *_, (innermost, _) = traceback.walk_tb(error.__traceback__)
        if path_in_torch(innermost) is not None:
            raise
        raise InternalError(f"an error of colrow's own: {type(error).__name__}: {error}") from error


class TraceError(PlanError):
    """Code of a module cannot be traced; `module` is its name, '' for the model itself, None where it is unknown."""

    def __init__(self, message: str, module: str | None = None) -> None:
        super().__init__(message)
        self.module = module


@dataclass(frozen=True)
class Misfit:
    """How a rank's trace differs from the unsharded one, and the module where it does; None where no module is
    known."""

    why: str
    module: str | None

    @property
    def tells_more(self) -> bool:
        """Whether it says what a rank computes, and not only that its code fails."""
        # both are texts of `local.py`: an extent at a module's entrance, and a constant that ranks would not divide
        return " has an input of " in self.why or ALIKE in self.why


@dataclass(frozen=True)
class Place:
    """The innermost module that ran when an error was raised, and the line of the model's code."""

    module: str
    class_name: str
    line: str

    @classmethod
    def of(cls, model: nn.Module, error: BaseException) -> Place:
        # reversed: a module with several names goes by its first
        names = {id(module): name for name, module in reversed(list(model.named_modules()))}
        found, line = "", ""
        for frame, number in _frames(error):
            found = names.get(id(frame.f_locals.get("self")), found)
            path = Path(frame.f_code.co_filename)
            # what fx generates stands in no file
            if HERE not in path.parents and TORCH not in path.parents and path.is_file():
                line = f"{path.name}:{number}"
        return cls.at(model, found, line)

    @classmethod
    def at(cls, model: nn.Module, module: str, line: str = "") -> Place:
        return cls(module, type(model.get_submodule(module)).__name__, line)

    def __str__(self) -> str:
        return f"{self.module} ({self.class_name})" if self.module else self.class_name


def _frames(error: BaseException) -> list[tuple[FrameType, int]]:
    """Frames of an error and their lines, the outermost first; export raises some errors again as others, whose own
    frames end above the model's."""
    return [frame for each in _chain(error) for frame in traceback.walk_tb(each.__traceback__)]


def _chain(error: BaseException) -> list[BaseException]:
    chain: list[BaseException] = []
    at: BaseException | None = error
    while at is not None and at not in chain:
        chain.append(at)
        at = at.__cause__ or at.__context__
    return chain


def _raise_internal(error: BaseException) -> None:
    for each in _chain(error):
        if isinstance(each, InternalError):
            raise each


def unknown_size(model: nn.Module, module: str, error: Exception) -> TraceError:
    """Of code in `module` that makes a size of the data."""
    place = Place.at(model, module)
    why = f"{type(model).__name__} cannot be derived: {place} has sizes that depend on the data: {ADVICE}"
    found = TraceError(why, module)
    found.__cause__ = error
    return found


def cannot_trace(model: nn.Module, error: Exception) -> TraceError:
    """torch.export's failure on `model`, in one line. Raises an InternalError that is the reason."""
    _raise_internal(error)
    place = Place.of(model, error)
    at = f" at {place.line}" if place.line else ""
    if isinstance(error, PlanError):
        cause = f"{place}: {error}"
    elif (by_values := _depends_on_values(error)) is not None:
        cause = f"{place} {by_values}{at}: {ADVICE}"
    else:
        cause = f"{place} fails{at} ({type(error).__name__}: {first_line(error)[:160]}): {ADVICE}"
    return TraceError(f"torch.export cannot trace {type(model).__name__}: {cause}", place.module)


def does_not_fit(model: nn.Module, error: BaseException) -> Misfit:
    """What fails on a rank's shapes and not on the unsharded ones. Raises an InternalError that is the reason."""
    _raise_internal(error)
    place = Place.of(model, error)
    if isinstance(error, PlanError):
        return Misfit(f"{place} does not run on a rank's shapes: {error}", place.module)
    where = f"a size at {place.line} does not fit them" if place.line else "a size in its code does not fit them"
    return Misfit(f"{place} does not run on a rank's shapes: {where}", place.module)


def has_unknown_size(node: Node) -> bool:
    """Whether the node makes a tensor of which some extent is known only when the data is."""
    value = node.meta.get("val")
    return isinstance(value, Tensor) and not all(isinstance(extent, int) for extent in value.shape)


def _depends_on_values(error: Exception) -> str | None:
    text = f"{type(error).__name__}: {error}".lower()
    if not any(word in text for word in ("data-dependent", "datadependent", "dynamicoutputshape")):
        return None
    sizes = re.search("integer|dynamicoutputshape|nonzero|unique", text)
    return f"{'has sizes that depend' if sizes else 'branches'} on the data"

"""A model's fingerprint: its parameters' names and shapes, and the source of its classes."""

from __future__ import annotations

import ast
import contextlib
import hashlib
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from torch import nn

from colrow.errors import PlanError


@dataclass(frozen=True)
class Fingerprint:
    """What a plan that was made for a model remembers of it.

    Attributes:
        parameters, elements: how many there are.
        names_and_shapes: a digest of all parameters' names and shapes.
        classes: a digest of the source of each class, by its qualified name, with the bases whose forward it inherits
            and the functions of its file that it calls. Classes of torch, and those without a file, are not there.
    """

    parameters: int
    elements: int
    names_and_shapes: str
    classes: Mapping[str, str]

    @classmethod
    def of(cls, model: nn.Module) -> Fingerprint:
        """The fingerprint of a model, on any device."""
        params = dict(model.named_parameters())
        shapes = (f"{name} {tuple(param.shape)}" for name, param in params.items())
        classes: dict[str, list[str]] = {}
        for module_class in sorted({type(m) for m in model.modules()}, key=lambda c: (c.__module__, c.__qualname__)):
            if source := "\n".join(_sources(module_class)):
                classes.setdefault(module_class.__qualname__, []).append(source)
        return cls(
            len(params),
            sum(param.numel() for param in params.values()),
            digest_of_texts(shapes)[:16],
            {name: digest_of_texts(sources)[:16] for name, sources in sorted(classes.items())},
        )

    @classmethod
    def from_data(cls, data: Any, source: str) -> Fingerprint:
        """What `to_data` gave. Raises PlanError where it is something else."""
        try:
            return cls(**{**data, "classes": dict(data["classes"])})
        except (TypeError, KeyError, ValueError) as error:
            raise PlanError(
                f"{source}: the key fingerprint is not what colrow writes: take it out, or save the plan again"
            ) from error

    def to_data(self) -> dict[str, Any]:
        """Plain values, for YAML."""
        return asdict(self)

    def differences(self, model: nn.Module) -> list[str]:
        """How the model differs from the one of this fingerprint, one text for each; empty where it does not."""
        now, found = Fingerprint.of(model), []
        if (self.parameters, self.elements) != (now.parameters, now.elements):
            found.append(
                f"it has {now.parameters} parameters with {now.elements:,} elements, not {self.parameters} with "
                f"{self.elements:,}"
            )
        elif self.names_and_shapes != now.names_and_shapes:
            found.append("its parameters have other names or shapes")
        changed = [name for name, digest in now.classes.items() if self.classes.get(name, digest) != digest]
        new = [name for name in now.classes if name not in self.classes]
        gone = [name for name in self.classes if name not in now.classes]
        for names, what in ((changed, "the source of {} changed"), (new, "{} came in"), (gone, "{} went out")):
            if names:
                more = f" and {len(names) - 3} more classes" if len(names) > 3 else ""
                found.append(what.format(", ".join(names[:3]) + more))
        return found


def digest_of_texts(texts: Iterable[str]) -> str:
    """SHA-256 of texts, in hex."""
    found = hashlib.sha256()
    for text in texts:
        found.update(text.encode() + b"\0")
    return found.hexdigest()


def _sources(module_class: type) -> Iterator[str]:
    for base in module_class.__mro__:
        package = base.__module__.partition(".")[0]
        # of the bases those with a forward, which the class may inherit or call
        # torch's own classes change with torch, which is no change of the model
        if package in ("torch", "builtins") or ("forward" not in vars(base) and base is not module_class):
            continue
        file = getattr(sys.modules.get(base.__module__), "__file__", None)
        if file is not None and file.endswith(".py"):
            yield _Source.of(file).of_class(base.__qualname__)


class _Source:
    """A file's text by the qualified names of its classes and functions."""

    def __init__(self, text: str) -> None:
        self._lines = text.splitlines()
        self._nodes: dict[str, ast.AST] = {}
        with contextlib.suppress(SyntaxError):  # the file was changed while this process ran
            self._collect(ast.parse(text), "")

    @staticmethod
    @lru_cache(maxsize=64)
    def of(file: str) -> _Source:
        path = Path(file)
        return _Source(path.read_text(encoding="utf-8", errors="replace") if path.is_file() else "")

    def of_class(self, name: str) -> str:
        """The text of a class and of the functions of this file that it calls, directly or not; empty for a class that
        is not there."""
        if name not in self._nodes:
            return ""
        texts: dict[str, str] = {}
        todo = [name]
        while todo:
            at = todo.pop()
            node: Any = self._nodes[at]
            texts[at] = "\n".join(self._lines[node.lineno - 1 : node.end_lineno])
            used = {inner.id for inner in ast.walk(node) if isinstance(inner, ast.Name)}
            todo += [each for each in used - texts.keys() if isinstance(self._nodes.get(each), ast.FunctionDef)]
        return "\n".join(texts[at] for at in sorted(texts))

    def _collect(self, node: ast.AST, prefix: str) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.ClassDef | ast.FunctionDef):
                self._nodes[prefix + child.name] = child
                inner = f"{prefix}{child.name}." + ("<locals>." if isinstance(child, ast.FunctionDef) else "")
                self._collect(child, inner)

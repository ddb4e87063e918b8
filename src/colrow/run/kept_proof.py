"""The proof of a plan in the run's folder, with what it depends on: a restart does not pay for it again."""

from __future__ import annotations

import json
import sys
import sysconfig
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

import colrow
from colrow.config import RunConfig
from colrow.data.disk import atomic_write, read_kept
from colrow.models.build import imported
from colrow.plans.fingerprint import digest_of_texts
from colrow.plans.plan import Plan
from colrow.run.run_folder import unwritable
from colrow.verifying.report import Report

FILE = "proof.json"
_CHANGED = {
    "plan": "the plan",
    "model": "the model or its source",
    "config": "the config",
    "torch": "torch",
    "colrow": "colrow",
}
"""What a proof depends on, and what it is called in messages."""


@dataclass(frozen=True)
class KeptProof:
    """A run's proof.

    Attributes:
        depends: what the proof of this start depends on; `dependencies` gives it.
    """

    folder: Path
    depends: Callable[[], Mapping[str, str]]

    def find(self, say: Callable[[str], None]) -> bool:
        """Whether the folder holds a proof that still counts. Where it does not, `say` gets what has changed."""
        before = (read_kept(self.folder / FILE, dict[str, Any]) or {}).get("depends")
        if not isinstance(before, dict):
            return False
        now = self.depends()
        changed = [name for key, name in _CHANGED.items() if before.get(key) != now[key]]
        if changed:
            say(f"{' and '.join(changed)} changed since the proof in {self.folder / FILE}")
        return not changed

    def keep(self, report: Report) -> None:
        """Write a proof. Raises ConfigError where the folder cannot be written."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            data = {"depends": dict(self.depends()), "report": report.to_data()}
            atomic_write(self.folder / FILE, json.dumps(data, indent=1))
        except OSError as error:
            raise unwritable(self.folder, error) from error


def dependencies(config: RunConfig, model: nn.Module, plan: Plan | None, *builders: Any) -> dict[str, str]:
    """Digests of what the proof of a plan depends on.

    Args:
        plan: none for what the derivation of a plan depends on: the config's keys for it take its place.
        builders: the user's callables that build the model, and the reduced one.
    """
    keys = {
        "model": config.model.model_dump(mode="json"),
        "tp": config.mesh.tp,
        "loss": config.loss,
        "seq_len": config.data.seq_len,
        "micro_batch": config.train.micro_batch,
    }
    here = Path(colrow.__file__).parent
    # without the plan's fingerprint of the model: the model has a digest of its own, below
    text = repr((config.plan, config.derive)) if plan is None else replace(plan, fingerprint=None).to_yaml()
    return {
        "plan": digest_of_texts([text]),
        "model": digest_of_texts([*_structure(model), *_versions(model), *_sources(model, builders)]),
        "config": digest_of_texts([json.dumps(keys, sort_keys=True)]),
        "torch": torch.__version__,
        "colrow": digest_of_texts(path.read_text(encoding="utf-8") for path in sorted(here.rglob("*.py"))),
    }


def builders_of(config: RunConfig) -> list[Any]:
    """The user's callables that build the model, and the reduced one."""
    paths = (config.model.python, config.model.reduced)
    return [imported(path, "model") for path in paths if path is not None]


def _structure(model: nn.Module) -> Iterable[str]:
    """Modules with their attributes, parameters and buffers: what the builder read from files is in them."""
    for name, module in model.named_modules():
        attributes = {key: _plain(value) for key, value in vars(module).items() if not key.startswith("_")}
        yield f"{name} {type(module).__qualname__} {sorted(attributes.items())}"
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        yield f"{name} {tuple(tensor.shape)} {tensor.dtype} {tensor.requires_grad}"


def _versions(model: nn.Module) -> Iterable[str]:
    """Versions of the packages that define the model's classes: not every file of a library that they use is read."""
    names = {cls.__module__.partition(".")[0] for module in model.modules() for cls in type(module).__mro__}
    for name in sorted(names - {"torch"}):
        yield f"{name} {getattr(sys.modules.get(name), '__version__', '')}"


def _plain(value: Any, depth: int = 4) -> str:
    """A text of a value that is the same in each process: without addresses."""
    if value is None or isinstance(value, bool | int | float | str):
        return repr(value)
    if depth and isinstance(value, list | tuple | set):
        texts = [_plain(item, depth - 1) for item in value]
        return f"{type(value).__name__} {sorted(texts) if isinstance(value, set) else texts}"
    if depth and isinstance(value, Mapping):
        return f"{sorted((str(key), _plain(item, depth - 1)) for key, item in value.items())}"
    if callable(value) and hasattr(value, "__qualname__"):
        return f"{value.__module__}.{value.__qualname__}"
    # a module's parameters and code have digests of their own
    inside = vars(value) if hasattr(value, "__dict__") and not isinstance(value, nn.Module) else {}
    return f"{type(value).__qualname__} {_plain(inside, depth - 1) if depth else ''}"


def _sources(model: nn.Module, builders: Iterable[Any]) -> Iterable[str]:
    """The source files of the model's classes and builders, and of the user's modules that these import."""
    classes = {cls for module in model.modules() for cls in type(module).__mro__}
    todo = {sys.modules.get(code.__module__) for code in (*classes, *builders) if hasattr(code, "__module__")}
    seen: dict[str, ModuleType] = {}
    while todo:
        module = todo.pop()
        file = getattr(module, "__file__", None)
        if module is None or file is None or file in seen or module.__name__.partition(".")[0] in ("torch", "colrow"):
            continue
        seen[file] = module
        if not file.startswith(_INSTALLED):
            todo |= {_module_of(value) for value in list(vars(module).values())}
    for file in sorted(seen):
        yield Path(file).name
        yield Path(file).read_text(encoding="utf-8", errors="replace") if file.endswith(".py") else ""


_INSTALLED = tuple({sysconfig.get_paths()[name] for name in ("stdlib", "platstdlib", "purelib", "platlib")})
"""Folders of libraries: of these, only the files that define the model's classes are read."""


def _module_of(value: Any) -> ModuleType | None:
    if isinstance(value, ModuleType):
        return value
    name = getattr(value, "__module__", None)
    return sys.modules.get(name) if isinstance(name, str) else None

"""Results of a run's start that the next start may use again: the derived plan, and what the check printed.

They lie in the run's folder with digests of all that they depend on. Plans that needed a proof are in `kept_proof`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from colrow.data.disk import atomic_write, read_kept

FILE = "start.json"


@dataclass(frozen=True)
class KeptStart:
    """One result: the derived `plan`, as YAML, or the lines that the `check` prints.

    Attributes:
        depends: gives digests of what the result depends on (`kept_proof.dependencies`). It reads all sources, so it is
            called only where there is a result to compare.
    """

    folder: Path
    what: Literal["plan", "check"]
    depends: Callable[[], Mapping[str, str]]

    def find(self) -> Any:
        """The result of an earlier start; None where there is none, or what it depends on has changed."""
        kept = self._read().get(self.what)
        if not isinstance(kept, dict) or kept.get("depends") != dict(self.depends()):
            return None
        found = kept.get("found")
        lines = found if isinstance(found, list) else [found]
        is_readable = isinstance(found, str if self.what == "plan" else list)
        return found if is_readable and all(isinstance(line, str) for line in lines) else None

    def keep(self, found: Any) -> None:
        """Write a result. Where the folder cannot be written, the next start computes it again."""
        tree = self._read() | {self.what: {"depends": dict(self.depends()), "found": found}}
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            atomic_write(self.folder / FILE, json.dumps(tree, indent=1) + "\n")
        except OSError:
            return

    def _read(self) -> dict[str, Any]:
        return read_kept(self.folder / FILE, dict[str, Any]) or {}

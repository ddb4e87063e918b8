"""What a start found about the run's plan, in its folder, with all that it depends on: a restart derives no plan again,
and checks none again that needed no proof (`kept_proof` has those that did)."""

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
    """One of the things found: the derived `plan`, as YAML, or the lines that the `check` prints.

    Attributes:
        depends: digests of what it depends on (`kept_proof.dependencies`). Not asked where nothing is kept.
    """

    folder: Path
    what: Literal["plan", "check"]
    depends: Callable[[], Mapping[str, str]]

    def find(self) -> Any:
        """What was found before; None where nothing was, or what it depends on has changed."""
        kept = self._read().get(self.what)
        if not isinstance(kept, dict) or kept.get("depends") != dict(self.depends()):
            return None
        found = kept.get("found")
        lines = found if isinstance(found, list) else [found]
        is_readable = isinstance(found, str if self.what == "plan" else list)
        return found if is_readable and all(isinstance(line, str) for line in lines) else None

    def keep(self, found: Any) -> None:
        """Write it. A folder that cannot be written costs the next start this work, and this one nothing."""
        tree = self._read() | {self.what: {"depends": dict(self.depends()), "found": found}}
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            atomic_write(self.folder / FILE, json.dumps(tree, indent=1) + "\n")
        except OSError:
            return

    def _read(self) -> dict[str, Any]:
        return read_kept(self.folder / FILE, dict[str, Any]) or {}

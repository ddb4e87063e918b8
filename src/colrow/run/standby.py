"""Ranks on standby: started while their launcher still checks, they import what they need and wait for its orders.

The launcher names a folder of its own in an environment variable, and writes the orders there. No torch here: a rank
begins to listen before its imports, so that a run that is refused ends it within a tenth of a second.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

VARIABLE = "COLROW_STANDBY"
"""`PID:FOLDER` of the launcher, in the environment of its ranks."""
_FILE = "orders.json"
_POLL_SECONDS = 0.05


@dataclass(frozen=True)
class Orders:
    """What a launcher that has accepted a run tells its ranks.

    Attributes:
        plan: SHA-256 of the run folder's plan.yaml, so that a rank cannot read another plan than was checked.
        clock: `startup.reading()`.
    """

    plan: str
    clock: Mapping[str, Any] | None


def announce(folder: Path) -> None:
    """Let processes that are started from here, and take themselves for ranks, stand by."""
    os.environ[VARIABLE] = f"{os.getpid()}:{folder}"


def give(folder: Path, orders: Orders | None) -> bool:
    """Let the ranks go on; None ends them. The first orders hold: returns whether these are the first."""
    partial = folder / f"{_FILE}.partial"
    partial.write_text(json.dumps(None if orders is None else asdict(orders)), encoding="utf-8")
    try:
        os.link(partial, folder / _FILE)  # complete at once, and never over an earlier one
    except FileExistsError:
        return False
    finally:
        partial.unlink()  # both names have the same bytes, which the next call would change
    return True


class Standby:
    """A rank that stands by, from here on: it ends where its launcher does not let it go on, or is gone."""

    def __init__(self, launcher: int, folder: Path) -> None:
        self._launcher, self._file = launcher, folder / _FILE
        self._orders: Orders | None = None
        self._thread = threading.Thread(target=self._listen, name="standby", daemon=True)
        self._thread.start()

    @classmethod
    def begin(cls) -> Standby | None:
        """None where no launcher of colrow's has started this process, or none that checks meanwhile."""
        pid, _, folder = os.environ.pop(VARIABLE, "").partition(":")
        return cls(int(pid), Path(folder)) if pid else None

    def wait(self) -> Orders:
        """The orders, once they have come."""
        self._thread.join()
        assert self._orders is not None
        return self._orders

    def _listen(self) -> None:
        while not self._file.exists():
            if not self._file.parent.exists() or not _is_alive(self._launcher):
                os._exit(1)
            time.sleep(_POLL_SECONDS)
        tree = json.loads(self._file.read_text(encoding="utf-8"))
        if tree is None:
            os._exit(0)  # no failure of this rank: its launcher says what was wrong
        self._orders = Orders(**tree)


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True

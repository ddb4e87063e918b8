"""What operators did, noted as they do it: for the line that says what ran, of facts and not of options.

A process trains one model, so that one record is enough; `forget` begins a new one.
"""

from __future__ import annotations

_NOTED: dict[tuple[str, str], None] = {}


def note(kind: str, what: object) -> None:
    """Note that this ran. Called at each run, in what an operator has inside and torch.compile never looks into."""
    _NOTED[(kind, str(what))] = None


def noted(kind: str) -> list[str]:
    """What was noted of this kind, in the order in which it came first."""
    return [what for k, what in _NOTED if k == kind]


def forget() -> None:
    """Forget what was noted so far."""
    _NOTED.clear()

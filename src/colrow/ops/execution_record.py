"""Which of its ways each operator ran: recorded as it runs, so that the log line tells facts and not options.

A process trains one model, so one record is enough; `clear` begins a new one.
"""

from __future__ import annotations

_RECORD: dict[tuple[str, str], None] = {}


def record(what: str, value: object) -> None:
    """Record that this ran. Inside an operator torch.compile does not look: it is called in every step."""
    _RECORD[(what, str(value))] = None


def recorded(what: str) -> list[str]:
    """The values recorded under this name, in the order in which each came first."""
    return [value for name, value in _RECORD if name == what]


def clear() -> None:
    _RECORD.clear()

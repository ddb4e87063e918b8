"""Who waits for a derivation is told what it does."""

from __future__ import annotations

import threading
import time

from colrow.derive.progress import Progress


def test_a_line_says_the_phase_and_then_another() -> None:
    said: list[str] = []
    threads = threading.active_count()
    with Progress("deriving a plan for Gpt", said.append, first=0.01, then=0.01) as progress:
        for phase in ("tracing", "checking a plan"):
            progress.at(phase)
            before = len(said)
            while len(said) < before + 2:  # the first may have been under way
                time.sleep(0.005)
    assert said[0].startswith("deriving a plan for Gpt: tracing, 0 s so far")
    assert "checking a plan" in said[-1]
    assert threading.active_count() == threads


def test_what_is_quick_says_nothing() -> None:
    said: list[str] = []
    with Progress("deriving", said.append):
        pass
    with Progress("deriving", None) as silent:
        silent.at("tracing")
    assert said == []

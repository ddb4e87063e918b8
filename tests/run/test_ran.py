"""The line that says what ran: of what operators noted, of nothing that was only asked for."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from colrow.ops.ran import forget, note, noted
from colrow.plans.plan import Plan
from colrow.run import ran
from colrow.run.ran import ran_line, steps_before, what_ran
from distributed.parity import SHALLOW_MODELS


@pytest.fixture
def training(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A training of one rank on the CPU, as far as the line asks it."""

    def gather(everywhere: list[Any], found: Any) -> None:
        everywhere[0] = found

    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 1)
    monkeypatch.setattr(torch.distributed, "all_gather_object", gather)
    forget()
    plan = Plan.preset("llama-fast", "linear").with_fp8("rowwise")
    shape = SHALLOW_MODELS["gqa-1"]
    yield SimpleNamespace(
        plan=plan, compiled=True, graphs=(), device=torch.device("cpu"), source=SimpleNamespace(config=shape)
    )
    forget()


def test_what_was_asked_for_is_not_what_ran(training: Any) -> None:
    """The plan names fused columns, 8-bit floats and the linear loss; nothing has run yet."""
    training.compiled = False
    assert what_ran(training, 32) == "eager"


def test_what_operators_noted_is_said_once(training: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ran, "_graphs_compiled", lambda: True)
    for _ in range(2):
        for kind, what in (("columns", 3), ("columns", 2), ("beside", "collectives"), ("loss", "triton")):
            note(kind, what)
    assert noted("columns") == ["3", "2"]
    said = what_ran(training, 32)
    assert said == ("fused qkv, gate/up, overlapped scatter, linear cross entropy in Triton, compiled blocks")
    lines = ran_line(said).splitlines()
    assert all(len(line) <= 80 for line in lines)
    assert lines[0].startswith("ran        fused")


def test_blocks_that_nothing_compiled_are_eager(training: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ran, "_graphs_compiled", lambda: False)
    assert what_ran(training, 32) == "eager"


def test_graphs_are_waited_for(training: Any) -> None:
    assert steps_before(training) == 1
    waiting = replace_graphs(training, False)
    assert steps_before(waiting) == 3
    assert "CUDA graphs" not in what_ran(waiting, 32)
    assert "CUDA graphs" in what_ran(replace_graphs(training, True), 32)


def replace_graphs(training: Any, captured: bool) -> Any:
    return SimpleNamespace(**{**vars(training), "graphs": (SimpleNamespace(captured=captured),)})

"""The line that says what ran: from what operators recorded, not from what was only requested."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from colrow.ops.execution_record import clear, record, recorded
from colrow.plans.plan import Plan
from colrow.run import executed
from colrow.run.executed import executed_paths, steps_until_known
from colrow.run.progress import labelled
from colrow.train.cuda_graph import EAGER_STEPS
from helpers.parity import SHALLOW_MODELS


@pytest.fixture
def training(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A training of one rank on the CPU, as far as the line asks it."""

    def gather(everywhere: list[Any], found: Any) -> None:
        everywhere[0] = found

    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 1)
    monkeypatch.setattr(torch.distributed, "all_gather_object", gather)
    clear()
    plan = Plan.preset("llama-fast", "linear").with_fp8("tensorwise")
    shape = SHALLOW_MODELS["gqa-1"]
    yield SimpleNamespace(
        plan=plan,
        compiled=True,
        graphs=(),
        eager_steps=EAGER_STEPS,
        device=torch.device("cpu"),
        source=SimpleNamespace(config=shape),
    )
    clear()


def test_what_was_asked_for_is_not_executed_paths(training: Any) -> None:
    """The plan names fused columns, 8-bit floats and the linear loss; nothing has run yet."""
    training.compiled = False
    assert executed_paths(training, 32) == "eager"


def test_what_operators_noted_is_reported_once(training: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(executed, "compiled_graph_count", lambda: 1)
    for _ in range(2):
        for kind, what in (
            ("columns", 3),
            ("columns", 2),
            ("beside", "collectives"),
            ("loss", "triton"),
            ("fused", "SwiGLU in Triton"),
        ):
            record(kind, what)
    assert recorded("columns") == ["3", "2"]
    reported = executed_paths(training, 32)
    assert reported == (
        "fused qkv, gate/up, overlapped scatter, linear cross entropy in Triton, SwiGLU in Triton, compiled blocks"
    )
    lines = labelled("ran", reported).splitlines()
    assert all(len(line) <= 80 for line in lines)
    assert lines[0].startswith("ran        fused")


def test_blocks_that_nothing_compiled_are_eager(training: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(executed, "compiled_graph_count", lambda: 0)
    assert executed_paths(training, 32) == "eager"


def test_graphs_are_waited_for(training: Any) -> None:
    assert steps_until_known(training) == 1
    waiting = replace_graphs(training, False)
    assert steps_until_known(waiting) == 3
    assert "CUDA graphs" not in executed_paths(waiting, 32)
    assert "CUDA graphs" in executed_paths(replace_graphs(training, True), 32)


def replace_graphs(training: Any, captured: bool) -> Any:
    return SimpleNamespace(**{**vars(training), "graphs": (SimpleNamespace(captured=captured),)})


def test_a_plan_that_gathers_queries_computes_all_heads() -> None:
    article = Plan.preset("article")
    copy = Plan(article.modules, article.loss, "a copy")
    assert executed._gathers_heads(copy)
    assert not executed._gathers_heads(Plan.preset("llama"))
    assert not executed._gathers_heads(Plan.preset("llama-fast"))

"""Every rule of the table: the operation on shards is the shard of the operation, values and gradients, for each
class that the rules let be cut. The graph is captured before any decomposition, so that each operator stands in it."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from benchmarks.models.prove import Sabotage, ShardedRun
from colrow.derive.choice import Choice
from colrow.derive.choose import class_facts
from colrow.derive.infer import op_name
from colrow.derive.table import infer
from colrow.derive.trace import Trace
from colrow.sharding.operators import OPERATORS
from helpers.rule_cases import NO_AMINMAX, Case, cases
from helpers.variants import params

TOLERANCE = 1e-10
LOOSE = {"_grouped_mm": 5e-2}
"""The kernel takes bfloat16 alone."""


def captured(function: Callable[..., Tensor], x: Tensor, weights: Sequence[Tensor]) -> Trace:
    module = make_fx(function, pre_dispatch=True, tracing_mode="fake")(x, *weights)
    module.graph.eliminate_dead_code()
    holders = [n.name for n in module.graph.nodes if n.op == "placeholder"]
    constants = {str(n.target): getattr(module, str(n.target)) for n in module.graph.nodes if n.op == "get_attr"}
    program: Any = SimpleNamespace(graph=module.graph)
    return Trace(program, 3, 7, {h: h for h in holders[1:]}, constants, (holders[0],), {}, {})


class Outcome:
    """What a case gave: operators in its graph, those without a rule, classes that were cut, the worst error."""

    def __init__(self, case: Case, tp: int, sabotage: Sabotage = Sabotage.NONE) -> None:
        function, shapes = case
        torch.manual_seed(tp)
        x = torch.randn(3, 7, 5, dtype=torch.float64)
        weights = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in shapes]
        traced = captured(function, x, weights)
        inference = infer(traced)
        facts = class_facts(inference)
        self.operators = {op_name(n) for n in traced.nodes if n.op == "call_function"}
        self.unknown = dict(inference.unknown)
        self.free = [a for a in facts.volume if a.forbidden is None and a not in facts.twice and a.size % tp == 0]
        self.error = 0.0
        expected = function(x, *weights)
        probe = torch.randn(expected.shape, dtype=torch.float64)
        wanted = torch.autograd.grad((expected * probe).sum(), weights, allow_unused=True)
        for atom in self.free:
            values = {traced.inputs[0]: x, **dict(zip(traced.parameters, weights, strict=True))}
            out = ShardedRun(traced, inference, Choice(tp, {atom}), sabotage)(values)
            found = torch.autograd.grad((out * probe).sum(), weights, allow_unused=True)
            pairs = [(out, expected), *((g, w) for g, w in zip(found, wanted, strict=True) if w is not None)]
            self.error = max(self.error, *(float((a - b).detach().abs().max()) for a, b in pairs))


@contextlib.contextmanager
def no_reports() -> Iterator[None]:
    with contextlib.redirect_stderr(io.StringIO()):
        yield


@pytest.mark.parametrize(("tp", "times"), params([(2, 2), (3, 1)], lambda tp, times: tp == 3))
def test_every_rule_gives_the_shard_of_the_operation(tp: int, times: int) -> None:
    wrong = {}
    for name, case in cases(tp, tp * times * 2).items():
        with no_reports():
            got = Outcome(case, tp)
        if name not in got.operators:
            wrong[name] = f"its graph has {sorted(got.operators)}"
        elif got.unknown:
            wrong[name] = f"no rule for {got.unknown}"
        elif not got.free:
            wrong[name] = "no class can be cut"
        elif got.error > LOOSE.get(name, TOLERANCE):
            wrong[name] = f"error {got.error:.1e}"
    assert not wrong


def test_every_rule_has_a_case() -> None:
    with_rule = {op.name for op in OPERATORS.values() if op.rule} - ({"aminmax"} if NO_AMINMAX else set())
    missing, surplus = with_rule - cases(2, 4).keys(), cases(2, 4).keys() - with_rule
    assert not missing, f"add a case to tests/helpers/rule_cases.py for each of {sorted(missing)}"
    assert not surplus, f"without a rule in sharding/operators.py, yet with a case: {sorted(surplus)}"


@pytest.mark.parametrize(
    "name",
    ["linear", "mm", "addmm", "einsum", "conv2d", "grouped_mm_fallback", "embedding", "tensordot", "bilinear"],
)
def test_a_product_without_its_reduction_is_wrong(name: str) -> None:
    assert Outcome(cases(2, 8)[name], 2, Sabotage.DROPPED).error > 1e-3


@pytest.mark.parametrize("name", ["chunk", "glu", "slice", "split_with_sizes", "cat"])
def test_contiguous_shards_of_pieces_are_wrong(name: str) -> None:
    assert Outcome(cases(2, 8)[name], 2, Sabotage.CONTIGUOUS).error > 1e-3

"""Plans broken at random: one style of a sound plan left out, or another in its place.

What then trains wrongly must get an error from the check, and what trains right none. A sample runs here; all of a
model's are run by

    python tests/checking/test_mutants.py MODEL[:fast] TP      # llama, or a type of transformers
"""

from __future__ import annotations

import copy
import logging
import random
import sys
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace

import pytest
from torch import Tensor, nn

from benchmarks.models.examine import TOLERANCE, TOLERANCE_FP32, narrow, prepared
from benchmarks.models.tiny import classes, tiny
from colrow.checking.check import check
from colrow.derive.trace import trace
from colrow.errors import PlanError
from colrow.mesh import Mesh
from colrow.plans.plan import Plan
from colrow.styles.base import STYLES
from colrow.verifying.backends import RankFailure
from colrow.verifying.verify import parity
from helpers.parity import batch, build

LLAMA = "qk_norm_kv3-1"  # 12 query and 3 kv heads: whole kv heads fit a part of the query heads
SAMPLE = 12


def mutants(plan: Plan) -> Iterator[tuple[str, str, Plan]]:
    """The key, what became of its style, and the plan."""
    for key, own in plan.modules.items():
        rest = {other: style for other, style in plan.modules.items() if other != key}
        yield key, "left out", replace(plan, modules=rest)
        for name in STYLES.keys() - {"opaque", own.name}:
            try:
                yield key, name, replace(plan, modules={k: name if k == key else s for k, s in plan.modules.items()})
            except PlanError:  # the style needs options
                continue


class Judge:
    """What becomes of a plan of this model: `right`, `wrong`, or `raises`; and whether the check gives an error."""

    def __init__(self, model: nn.Module, inputs: tuple[Tensor, ...], tp: int, tolerance: float = TOLERANCE) -> None:
        self.model, self.inputs, self.tp, self.tolerance = model, inputs, tp, tolerance

    def truth(self, plan: Plan) -> str:
        try:
            errors = parity(self.model, plan, self.tp, self.inputs)
        except (RankFailure, PlanError):
            return "raises"
        return "right" if errors.worst <= self.tolerance else "wrong"

    def refused(self, plan: Plan) -> bool:
        found = check(copy.deepcopy(self.model), plan, Mesh(tp=self.tp), *self.inputs[0].shape)
        return any(finding.severity == "error" for finding in found)


def llama(tp: int) -> Judge:
    return Judge(build(LLAMA, "cpu"), batch("cpu")[:1], tp)


@pytest.mark.parametrize("name", ["llama", pytest.param("llama-fast", marks=pytest.mark.exhaustive)])
def test_what_is_broken_at_random_gets_an_error(name: str) -> None:
    judge, plan = llama(2), Plan.preset(name)
    assert (judge.truth(plan), judge.refused(plan)) == ("right", False)
    found = sorted(mutants(plan), key=lambda mutant: mutant[:2])
    seen = [(key, what, judge.truth(p), judge.refused(p)) for key, what, p in random.Random(0).sample(found, SAMPLE)]
    assert [one for one in seen if one[2:] in (("wrong", False), ("right", True))] == []


def test_a_check_without_a_rule_lets_mutants_through(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("colrow.checking.dynamic._replicated_kv_heads", lambda got, want: None)
    judge, plan = llama(2), Plan.preset("llama")
    broken = replace(plan, modules=plan.modules | {"layers.*.self_attn.k_proj": "local_shards"})
    assert (judge.truth(broken), judge.refused(broken)) == ("wrong", False)


def main(name: str, tp: int) -> None:
    """All mutants of a model's plan, and those that the check judges wrongly."""
    kind, _, styles = name.partition(":")
    if kind == "llama":
        judge, plan = llama(tp), Plan.preset("llama-fast" if styles else "llama")
    else:
        model, inputs = prepared(tiny(*classes(kind), num_hidden_layers=1), tp)
        traced = trace(model, inputs)
        judge = Judge(model, inputs, tp, TOLERANCE_FP32 if narrow(traced) else TOLERANCE)
        plan = Plan.derive(model, tp, styles="fast" if styles else "plain", inputs=inputs, traced=traced)
    counts = Counter[tuple[str, bool]]()
    for key, what, mutant in mutants(plan):
        truth, refused = judge.truth(mutant), judge.refused(mutant)
        counts[truth, refused] += 1
        if truth != "raises" and refused == (truth == "right"):
            print(f"{key}: {what}: {truth}, and the check gives {'an' if refused else 'no'} error", flush=True)
    print(", ".join(f"{n} {truth} {'refused' if refused else 'accepted'}" for (truth, refused), n in counts.items()))


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    main(sys.argv[1], int(sys.argv[2]))

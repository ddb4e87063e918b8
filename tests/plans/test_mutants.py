"""Plans broken at random: one style of a sound plan left out, or another in its place.

What then trains wrongly must get an error from the check, and what trains right none. A sample runs here; all of a
model's are run by

    python tests/plans/test_mutants.py MODEL[:fast] TP      # llama, or a type of transformers
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
import torch
from torch import nn

from colrow.errors import PlanError
from colrow.mesh import Mesh
from colrow.models.llama import Llama, LlamaConfig
from colrow.plans.calls import example_input, loss_of
from colrow.plans.check import check
from colrow.plans.derive.tiny import classes, tiny
from colrow.plans.plan import Plan
from colrow.plans.styles import STYLES
from colrow.plans.verify import EXACT, ROUNDED, _prepare, _reference
from colrow.plans.verify.backends import RankFailure, run_local
from colrow.plans.verify.sharded import compare
from colrow.plans.verify.step import Task

SIZES = LlamaConfig(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=1,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=64,
    qk_norm=True,
)
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

    def __init__(self, model: nn.Module, tp: int) -> None:
        self.model, self.tp = _prepare(model, 0), tp
        torch.manual_seed(1)
        task = Task(self.model, (example_input(self.model, 2, 16),), loss_of, tp)
        self.task, self.reference, exact = _reference(task)
        self.limit = EXACT if exact else ROUNDED

    def truth(self, plan: Plan) -> str:
        try:
            observed = run_local(self.task, plan)
        except (RankFailure, PlanError):
            return "raises"
        return "right" if compare(observed, self.reference, self.tp).worst <= self.limit else "wrong"

    def refused(self, plan: Plan) -> bool:
        found = check(copy.deepcopy(self.model), plan, Mesh(tp=self.tp), 2, 16)
        return any(finding.severity == "error" for finding in found)


@pytest.mark.parametrize("name", ["llama", "llama-fast"])
def test_what_is_broken_at_random_gets_an_error(name: str) -> None:
    judge, plan = Judge(Llama(SIZES), 2), Plan.preset(name)
    assert (judge.truth(plan), judge.refused(plan)) == ("right", False)
    found = sorted(mutants(plan), key=lambda mutant: mutant[:2])
    seen = [(key, what, judge.truth(p), judge.refused(p)) for key, what, p in random.Random(0).sample(found, SAMPLE)]
    assert [one for one in seen if one[2:] in (("wrong", False), ("right", True))] == []


def test_a_check_without_a_rule_lets_mutants_through(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("colrow.plans.check.dynamic._whole_kv_heads", lambda got, want: None)
    judge, plan = Judge(Llama(SIZES), 2), Plan.preset("llama")
    broken = replace(plan, modules=plan.modules | {"layers.*.self_attn.k_proj": "local_shards"})
    assert (judge.truth(broken), judge.refused(broken)) == ("wrong", False)


def main(name: str, tp: int) -> None:
    """All mutants of a model's plan, and those that the check judges wrongly."""
    kind, _, styles = name.partition(":")
    if kind == "llama":
        model: nn.Module = Llama(SIZES)
        plan = Plan.preset("llama-fast" if styles else "llama")
    else:
        model = tiny(*classes(kind), num_hidden_layers=1)
        plan = Plan.derive(model, tp=tp, styles="fast" if styles else "plain")
    judge, counts = Judge(model, tp), Counter[tuple[str, bool]]()
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

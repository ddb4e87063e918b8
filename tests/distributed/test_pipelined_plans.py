"""Plans under pipeline stages: what four ranks compute is what the check says of the plan."""

from __future__ import annotations

import pytest

from colrow.checking.check import check
from colrow.mesh import Mesh
from colrow.plans.plan import Plan
from helpers.broken_plans import LOCAL_HEAD, block_mlp, llama, preset
from helpers.harness import Ranks
from helpers.mesh_parity import Case, run_cases

MESH = Mesh(pp=2, tp=2)
RIGHT: dict[str, Plan] = {
    "preset": preset(),
    "an MLP in one block": preset(**block_mlp()),
    "all tokens on each rank": Plan.preset("article"),
    "logits gathered": preset(loss="replicated", lm_head={**LOCAL_HEAD, "output": "replicate"}),
    "a key for each layer": Plan(
        {
            key.replace("layers.*", layer): style
            for key, style in preset().modules.items()
            for layer in (("layers.0", "layers.1") if "layers" in key else ("",))
        },
        loss="vocab_parallel",
    ),
}
WRONG: dict[str, Plan] = {
    "norm missing": preset(drop="layers.*.input_layernorm"),
    "norm of the last stage missing": preset(drop="norm"),
    "a block and a column in it sum the gradient": preset(**block_mlp(gate_proj="colwise")),
}


@pytest.mark.distributed
@pytest.mark.exhaustive  # presets on such meshes: test_every_mesh.py
def test_the_check_says_what_four_ranks_compute(ranks: Ranks) -> None:
    cases = {name: Case(MESH, micro=2, steps=1, plan=plan) for name, plan in (RIGHT | WRONG).items()}
    seen = ranks(4).run(run_cases, cases, timeout=500.0)
    errors = {name: max(rank[name].worst[1] for rank in seen) for name in cases}
    findings = {
        name: [f.code for f in check(llama(), plan, MESH, 4, 16) if f.severity == "error"]
        for name, plan in (RIGHT | WRONG).items()
    }
    assert {name for name, error in errors.items() if error < 1e-9} == RIGHT.keys()
    assert {name for name, error in errors.items() if error > 1e-3} == WRONG.keys()
    assert {name for name, codes in findings.items() if not codes} == RIGHT.keys()

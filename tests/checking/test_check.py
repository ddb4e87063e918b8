"""The check finds what is wrong with a plan, with the right code, and says nothing about sound ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel

from colrow.checking.check import CODES, Finding, check, check_static
from colrow.checking.options import COMPILED_BLOCKS_WAIT
from colrow.mesh import Mesh
from colrow.parallel.parallelize import parallelize
from colrow.plans.plan import Plan
from colrow.torch_compat import forget_shardings
from helpers import broken_models as m
from helpers.broken_plans import BROKEN, gpt_plan, handed_on, llama, preset, shallow
from helpers.parity import MODELS
from helpers.sound_plans import SOUND
from helpers.variants import params

PAGES = Path(__file__).parents[2] / "docs" / "checks"


def codes(found: list[Finding]) -> set[str]:
    return {f.code for f in found}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_plan_is_found_with_its_code(name: str) -> None:
    case = BROKEN[name]
    options = {"mesh": Mesh(tp=4), "batch_size": 2, "seq_len": 16, **(case.options or {})}
    found = check(case.model(), case.plan(), **options)
    assert codes(found) == {case.expected}, [str(f) for f in found]
    if case.where:
        assert case.where in {f.where for f in found}
    assert all(f.message and f.fix and f.severity == CODES[f.code].severity for f in found)


@pytest.mark.parametrize(
    ("name", "loss", "tp", "model"),
    params(
        [(name, "vocab_parallel", 4, model) for name in ("llama", "article") for model in MODELS],
        exhaustive=lambda name, loss, tp, model: (
            name == "article" or model not in ("gqa", "kv1", "qk_norm_kv3", "odd_tied")
        ),
    )
    + [("article", "replicated", 2, "gqa"), ("llama", "replicated", 2, "kv3"), ("llama", "linear", 4, "tied")],
)
def test_sound_presets_have_no_findings(name: str, loss: Any, tp: int, model: str) -> None:
    layers = 2 if (name, loss) == ("llama", "vocab_parallel") else 1
    found = check(llama(model, num_hidden_layers=layers), Plan.preset(name, loss), Mesh(tp=tp), 2, 16)
    assert [str(f) for f in found] == []


def test_the_static_layer_works_alone() -> None:
    found = check_static(llama("kv3"), preset(self_attn__k_proj="colwise"), tp=4, seq_len=18)
    assert codes(found) == {"CR203", "CR205"}


def test_the_check_leaves_an_existing_process_group_alone() -> None:
    from torch.testing._internal.distributed.fake_pg import FakeStore

    torch.distributed.init_process_group("fake", store=FakeStore(), rank=1, world_size=2)
    try:
        assert check(m.Gpt(layers=1), gpt_plan(sequence=True), Mesh(tp=4), seq_len=16) == []
        assert codes(check(m.Gpt(layers=1), gpt_plan(sequence=True, norm=None), Mesh(tp=4), seq_len=16)) == {"CR501"}
        assert torch.distributed.get_world_size() == 2
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize(
    "options",
    [
        {"mesh": Mesh(pp=2, tp=4)},  # nothing is tied
        {"param_dtype": torch.bfloat16, "reduce_dtype": torch.bfloat16},
        {"param_dtype": torch.bfloat16},
        {"reduce_dtype": torch.float32},
    ],
)
def test_options_that_fit_have_no_findings(options: dict[str, Any]) -> None:
    found = check(shallow(), preset(), **{"mesh": Mesh(tp=4), "batch_size": 2, "seq_len": 16, **options})
    assert [str(f) for f in found] == []


@pytest.mark.parametrize("name", ["handed on", "sequence", "whole"])
def test_a_compiled_block_raises_as_the_check_says(name: str) -> None:
    from torch.testing._internal.distributed.fake_pg import FakeStore

    plan = handed_on() if name == "handed on" else gpt_plan(sequence=name == "sequence")
    model, ids = m.Gpt(layers=1), torch.zeros(2, 16, dtype=torch.long)
    reported = codes(check(model, plan, Mesh(tp=2), *ids.shape, compiled=True))
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    try:
        parallelize(model, plan, init_device_mesh("cpu", (2,), mesh_dim_names=("tp",)))
        model.blocks[0].compile(backend="aot_eager", fullgraph=True)
        if name == "handed on" and not COMPILED_BLOCKS_WAIT:
            assert reported == {"CR412"}
            with pytest.raises(AttributeError, match="_local_tensor"):
                model(ids).sum().backward()
        else:
            assert reported == set()
            model(ids).sum().backward()
    finally:
        torch.distributed.destroy_process_group()
        torch._dynamo.reset()


@pytest.mark.parametrize("name", SOUND)
def test_a_sound_plan_has_no_findings(name: str) -> None:
    model, plan = SOUND[name]
    assert [str(f) for f in check(model(), plan(), Mesh(tp=4), batch_size=2, seq_len=16)] == []


def test_the_check_leaves_the_model_alone() -> None:
    model = m.Gpt(layers=4)
    before = {name: (id(param), param.detach().clone()) for name, param in model.named_parameters()}
    check(model, gpt_plan(), Mesh(tp=2), seq_len=8)
    assert {name: id(param) for name, param in model.named_parameters()} == {k: i for k, (i, _) in before.items()}
    assert all(torch.equal(param, before[name][1]) for name, param in model.named_parameters())
    assert not any(mod._forward_hooks or mod._forward_pre_hooks for mod in model.modules())
    assert not torch.distributed.is_initialized()


def test_a_failed_check_leaves_the_next_one_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """DTensor keeps the mask of an embedding whose sum over ranks an exception has prevented."""
    left = gpt_plan(embed={"style": "rowwise", "input": "replicate", "output": "partial"})
    right = gpt_plan(embed={"style": "rowwise", "input": "replicate"})
    model = m.Gpt(layers=1)
    assert codes(check(model, left, Mesh(tp=2), 2, 16)) == {"CR401"}
    assert codes(check(model, right, Mesh(tp=2), 2, 16)) == set()
    for module in ("dry_run", "lockstep"):  # the negative control
        monkeypatch.setattr(f"colrow.dryrun.{module}.forget_shardings", lambda: None)
    check(model, left, Mesh(tp=2), 2, 16)
    assert codes(check(model, right, Mesh(tp=2), 2, 16)) == {"CR410", "CR414"}
    forget_shardings()


def test_every_code_has_a_case_and_a_page() -> None:
    here = set(CODES) - ({"CR412"} if COMPILED_BLOCKS_WAIT else set())  # a torch that has no such error
    assert here == {case.code for case in BROKEN.values()}, "each code has a case in tests/helpers/broken_plans.py"
    table = (PAGES / "README.md").read_text(encoding="utf-8")
    for code, about in CODES.items():
        text = (PAGES / f"{code}.md").read_text(encoding="utf-8")
        assert text.partition("\n")[0] == f"# {code} {about.slug}"
        row = f"| [{code}]({code}.md) | {about.slug} | {about.severity} | {about.effect} |"
        assert row in table.splitlines(), "the row is missing in docs/checks/README.md"
        for heading in ("## What happens", "## Why", "## Fix"):
            assert heading in text, f"{code} has no {heading!r}"


def test_a_finding_is_plain_data_and_names_its_page() -> None:
    one = Finding("CR501", "error", "norm.weight", "a message", "a fix")
    assert set(one.to_data()) == {"code", "severity", "where", "message", "fix"}
    assert one.page == "docs/checks/CR501.md"
    assert one.slug == "partial-gradient"


class AsksForValues(ColwiseParallel):
    """A style whose code branches on values."""

    def _apply(self, module: nn.Module, device_mesh: Any) -> nn.Module:
        module.register_forward_pre_hook(lambda _, args: None if args[0].sum().item() > 0 else args)
        return super()._apply(module, device_mesh)


def test_a_style_that_needs_values_is_left_to_verify() -> None:
    found = check(m.Gpt(layers=1), gpt_plan(mlp__up=AsksForValues()), Mesh(tp=2), 2, 16)
    assert [(f.code, f.where, f.severity) for f in found if f.code != "CR414"] == [
        ("CR410", "blocks.0.mlp.up", "warning")
    ]


@pytest.mark.parametrize(("factor", "expected"), [(1.0, set()), (0.5, {"CR305"})])
def test_a_margin_of_log_probabilities_is_sound(factor: float, expected: set[str]) -> None:
    """Its gradient sums to zero over the classes, as cross entropy's does, so that a rank need not know the others'."""

    def margin(logits: Tensor, inputs: Any) -> Tensor:
        p = F.log_softmax(logits, -1)
        return (factor * p[..., 0] - p[..., 1]).square().mean()

    assert codes(check(m.Gpt(layers=1), gpt_plan("vocab_parallel"), Mesh(tp=2), 2, 16, loss=margin)) == expected

"""Derived plans of fast styles: on our own models, on small ones made to fit or not, and what is refused.

`test_families` proves them on models of transformers.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks.models.examine import TOLERANCE
from colrow.derive.derivation import derive
from colrow.dryrun.dry_run import dry_run
from colrow.errors import ConfigError, PlanError
from colrow.mesh import Mesh
from colrow.models.llama import Llama
from colrow.plans.derive_options import DERIVED, DeriveOptions
from colrow.plans.named import named_plan
from colrow.plans.plan import Plan
from colrow.verifying.verify import parity, verify
from helpers.collectives import FEWEST, per_layer
from helpers.parity import SHALLOW_MODELS
from helpers.variants import params

FAST = DeriveOptions(styles="fast")


def own(name: str) -> Llama:
    with torch.device("meta"):
        return Llama(SHALLOW_MODELS[f"{name}-1"])


@pytest.mark.parametrize(("styles", "name"), params([("fast", "kv1"), ("overlap", "qk_norm_kv3")], lambda *_: True))
def test_on_our_own_models_it_is_the_preset(name: str, styles: str) -> None:
    """The same parameters in the same places, and the same collectives in the same order."""
    model = own(name)
    derived, preset = named_plan(f"derive-{styles}", model, 4, "linear"), Plan.preset(f"llama-{styles}", "linear")
    for plan in (derived, preset):
        overlaps = {getattr(style, "overlap", "") for style in plan.modules.values()} - {""}
        assert overlaps == {"copy_engine" if styles == "overlap" else "collectives"}
    lies = [
        {key: (layout.placement, layout.local_shape) for key, layout in plan.parameters(model, 4).items()}
        for plan in (derived, preset)
    ]
    assert lies[0] == lies[1]
    runs = [dry_run(model, plan, Mesh(tp=4), 2, 16) for plan in (derived, preset)]
    seen = [[(c.op, c.pass_, c.where, c.bytes, c.times) for c in run.collectives] for run in runs]
    assert seen[0] == seen[1]
    assert per_layer(runs[0], "layers.0.") == FEWEST


def test_verify_proves_it_in_one_process_and_catches_a_broken_one() -> None:
    plan = named_plan("derive-fast", own("qk_norm"), 2)
    report = verify(own("qk_norm"), plan, 2)
    assert report.ok, report
    assert report.backend == "local"
    assert report.control is not None
    assert report.control.caught
    without = {key: style for key, style in plan.modules.items() if not key.endswith("q_norm")}
    broken = verify(own("qk_norm"), replace(plan, modules=without), 2, backend="local")
    assert not broken.ok
    assert broken.worst[0].name.endswith("q_norm.weight")


# ---------------------------------------------------------------------- what has no flattened tokens


class Residual(nn.Module):
    """Two products beside a stream, and what a test adds to it."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(32)
        self.up, self.down = nn.Linear(32, 64), nn.Linear(64, 32)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.up(self.norm(x)).relu())


class Gated(nn.Module):
    """A block whose input goes into products and elsewhere, and whose sum stays open until its end."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.gate = nn.Linear(32, 64), nn.Linear(64, 32), nn.Linear(32, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x).relu()) * self.gate(x).sigmoid()


class Toy(nn.Module):
    def __init__(self, between: str = "") -> None:
        super().__init__()
        self.layers = nn.ModuleList([Residual(), Residual()])
        self.gated = Gated()
        self.head = nn.Linear(32, 32)
        self.between = between

    def forward(self, x: Tensor, of_each: Tensor) -> Tensor:
        x = self.layers[0](x)
        if self.between == "sequence":
            x = x + of_each[:, None]
        elif self.between == "earlier token":
            x = x + torch.cat([x[:, :1], x[:, :-1]], 1)
        elif self.between == "other sequences":
            x = x - x.mean(0)
        elif self.between == "position":
            x = x + torch.linspace(0, 1, x.shape[1], dtype=x.dtype, device=x.device)[:, None]
        elif self.between == "gated":
            x = x + self.gated(x)
        elif self.between == "flat":
            return self.head(self.layers[1](x.view(-1, 32)).view(x.shape))
        out = self.head(self.layers[1](x))
        return out.tanh() if self.between == "capped" else out


BLOCK = {"style": "fast_block", "gather": [0], "scatter": [0]}
TOYS = (torch.randn(3, 34, 32, dtype=torch.float64), torch.randn(3, 32, dtype=torch.float64))


@pytest.mark.parametrize(("between", "blocks"), [("gated", {"gated": BLOCK}), ("flat", {})])
def test_a_model_of_ones_own_runs_on_fast_styles(between: str, blocks: dict[str, Any]) -> None:
    """Columns without a module around them gather for themselves; tokens may be viewed as one dimension."""
    torch.manual_seed(0)
    model = Toy(between).double()
    plan = derive(model, 2, inputs=TOYS, options=FAST).plan()
    assert plan.modules["layers.*.up"].name == "fast_column"
    assert {key: style.to_data() for key, style in plan.modules.items() if style.name == "fast_block"} == blocks
    assert parity(model, plan, 2, TOYS).worst < TOLERANCE


@pytest.mark.parametrize(
    ("between", "reason"),
    [
        ("sequence", "the stream meets a value of each sequence in the model"),
        ("earlier token", "sliced in part"),
        ("other sequences", "averaged over|summed over|reduced"),
        ("position", "the sequence is not dimension 1"),
    ],
)
def test_what_knows_the_order_of_tokens_is_refused(between: str, reason: str) -> None:
    with pytest.raises(PlanError, match=reason) as error:
        derive(Toy(between).double(), 2, inputs=TOYS, options=FAST)
    assert "use plan derive" in str(error.value)


class Scaled(nn.Linear):
    """A linear with a forward of its own, which a product alone would leave out."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


@pytest.mark.parametrize("name", ["up", "down"])
def test_a_linear_with_a_forward_of_its_own_is_no_fast_product(name: str) -> None:
    model = Toy().double()
    setattr(model.layers[0], name, Scaled(*((32, 64) if name == "up" else (64, 32))).double())
    style = {"up": "fast_column", "down": "fast_rowwise"}[name]
    with pytest.raises(PlanError, match="a forward of its own"):
        Plan(modules={f"layers.0.{name}": style}).check_shapes(model, 2)


def test_a_head_whose_logits_are_changed_cannot_give_the_loss() -> None:
    with pytest.raises(PlanError, match="tanh changes the logits behind head"):
        derive(Toy("capped").double(), 2, inputs=TOYS, options=replace(FAST, loss="linear"))


# ---------------------------------------------------------------------- names


def test_the_names_of_derived_plans() -> None:
    assert DERIVED == {"derive": "plain", "derive-fast": "fast", "derive-overlap": "overlap"}
    with pytest.raises(ConfigError, match="derive, derive-fast, derive-overlap"):
        named_plan("derive-quick", own("gqa"), 2)
    with pytest.raises(PlanError, match="unknown styles 'fats'; did you mean 'fast'"):
        Plan.derive(own("gqa"), 2, styles="fats")  # type: ignore[arg-type]
    with pytest.raises(PlanError, match="loss linear"):
        named_plan("derive", own("gqa"), 2, "linear")

"""Fast styles around what a stream of flattened tokens meets: modules that look at more than one token and stay
unsharded, residuals that bypass the first block, streams side by side, blocks that share an input. Each is proved on
simulated ranks, all of them on two real ones."""

from __future__ import annotations

import copy
import functools
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.models.examine import TOLERANCE
from colrow.derive.derivation import derive
from colrow.derive.judged import Objection
from colrow.dryrun.calls import default_loss
from colrow.dryrun.dry_run import dry_run
from colrow.errors import PlanError
from colrow.mesh import Mesh
from colrow.parallel.loss import loss_context
from colrow.parallel.parallelize import parallelize
from colrow.plans.derive_options import DeriveOptions
from colrow.plans.plan import Plan
from colrow.sharding.grad_norm import align_gradients
from colrow.verifying.verify import parity
from helpers.collectives import per_layer
from helpers.harness import Ranks
from helpers.layers import MLP
from helpers.parity import relative, tp_mesh, whole
from helpers.variants import params

FAST = DeriveOptions(styles="fast")
D, HEADS = 32, 4
X = torch.randn(3, 40, D, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


class Heads(nn.Module):
    """Attention without its last product."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.value = nn.Linear(D, D), nn.Linear(D, D)
        self.key = nn.Linear(D, D, bias=False)  # a bias of keys has no gradient but rounding

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (y.view(*x.shape[:-1], -1, D // HEADS).transpose(1, 2) for y in self.products(x))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)

    def products(self, x: Tensor) -> list[Tensor]:
        return [self.query(x), self.key(x), self.value(x)]


class Attention(Heads):
    def __init__(self) -> None:
        super().__init__()
        self.dense = nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        return self.dense(super().forward(x))


class Past(nn.Module):
    """What it adds to a token depends on all before it, by code that no rule splits."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.mix, self.dropout = nn.LayerNorm(D), nn.Linear(D, D), nn.Dropout(0.1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        state = self.dropout(self.mix(self.norm(x)).cumsum(1))
        return state.tanh(), state[:, -1]


class Mixing(nn.Module):
    """A layer of which one module stays unsharded."""

    def __init__(self) -> None:
        super().__init__()
        self.past, self.norm, self.mlp = Past(), nn.LayerNorm(D), MLP(D, times=2)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.past(x)[0]
        return x + self.mlp(self.norm(x))


class Output(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.dense, self.norm = nn.Linear(width, D), nn.LayerNorm(D)

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        return self.norm(self.dense(x) + residual)


class PostNorm(nn.Module):
    """BERT's layer: products and residuals lie in other modules than the columns."""

    def __init__(self) -> None:
        super().__init__()
        self.heads, self.output, self.up, self.down = Heads(), Output(D), nn.Linear(D, 2 * D), Output(2 * D)

    def forward(self, x: Tensor) -> Tensor:
        x = self.output(self.heads(x), x)
        return self.down(F.gelu(self.up(x)), x)


class Streams(nn.Module):
    """Hyper-connections: a block reads a mixture of four streams and writes to each. [B, T, 4, D]"""

    def __init__(self) -> None:
        super().__init__()
        self.read, self.write = nn.Parameter(torch.rand(4, 1)), nn.Parameter(torch.rand(4, 1))
        self.norm, self.mlp = nn.LayerNorm(D), MLP(D, times=2)

    def forward(self, x: Tensor) -> Tensor:
        mixed = (x * self.read).sum(2)
        return x + self.mlp(self.norm(mixed))[:, :, None] * self.write


class Parallel(nn.Module):
    """Attention and MLP side by side, on one norm's output."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.attention, self.mlp, self.dropout = (
            nn.LayerNorm(D),
            Attention(),
            MLP(D, times=2),
            nn.Dropout(0.1),
        )

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        return x + self.dropout(self.attention(h) + self.mlp(h))


class Gated(nn.Module):
    """A gated MLP written out in the layer."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.gate, self.up, self.down = nn.LayerNorm(D), *(nn.Linear(D, D) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        return x + self.down(F.silu(self.gate(h)) * self.up(h))


class Convolution(nn.Module):
    """A depthwise convolution over tokens, between the two products of its block, whose code reads its weight."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.conv, self.down = nn.Linear(D, D), nn.Conv1d(D, D, 3, groups=D, padding=2), nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.conv.weight, self.conv.bias
        past = F.conv1d(self.up(x).transpose(1, 2), weight, bias, padding=2, groups=len(weight))[..., : x.shape[1]]
        return self.down(F.silu(past.transpose(1, 2)))


class Convolved(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.mixer = nn.LayerNorm(D), Convolution()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mixer(self.norm(x))


class Beside(Parallel):
    """The norm's output goes to the residual too, which is no block's."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        return h + self.attention(h) + self.mlp(h)


class Model(nn.Module):
    def __init__(self, layer: type[nn.Module], streams: int = 0) -> None:
        super().__init__()
        self.embed = nn.Linear(D, D)
        self.layers = nn.ModuleList([layer()])
        self.norm, self.head = nn.LayerNorm(D), nn.Linear(D, 96)
        self.streams = streams

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        if self.streams:
            x = x[:, :, None].expand(-1, -1, self.streams, -1)
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x.sum(2) if self.streams else x))


KEPT = ("Mixing", "PostNorm", "Streams", "Parallel", "Convolved")
"""What `make test` proves; the others vary these."""


def built(kind: str) -> nn.Module:
    torch.manual_seed(0)
    layer = {cls.__name__: cls for cls in (Mixing, PostNorm, Streams, Parallel, Gated, Beside, Convolved)}[kind]
    return Model(layer, 4 if layer is Streams else 0).double().eval()


@functools.cache
def derived(kind: str, tp: int = 2) -> tuple[nn.Module, Plan]:
    model = built(kind)
    return model, derive(model, tp, inputs=(X,), options=FAST).plan()


GATHER_ONCE = {
    "style": "fast_gather_output",
    "columns": ["attention.query", "attention.key", "attention.value", "mlp.up"],
}
WANTED: dict[str, dict[str, Any]] = {
    "Mixing": {"layers.0.past": {"style": "fast_gather_tokens", "outputs": [0]}},
    "PostNorm": {"layers.0.heads": {"style": "fast_gather", "columns": ["query", "key", "value"]}},
    "Streams": {"layers.0.mlp": {"style": "fast_gather", "columns": ["up"]}},
    "Parallel": {"layers.0.norm": GATHER_ONCE, "layers.0.attention": "fast_block", "layers.0.mlp": "fast_block"},
    "Gated": {"layers.0.norm": {"style": "fast_gather_output", "columns": ["gate", "up"]}},
    "Convolved": {"layers.0.mixer": {"style": "fast_gather", "columns": ["up"]}},
    "Beside": {"layers.0.mlp": {"style": "fast_gather", "columns": ["up"]}, "layers.0.norm": "grad_sum"},
}


@pytest.mark.parametrize("kind", params(WANTED, exhaustive=lambda kind: kind not in KEPT))
def test_each_kind_gets_its_styles(kind: str) -> None:
    _, plan = derived(kind)
    assert {key: plan.modules[key].to_data() for key in WANTED[kind]} == WANTED[kind]


@pytest.mark.exhaustive
@pytest.mark.parametrize("tp", [2, 4])
@pytest.mark.parametrize("kind", WANTED)
def test_each_kind_is_proved(kind: str, tp: int) -> None:
    model, plan = derived(kind, tp)
    assert parity(model, plan, tp, (X,)).worst < TOLERANCE


def test_tokens_are_flattened_from_the_first_layer_where_the_judge_refuses_it_from_the_embedding() -> None:
    """As of a model whose code counts tokens behind the embedding, where it would see a rank's."""
    model = Model(Parallel)
    model.embed = nn.Embedding(96, D)
    asked: list[Any] = []

    def judge(plan: Plan) -> Objection | None:
        asked.append(plan.modules["embed"].to_data())
        return Objection("it counts tokens", ("model",)) if len(asked) == 1 else None

    ids = torch.randint(96, (3, 40))
    found = derive(model, 2, inputs=(ids,), options=FAST, judge=judge)
    assert asked == ["fast_embedding", {"style": "fast_embedding", "all_tokens": True}]
    assert found.notes == ["no sequence shards: it counts tokens"]
    assert parity(model.double().eval(), found.plan(), 2, (ids,)).worst < TOLERANCE


# ---------------------------------------------------------------------- broken, they are wrong


def without(plan: Plan, key: str) -> Plan:
    return replace(plan, modules={name: style for name, style in plan.modules.items() if name != key})


def test_on_its_own_tokens_alone_an_unsharded_module_gives_another_result() -> None:
    model, plan = derived("Mixing")
    assert parity(model, without(plan, "layers.0.past"), 2, (X,)).loss > 1e-4


def test_its_gradients_must_not_be_summed() -> None:
    model, plan = derived("Mixing")
    summed = replace(plan, modules={**plan.modules, "layers.0.past.mix": "grad_sum"})
    errors = parity(model, summed, 2, (X,)).gradients
    assert {name for name, error in errors.items() if error > 0.5} == {
        f"layers.0.past.mix.{name}" for name in ("weight", "bias")
    }


def test_gradients_of_a_module_that_gathers_its_output_must_be_summed(monkeypatch: pytest.MonkeyPatch) -> None:
    from colrow.styles.fast import shared_gather

    model, plan = derived("Parallel")
    unsummed = shared_gather.ShardSpec(summed=False)
    monkeypatch.setattr(shared_gather, "ShardSpec", lambda: unsummed)
    errors = parity(model, plan, 2, (X,)).gradients
    assert {name for name, error in errors.items() if error > 1e-3} == {
        f"layers.0.norm.{name}" for name in ("weight", "bias")
    }


@pytest.mark.parametrize(
    ("columns", "text"),
    [([], "needs the option columns"), (["mlp.gate"], "no linear child"), (["mlp.up", "other.up"], "called alike")],
)
def test_a_gather_of_an_output_names_its_columns(columns: list[str], text: str) -> None:
    model = built("Parallel")
    model.layers[0].other = MLP(D, times=2).double()  # type: ignore[union-attr, index]
    plan = Plan(modules={"layers.0.norm": {"style": "fast_gather_output", "columns": columns}})
    with pytest.raises(PlanError, match=text):
        plan.check_shapes(model, 2)


# ---------------------------------------------------------------------- collectives, and real ranks


@pytest.mark.parametrize(
    ("kind", "reductions"), params([("Parallel", 2), ("Gated", 1)], exhaustive=lambda kind, _: kind not in KEPT)
)
def test_blocks_that_share_an_input_gather_it_once(kind: str, reductions: int) -> None:
    """One all-gather forward and its reduce-scatter backward; each row product has its own reduce-scatter, and the
    gather of that one's gradient."""
    model, plan = derived(kind)
    run = dry_run(model, plan, Mesh(tp=2), inputs=(X,))
    once = [("all_gather", "forward"), ("reduce_scatter", "backward")]
    each = [("reduce_scatter", "forward"), ("all_gather", "backward")] * reductions
    assert per_layer(run, "layers.0.") == sorted(once + each)


def errors_on_ranks(device: str, plans: dict[str, Plan], compiled: bool) -> dict[str, float]:
    """The worst relative error of loss and gradients of each model on this rank."""
    found = {}
    mesh = tp_mesh(device, torch.distributed.get_world_size())
    for kind, plan in plans.items():
        reference, x = built(kind).to(device), X.to(device)
        model: Any = parallelize(copy.deepcopy(reference), plan, mesh)
        for layer in model.layers if compiled else ():
            layer.forward = torch.compile(layer.forward, backend="aot_eager", fullgraph=True)
        want = default_loss(reference(x), (x,))
        want.backward()
        with loss_context(plan, mesh):
            loss = default_loss(model(x), (x,))
            loss.backward()
        align_gradients(model.parameters())
        expected = dict(reference.named_parameters())
        errors = [relative(whole(p.grad), expected[name].grad) for name, p in model.named_parameters()]
        found[kind] = max(relative(whole(loss), want.detach()), *errors)
    return found


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("tp", "compiled"), params([(2, False), (4, False), (2, True)], exhaustive=lambda *case: case != (2, False))
)
def test_real_ranks_give_one_process_gradients(ranks: Ranks, tp: int, compiled: bool) -> None:
    kinds = KEPT if (tp, compiled) == (2, False) else WANTED
    plans = {kind: derived(kind, tp)[1] for kind in kinds}
    for found in ranks(tp).run(errors_on_ranks, plans, compiled, timeout=400):
        assert found.keys() == plans.keys()
        assert max(found.values()) < TOLERANCE, found

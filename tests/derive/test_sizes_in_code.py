"""Attention whose code writes the unsharded model's sizes is split by heads: loss and gradients on real ranks."""

from __future__ import annotations

import contextlib
import functools
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from colrow.checking.check import check
from colrow.derive.derivation import derive
from colrow.derive.sizes import _Expected
from colrow.errors import PlanError
from colrow.mesh import Mesh
from colrow.parallel.parallelize import parallelize
from colrow.plans.derive_options import DeriveOptions
from colrow.plans.plan import Plan
from colrow.styles.local_sizes import LocalSizes, SizeRule, write_local_sizes
from colrow.verifying.backends import RankFailure
from colrow.verifying.verify import parity
from helpers.attentions import (
    HEADS,
    KINDS,
    OF_PACKAGES,
    VOCAB,
    D,
    FromExtents,
    Parallel,
    Sliced,
    SlicedFromEnd,
    TorchsOwn,
    Windowed,
    Written,
    language,
    train_case,
)
from helpers.harness import Ranks
from helpers.parity import tp_mesh
from helpers.variants import params

TOLERANCE = 1e-9
IDS = torch.randint(0, VOCAB, (2, 17), generator=torch.Generator().manual_seed(0))
ALL = (*KINDS, Written, nn.TransformerEncoderLayer)


@functools.cache
def derived(tp: int, *kinds: type[nn.Module]) -> Plan:
    options = DeriveOptions(sequence_parallel=kinds is ALL)
    found = derive(language(*kinds), tp, inputs=(IDS[:, :-1],), options=options)
    whole = {name for name in found.replicated if "norm" not in name and not name.endswith("bias")}
    whole -= {name for name in whole if name.endswith("context.weight")}  # makes what attention takes in
    assert not (
        whole if tp <= 2 else {n for n in whole if ".attn.k." not in n and ".attn.v." not in n}
    )  # 2 kv heads over 4 ranks
    return found.plan()


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("tp", "kinds"),
    params(
        [(2, (TorchsOwn,)), (2, ALL), (4, ALL), (4, (Parallel,)), (2, OF_PACKAGES), (4, OF_PACKAGES)],
        lambda tp, kinds: tp == 4 or len(kinds) > 1,
    ),
)
def test_every_kind_is_split_and_trains_as_one_process_does(ranks: Ranks, tp: int, kinds: Any) -> None:
    for errors in ranks(tp).run(train_case, kinds, IDS, derived(tp, *kinds).to_yaml()):
        assert len(errors) > 8 * len(kinds)
        assert max(errors.values()) < TOLERANCE, {k: v for k, v in errors.items() if v >= TOLERANCE}


@pytest.mark.parametrize(
    ("name", "written", "wanted"),
    [
        ("getitem", (32, 64), (16, 32)),
        ("getitem", (None, 32), (None, 16)),
        ("getitem", (-96, -64), (-48, 16)),  # the piece that begins the dim
        ("getitem", (-32, None), (-16, None)),
        ("narrow", (-96, 32), (-48, 16)),
        ("narrow", (64, 32), (32, 16)),
        ("getitem", (1, 8), (1, 8)),  # of another dim
        ("narrow", (-8, 8), (-8, 8)),
    ],
)
def test_bounds_of_a_piece_get_a_ranks(name: str, written: tuple[Any, ...], wanted: tuple[Any, ...]) -> None:
    pieces = {(first, 32, 96): (first // 2, 16, 48) for first in (0, 32, 64)}
    assert _Expected([], [], pieces, []).bounds(name, written) == wanted


@pytest.mark.parametrize("kind", params([Sliced, SlicedFromEnd, Windowed], lambda kind: True))
def test_slices_and_views_of_unsharded_tensors_keep_their_sizes_or_get_a_ranks(kind: type[nn.Module]) -> None:
    plan, model = derived(2, kind), language(kind)
    sizes = plan.modules["blocks.0.attn"].sizes
    assert sizes
    assert parity(model, plan, 2, (IDS[:, :-1],)).worst < TOLERANCE
    for call in (call for call, local in sizes.items() if "/tp" in local):
        rest = {other: local for other, local in sizes.items() if other != call}
        bare = replace(plan.modules["blocks.0.attn"], sizes=rest)
        less = replace(plan, modules={**plan.modules, "blocks.0.attn": bare})
        with contextlib.suppress(RankFailure):  # shapes do not fit
            assert parity(model, less, 2, (IDS[:, :-1],)).worst > 1e-3, call


@pytest.mark.exhaustive
@pytest.mark.distributed
def test_without_the_rules_numbers_are_wrong_and_said_to_be(ranks: Ranks) -> None:
    plan, model = derived(2, FromExtents), language(FromExtents)
    assert parity(model, plan, 2, (IDS[:, :-1],)).worst < TOLERANCE
    bare = replace(plan, modules={key: replace(style, sizes=None) for key, style in plan.modules.items()})
    assert bare != plan
    found = check(model, bare, Mesh(tp=2), inputs=(IDS[:, :-1],))
    assert any(f.severity == "error" for f in found) or parity(model, bare, 2, (IDS[:, :-1],)).worst > 1e-3
    for errors in ranks(2).run(train_case, (FromExtents,), IDS, bare.to_yaml()):
        assert max(errors.values()) > 1e-3


class Padded(nn.Module):
    """In evaluation torch's encoder makes nested tensors of the padding mask, where it can."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(D, HEADS, 2 * D, batch_first=True)
        self.embed, self.encoder = nn.Embedding(VOCAB, D), nn.TransformerEncoder(layer, 2)

    def forward(self, ids: Tensor) -> Tensor:
        return self.encoder(self.embed(ids), src_key_padding_mask=ids == 0)


PADDED = torch.cat([IDS[:, :12].clamp_min(1), torch.zeros(2, 4, dtype=torch.long)], -1)


def evaluation_case(device: str, plan: str) -> float:
    """The largest error of a rank's outputs in evaluation, padding left out."""
    one, model = (Padded().double().to(device).eval() for _ in range(2))
    parallelize(model, Plan.from_yaml(plan), tp_mesh(device, 2))
    one.encoder.use_nested_tensor = False
    ids = PADDED.to(device)
    with torch.no_grad():
        return float((model(ids) - one(ids))[:, :12].abs().max())


@pytest.mark.distributed
@pytest.mark.exhaustive
def test_torchs_encoder_evaluates_as_one_process_does(ranks: Ranks) -> None:
    options = DeriveOptions(sequence_parallel=False)
    found = derive(Padded(), 2, inputs=(PADDED,), options=options)
    assert "encoder.layers.0.self_attn.in_proj_weight" in found.sharded
    for error in ranks(2).run(evaluation_case, found.plan().to_yaml()):
        assert error < TOLERANCE


class Masked(nn.Module):
    """torch's encoder, or its decoder, with a mask of the tokens: `torch.triu` alone is one that torch detects."""

    def __init__(self, decodes: bool, is_band: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        kind = nn.TransformerDecoderLayer if decodes else nn.TransformerEncoderLayer
        around = nn.TransformerDecoder if decodes else nn.TransformerEncoder
        self.embed, self.stack = nn.Embedding(VOCAB, D), around(kind(D, HEADS, 2 * D, 0.0, batch_first=True), 1)
        self.is_band = is_band

    def forward(self, ids: Tensor) -> Tensor:
        x, length = self.embed(ids), ids.shape[1]
        mask = torch.full((length, length), float("-inf"), dtype=x.dtype, device=x.device).triu(1)
        if self.is_band:
            mask = mask + torch.full_like(mask, float("-inf")).tril(-4)
        if isinstance(self.stack, nn.TransformerDecoder):
            padding = (
                ids == 0
            )  # in a decoder it reaches the attention as it is: torch writes into zeros, and takes views
            return self.stack(x, x.flip(1), tgt_mask=mask, memory_mask=mask.T, memory_key_padding_mask=padding)
        return self.stack(x, mask=mask)


@pytest.mark.exhaustive
@pytest.mark.parametrize("is_band", [False, True])
@pytest.mark.parametrize("decodes", [False, True])
def test_torchs_encoder_and_decoder_with_masks_are_split_by_heads(decodes: bool, is_band: bool) -> None:
    model, inputs = Masked(decodes, is_band).double(), (IDS[:, :-1],)
    found = derive(model, 2, inputs=inputs, options=DeriveOptions(sequence_parallel=False))
    plan = found.plan()
    attentions = [name for name, module in model.named_modules() if isinstance(module, nn.MultiheadAttention)]
    assert len(attentions) == 1 + decodes
    assert {f"{name}.in_proj_weight" for name in attentions} <= {*found.sharded}
    assert not found.notes
    assert parity(model, plan, 2, inputs).worst < TOLERANCE
    (key,) = [key for key, style in plan.modules.items() if key.endswith("self_attn") and style.sizes]
    bare = replace(plan.modules[key], sizes=None)
    with contextlib.suppress(RankFailure):  # shapes do not fit
        assert parity(model, replace(plan, modules={**plan.modules, key: bare}), 2, inputs).worst > 1e-3


class Weighing(nn.Module):
    """torch's attention that makes its weights, too; self-attention, and of two tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm = nn.Embedding(VOCAB, D), nn.LayerNorm(D)
        self.own, self.cross = (nn.MultiheadAttention(D, HEADS, batch_first=True) for _ in range(2))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        x = x + self.own(x, x, x)[0]
        return self.norm(x + self.cross(x, x.flip(1), x.flip(1))[0])


def test_torchs_attention_is_proven_by_the_check() -> None:
    model, inputs = Weighing(), (IDS[:, :-1],)
    plan = derive(model, 2, inputs=inputs, options=DeriveOptions(sequence_parallel=False)).plan()
    assert {key for key, style in plan.modules.items() if style.sizes} == {"own", "cross"}
    assert not check(model, plan, Mesh(tp=2), inputs=inputs)
    style: Any = plan.modules["own"]
    of_one_piece = replace(style, shards={**style.shards, "in_proj_weight": 0})
    wrong = replace(plan, modules={**plan.modules, "own": of_one_piece})
    assert {finding.code for finding in check(model, wrong, Mesh(tp=2), inputs=inputs)} & {"CR407", "CR414"}


class Views(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        a = x.view(2, HEADS, -1)
        b, c = torch.split(x, 8, dim=1)
        d, e = x[:, 4:8], x[..., -4:]
        whole = x.new_ones(2, 16).view(2, 16)
        return a, torch.reshape(x, (2, 16)), b, c, x.unflatten(1, (HEADS, 4)), x.new_zeros(2, HEADS), d, e, whole


RULES = {
    "view(*, 4, *)": "*, /tp, *",
    "reshape(2, 16)": "*, 8",
    "split(8)": "/tp",
    "unflatten(4, 4)": "/tp, *",
    "new_zeros(*, 4)": "*, *tp",
    "getitem(*, *, 4, 8)": "*, *, /tp, /tp",
    "getitem(-4, *)": "/tp, *",
    "view(2, 16)": "*, /tp",
}


def test_rules_change_what_their_calls_write() -> None:
    module = Views()
    write_local_sizes(module, RULES, 2)
    assert [tuple(y.shape) for y in module(torch.ones(2, 8))] == [
        *[(2, 2, 4), (2, 8), (2, 4), (2, 4), (2, 2, 4), (2, 8), (2, 2), (2, 2), (2, 16)]
    ]
    assert torch.ones(2, 16).view(2, 4, -1).shape == (2, 4, 4), "only in the module's forward"


def test_rules_are_compiled_without_a_graph_break() -> None:
    module = Views()
    write_local_sizes(module, RULES, 2)
    compiled = torch.compile(module, fullgraph=True, backend="eager")
    assert [y.shape for y in compiled(torch.ones(2, 8))] == [y.shape for y in module(torch.ones(2, 8))]


def test_calls_without_a_rule_are_left_alone() -> None:
    with LocalSizes((SizeRule.parse("view(*, 4)", "*, /tp"),), 2):
        assert torch.ones(2, 4).view(4, 4).shape == (4, 2)
        assert torch.ones(2, 8).reshape(4, 4).shape == (4, 4)
        assert torch.ones(4, 2, 2).view(-1, 2, 4).shape == (2, 2, 4)


@pytest.mark.parametrize(
    ("call", "local"), [("view", "*"), ("stretch(*)", "*"), ("view(*, 4)", "*"), ("view(*, x)", "*, *")]
)
def test_a_rule_that_cannot_be_read_is_refused(call: str, local: str) -> None:
    with pytest.raises(PlanError, match="sizes"):
        Plan({"blocks": {"style": "replicate", "sizes": {call: local}}})


def test_a_plan_keeps_its_rules(tmp_path: Any) -> None:
    plan = derived(2, FromExtents)
    plan.save(tmp_path / "plan.yaml")
    assert Plan.load(tmp_path / "plan.yaml") == plan
    assert plan.modules["blocks.0.attn"].sizes == {"reshape(*, *, 4, 4)": "*, *, /tp, *tp"}

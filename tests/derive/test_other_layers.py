"""Convolutions, norms of channels and einsum in derived plans: what is split, and parity in fp64 on two ranks."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from colrow.checking.check import check
from colrow.derive import local
from colrow.derive.derivation import derive
from colrow.derive.emit_modules import ModuleEmitter
from colrow.derive.infer import RULES, argument, facts_of
from colrow.derive.local import LocalCheck
from colrow.mesh import Mesh
from colrow.verifying.verify import parity
from helpers.variants import params

TOLERANCE = 1e-9
C, HEADS = 16, 4
IMAGES = torch.randn(2, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


class Mixer(nn.Module):
    """Wide point convolutions around one of each channel alone, and a group norm."""

    def __init__(self) -> None:
        super().__init__()
        self.expand, self.norm = nn.Conv2d(C, 4 * C, 1), nn.GroupNorm(8, 4 * C)
        self.depthwise, self.project = nn.Conv2d(4 * C, 4 * C, 3, padding=1, groups=4 * C), nn.Conv2d(4 * C, C, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.project(F.silu(self.depthwise(F.silu(self.norm(self.expand(x))))))


class Residual(nn.Module):
    """The block of a U-Net of a diffusion model."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(4, C), nn.Conv2d(C, 2 * C, 3, padding=1)
        self.norm2, self.conv2, self.time = (
            nn.GroupNorm(4, 2 * C),
            nn.Conv2d(2 * C, C, 3, padding=1),
            nn.Linear(1, 2 * C),
        )

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(F.silu(self.norm1(x))) + self.time(x.mean((1, 2, 3), keepdim=True)[..., 0])[..., None].transpose(
            1, 2
        )
        return self.conv2(F.silu(self.norm2(y)))


class Gated(nn.Module):
    """A gate and values out of one convolution, along a row of the image."""

    def __init__(self) -> None:
        super().__init__()
        self.both, self.back = nn.Conv1d(C, 4 * C, 3, padding=1), nn.ConvTranspose1d(2 * C, C, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.back(F.glu(self.both(x.flatten(2)), 1)).view(x.shape)


class Letters(nn.Module):
    """Attention over the positions by einsum, with weights [features, heads, head_dim]; queries of norm 1."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Parameter(torch.randn(C, HEADS, C // HEADS) * 0.3) for _ in range(3))
        self.out, self.scale = (
            nn.Parameter(torch.randn(HEADS, C // HEADS, C) * 0.3),
            nn.Parameter(torch.ones(HEADS, 1, 1)),
        )

    def forward(self, x: Tensor) -> Tensor:
        y = x.flatten(2)
        q, k, v = (torch.einsum("bct,che->bhte", y, w) for w in (self.q, self.k, self.v))
        scores = torch.einsum("bhqe,bhke->bhqk", F.normalize(q, dim=-1), F.normalize(k, dim=-1)) * self.scale
        values = torch.einsum("bhqk,bhke->bhqe", scores.softmax(-1), v)
        return torch.einsum("bhqe,hec->bcq", values, self.out).view(x.shape)


class Experts(nn.Module):
    """Each position has the weights of one of two experts, gate and values side by side in one of them, as in
    gpt-oss."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.up_bias = nn.Parameter(torch.randn(2, C, 4 * C) * 0.3), nn.Parameter(torch.randn(2, 4 * C))
        self.down, self.down_bias = nn.Parameter(torch.randn(2, 2 * C, C) * 0.3), nn.Parameter(torch.randn(2, C))

    def forward(self, x: Tensor) -> Tensor:
        rows = x.flatten(2).transpose(1, 2).reshape(-1, C)
        expert = (rows.sum(-1) > 0).long()
        y = torch.einsum("nc,ncf->nf", rows, self.up[expert]) + self.up_bias[expert]
        y = F.silu(y[..., ::2]) * y[..., 1::2]
        y = torch.einsum("nf,nfc->nc", y, self.down[expert]) + self.down_bias[expert]
        return y.view(x.shape[0], -1, C).transpose(1, 2).reshape(x.shape)


class Instances(nn.Module):
    """A block of a U-Net for medical images: each channel of each sample is normalised by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(C, 2 * C, 3, padding=1), nn.InstanceNorm2d(2 * C, affine=True)
        self.second = nn.Conv2d(2 * C, C, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(F.silu(self.norm(self.first(x)).type_as(x)))


class Windows(nn.Module):
    """Attention in windows, which stand between heads and positions (Hiera's)."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out, self.heads = nn.Linear(C, 3 * C), nn.Linear(C, C), HEADS

    def forward(self, x: Tensor) -> Tensor:
        y = self.qkv(x.flatten(2).transpose(1, 2)).reshape(x.shape[0], -1, 4, 3, self.heads, C // self.heads)
        y = F.scaled_dot_product_attention(*y.permute(3, 0, 4, 2, 1, 5).unbind(0)).transpose(1, 3)
        return self.out(y.reshape(x.shape[0], -1, C)).transpose(1, 2).reshape(x.shape)


class ChannelNorm(nn.LayerNorm):
    """Over the channels of [batch, channels, length] (wav2vec2's)."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.transpose(-2, -1)).transpose(-2, -1)


class Normed(nn.Module):
    """The norm's own code moves the channels, which stand in the middle of its input."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.second = nn.Conv1d(C, 2 * C, 3), ChannelNorm(2 * C), nn.Conv1d(2 * C, C, 1)
        self.up, self.down = nn.Linear(C, 4 * C), nn.Linear(4 * C, C)

    def forward(self, x: Tensor) -> Tensor:
        x = self.second(F.relu(self.norm(self.first(x)))).transpose(1, 2)
        return x + self.down(F.relu(self.up(x)))


class Net(nn.Module):
    """Blocks between a patch embedding and a head."""

    def __init__(self, *blocks: type[nn.Module]) -> None:
        super().__init__()
        self.patches, self.blocks, self.head = (
            nn.Conv2d(3, C, 2, 2),
            nn.ModuleList(b() for b in blocks),
            nn.Linear(C, 5),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x)
        for block in self.blocks:
            x = x + block(x)
        return self.head(x.mean((2, 3)))


SPLIT = {
    Mixer: {"expand.weight", "expand.bias", "norm.weight", "norm.bias", "depthwise.weight", "project.weight"},
    Residual: {"conv1.weight", "conv1.bias", "norm2.weight", "norm2.bias", "conv2.weight", "time.weight"},
    Gated: {"both.weight", "both.bias", "back.weight"},
    Experts: {"up", "up_bias", "down"},
    Letters: {"q", "k", "v", "out", "scale"},
}


def sharded_of(block: type[nn.Module], tp: int) -> tuple[set[str], float]:
    """What is split of a block's parameters, and the worst error of loss and gradients on `tp` ranks."""
    torch.manual_seed(0)
    model = Net(block).double()
    found = derive(model, tp, inputs=(IMAGES,))
    assert not [f for f in check(model, found.plan(), Mesh(tp=tp), inputs=(IMAGES,)) if f.severity == "error"]
    worst = parity(model, found.plan(), tp, (IMAGES,)).worst
    return {name.removeprefix("blocks.0.") for name in found.sharded if name.startswith("blocks.")}, worst


@pytest.mark.parametrize(
    ("block", "tp"),
    params(
        [(block, tp) for block in SPLIT for tp in (2, 4)], lambda block, tp: tp > 2 or block not in (Mixer, Experts)
    ),
)
def test_a_block_is_split_and_computes_the_same(block: type[nn.Module], tp: int) -> None:
    sharded, worst = sharded_of(block, tp)
    assert sharded >= SPLIT[block]
    assert worst < TOLERANCE


@pytest.mark.parametrize(
    ("block", "operator", "split"),
    [
        (Instances, "instance_norm", {"first.weight", "norm.weight", "norm.bias", "second.weight"}),
        (Windows, "attention", {"qkv.weight", "qkv.bias", "out.weight"}),
    ],
)
def test_a_block_is_split_by_the_rule_of_its_operator(
    block: type[nn.Module], operator: str, split: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    sharded, worst = sharded_of(block, 2)
    assert sharded >= split
    assert worst < TOLERANCE
    monkeypatch.delitem(RULES, operator)
    without = derive(Net(block), 2, inputs=(IMAGES.float(),))  # it splits the residual stream, or nothing
    assert not {*without.sharded} >= {f"blocks.0.{name}" for name in split}


@pytest.mark.exhaustive
def test_a_group_norm_with_all_groups_on_a_rank_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every shape fits, but a rank's groups would be half as large. The negative control takes it as it is."""
    monkeypatch.setattr(ModuleEmitter, "_groups", lambda self: None)
    monkeypatch.setattr(LocalCheck, "candidates", lambda self: {})
    torch.manual_seed(0)
    model = Net(Residual).double()
    found = derive(model, 2, inputs=(IMAGES,))
    assert "blocks.0.conv2.weight" not in found.sharded
    assert "group_norm in blocks.0.norm2 has 4 groups on a rank, not 2" in found.notes
    monkeypatch.setattr(local, "channel_groups", lambda node, _: argument(node, facts_of(node).groups or 0, "", 1))
    assert parity(model, derive(model, 2, inputs=(IMAGES,)).plan(), 2, (IMAGES,)).worst > 1e-3


def test_a_norm_that_moves_its_channels_is_not_called_sharded_in_its_last_dim(monkeypatch: pytest.MonkeyPatch) -> None:
    """Style sharded_norm takes the last dim for sharded. Without the look at its input the sharded norm fails."""
    torch.manual_seed(0)
    model, sound = Normed().double(), (torch.randn(2, C, 7, dtype=torch.float64),)
    found = derive(model, 2, inputs=sound)
    assert {*found.sharded} == {"up.weight", "up.bias", "down.weight"}
    assert "norm normalises over another dim of its input than the last" in found.replicated["first.weight"]
    assert parity(model, found.plan(), 2, sound).worst < TOLERANCE
    monkeypatch.setattr(ModuleEmitter, "_require_last_dim", lambda *_: None)
    plan = derive(model, 2, inputs=sound).plan()
    assert plan.modules["norm"].name == "sharded_norm"
    assert [f.where for f in check(model, plan, Mesh(tp=2), inputs=sound) if f.severity == "error"] == ["norm"]

"""Forecast runs that others published with batch, sequence and hardware, and forecast what nobody here can measure.

    python -m benchmarks.published        # the tables of docs/guide/forecast.md, to the screen; two minutes

The program is torchtitan, and the figures those of its authors, or measured beside colrow. It is forecast by the parts
of colrow that are nearest to its own: plan `llama`, FSDP2 and NCCL, with its model and the kernels of its time.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from colrow.forecasting.devices import Device, device_named
from colrow.forecasting.forecast import Forecaster, Options, Row
from colrow.forecasting.memory import CONTEXT, GIB
from colrow.mesh import Mesh
from colrow.models.llama import Attention, Llama, Rope
from colrow.models.shapes import SHAPES
from colrow.plans.plan import Plan


@dataclass(frozen=True)
class Published:
    """A published run; sequences of 8,192 tokens.

    Attributes:
        batch: sequences of a data-parallel rank, in one micro-batch.
        reserved_gib: of torch's allocator; None where nothing is said.
        source: file in pytorch/torchtitan's `benchmarks`, or what was measured here with torchtitan.
    """

    model: str
    mesh: Mesh
    batch: int
    recompute: Any
    compiled: bool
    tokens_per_second_per_gpu: float
    reserved_gib: float | None
    device: str
    source: str
    layers: int | None = None


A100S, END_OF_2024, ASYNC_TP = "docs/performance", "llama3_h100_202412", "asyncTP_llama3_h100_2025-06"
OURS = "beside colrow, 2026-11-26"
RUNS = [
    Published("llama3-8b", Mesh(dp_shard=64), 1, "selective", False, 2973, None, "a100", A100S),
    Published("llama3-70b", Mesh(dp_shard=64), 1, "full", False, 331, None, "a100", A100S),
    Published("llama3-8b", Mesh(dp_shard=8), 2, "selective", False, 5762, 82.4, "h100-500w", END_OF_2024),
    Published("llama3-8b", Mesh(dp_shard=8), 2, "selective", True, 6667, 77.0, "h100-500w", END_OF_2024),
    Published("llama3-8b", Mesh(dp_shard=128), 2, "selective", False, 5605, 67.0, "h100-500w", END_OF_2024),
    Published("llama3-8b", Mesh(dp_shard=128), 2, "selective", True, 6514, 62.0, "h100-500w", END_OF_2024),
    Published("llama3-8b", Mesh(dp_shard=8, tp=8), 12, "selective", True, 4378, None, "h100-500w", ASYNC_TP),
    Published("llama3-70b", Mesh(dp_shard=32, tp=8), 16, "full", True, 597, None, "h100-500w", ASYNC_TP),
    Published("llama3-8b", Mesh(tp=4), 2, "none", True, 7899, None, "h200", OURS),
    Published("llama3-8b", Mesh(dp_shard=2, tp=2), 2, "none", True, 9107, None, "h200", OURS),
    Published("llama3-8b", Mesh(tp=4), 4, "none", True, 15506, None, "h200", OURS, layers=16),
    Published("llama3-8b", Mesh(dp_shard=2, tp=2), 2, "none", True, 16834, None, "h200", OURS, layers=16),
    Published("llama3-8b", Mesh(dp_shard=4), 1, "none", True, 17776, None, "h200", OURS, layers=16),
    Published("llama3-8b", Mesh(dp_shard=2), 1, "none", True, 17009, None, "h100", OURS, layers=16),
    Published("llama3-8b", Mesh(tp=2), 2, "none", True, 16134, None, "h100", OURS, layers=16),
]
SCALES = [
    ("llama3-8b", 1, "selective", [Mesh(dp_shard=n) for n in (8, 64, 256, 1024)]),
    ("llama3-8b", 1, "selective", [Mesh(dp_replicate=n // 8, dp_shard=8) for n in (64, 256, 1024)]),
    ("llama3-70b", 4, "full", [Mesh(dp_shard=n // 8, tp=8) for n in (64, 256, 1024)]),
    ("llama3-70b", 4, "full", [Mesh(dp_replicate=n // 64, dp_shard=8, tp=8) for n in (256, 1024)]),
]
"""Model, sequences of a rank in its one micro-batch, recomputation, meshes."""


FLASH_2 = {"attention_forward": 333 / 529, "attention_backward": 318 / 518}
"""Of FlashAttention-2, which torch and torchtitan chose on H100 then, to cuDNN's kernels, which run now: FLOP/s of both
on H100 with 8,192 tokens and heads of 128, by the figures of arXiv 2407.08608."""
AT_500_W = ((500 - 150) / (700 - 150)) ** (1 / 3)
"""Clock of a card limited to 500 W, as a share of that at 700: power beyond 150 W, which memory and leakage take at any
clock, grows with the clock's cube. An estimate; no card with that limit was measured."""


def devices() -> dict[str, Device]:
    """`h100-500w`: of the published runs, with 96 GB of HBM2e, 2.4 TB/s; its rates are those
    calibrated on cards of 700 W, at the lower clock, with that memory's."""
    h100 = device_named("h100-sxm")
    shares = dict.fromkeys(("memory", "fused", "fused_fast", "outside", "optimizer"), 2.4 / 3.35)
    shares |= {"matmul": AT_500_W, **{name: AT_500_W * share for name, share in FLASH_2.items()}}
    slower = {name: share * getattr(h100.rates, name) for name, share in shares.items()}
    grand_teton = replace(h100, memory=95.0 * GIB, rates=replace(h100.rates, **slower))
    named = {"a100": device_named("a100-80gb"), "h100": h100, "h200": device_named("h200")}
    return named | {"h100-500w": grand_teton}


class ComplexAttention(Attention):
    """With torchtitan's rotation, in complex numbers of fp32, and its kv heads, repeated for each query head."""

    def forward(self, x_BTD: Tensor, *, rope: Rope, mask: Tensor | None = None) -> Tensor:
        B, T = x_BTD.shape[:2]
        cos, sin = (t.float()[:, :, None] for t in rope)
        q, k, v = (p(x_BTD).view(B, T, -1, self.head_dim) for p in (self.q_proj, self.k_proj, self.v_proj))
        q, k = (rotate_complex(t, torch.complex(cos, sin)) for t in (q, k))
        k, v = (t.repeat_interleave(q.shape[2] // t.shape[2], dim=2) for t in (k, v))
        o = F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v)), is_causal=True)
        return self.o_proj(o.transpose(1, 2).reshape(B, T, -1))


def rotate_complex(x_BTHE: Tensor, turns: Tensor) -> Tensor:
    """`turns`: [1, T, 1, E/2]."""
    pairs = torch.view_as_complex(x_BTHE.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * turns).flatten(3).type_as(x_BTHE)


class ComposedNorm(nn.RMSNorm):
    """As torch composed it before 2.8: operators in fp32, which keep their results for backward."""

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        scale = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + (self.eps or 1e-5))
        return (wide * scale).type_as(x) * self.weight


def as_torchtitan(model: Llama, *, composed: bool) -> Llama:
    """`composed`: with the norms of torch before 2.8; a compiler fuses those."""
    for module in model.modules():
        if isinstance(module, Attention):
            module.__class__ = ComplexAttention
        elif composed and isinstance(module, nn.RMSNorm):
            module.__class__ = ComposedNorm
    return model


@cache
def forecaster(model: str, layers: int | None, device: str, program: str = "colrow") -> Forecaster:
    """`program`: colrow, torchtitan, or torchtitan eager."""
    config = SHAPES[model]
    with torch.device("meta"):
        built = Llama(replace(config, num_hidden_layers=layers or config.num_hidden_layers))
    if program != "colrow":
        as_torchtitan(built, composed=program.endswith("eager"))
    return Forecaster(built, devices()[device])


def row_of(run: Published) -> Row:
    """With torchtitan's model, plan and engine: FSDP2, NCCL, the loss of torch."""
    options = Options(run.batch, 1, 8192, run.recompute, run.compiled)
    program = "torchtitan" if run.compiled else "torchtitan eager"
    plan = Plan.preset("llama", "vocab_parallel" if run.mesh.tp > 1 else "replicated")
    return forecaster(run.model, run.layers, run.device, program).row(plan, run.mesh, options)


def published_lines() -> Iterator[str]:
    yield "| run | mesh | batch | recompute | tokens/s per GPU | forecast | error | reserved GiB | forecast | error |"
    yield "| --- | --- | ---: | --- | ---: | ---: | ---: | ---: | ---: | ---: |"
    for run in RUNS:
        row = row_of(run)
        rate, memory = row.tokens_per_second_per_gpu, (row.memory.device - CONTEXT) / GIB
        shape = f"{run.model}{f', {run.layers} layers' if run.layers else ''}{'' if run.compiled else ', eager'}"
        cells = [f"{shape} ({run.source})", str(run.mesh), str(run.batch), run.recompute]
        cells += [f"{run.tokens_per_second_per_gpu:,.0f}", f"{rate:,.0f}"]
        cells += [f"{rate / run.tokens_per_second_per_gpu - 1:+.0%}"]
        cells += ["", f"{memory:.1f}", ""] if run.reserved_gib is None else [
            f"{run.reserved_gib:.1f}", f"{memory:.1f}", f"{memory / run.reserved_gib - 1:+.0%}"
        ]  # fmt: skip
        yield "| " + " | ".join(cells) + " |"


def scale_lines() -> Iterator[str]:
    yield "| model | GPUs | mesh | batch | recompute | GiB | step ms | tokens/s per GPU | largest wait |"
    yield "| --- | ---: | --- | ---: | --- | ---: | ---: | ---: | --- |"
    for model, batch, recompute, meshes in SCALES:
        for mesh in meshes:
            options = Options(batch, 1, 8192, recompute)
            row = forecaster(model, None, "h200").row(Plan.preset("llama"), mesh, options)
            cells = [model, str(mesh.world_size), str(mesh), str(batch), recompute, f"{row.memory.device / GIB:.1f}"]
            cells += [f"{row.time.seconds * 1e3:,.0f}", f"{row.tokens_per_second_per_gpu:,.0f}", _wait(row)]
            yield "| " + " | ".join(cells) + " |"


def _wait(row: Row) -> str:
    axes = {axis: row.time.parts.get(axis, 0.0) for axis in ("tp", "dp_shard", "dp_replicate")}
    worst = max(axes, key=lambda axis: axes[axis])
    return f"{worst} {axes[worst] * 1e3:.0f} ms"


def main() -> None:
    for lines in (published_lines(), scale_lines()):
        for line in lines:
            print(line, flush=True)
        print()


if __name__ == "__main__":
    main()

"""The line that says what ran, once the first steps are done."""

from __future__ import annotations

import textwrap

import torch.distributed as dist

from colrow.ops.ran import noted
from colrow.torch_compat import compiled_graph_count
from colrow.train.attention import attention_kernel
from colrow.train.cuda_graph import EAGER_STEPS
from colrow.train.setup import Training

CARRIED = {
    "copy_engine": "gathers and scatters on copy engines",
    "point_to_point": "gathers and scatters in chunks",
    "collectives": "overlapped scatter",
    "none": "nothing overlapped",
}
"""What runs beside products, by how a column product's backward ran."""


def steps_before(training: Training) -> int:
    """After how many steps all that runs has run."""
    return EAGER_STEPS + 1 if training.graphs else 1


def what_ran(training: Training, seq_len: int) -> str:
    """What the steps so far ran, on any rank: `cuDNN attention, fused qkv, linear cross entropy, compiled blocks`.

    Collective. Of operators this is what they noted as they ran, of graphs what was captured, of compiled blocks what
    the compiler made; attention's kernel is torch's own answer for these sizes.
    """
    found = [[kind, what] for kind in ("columns", "beside", "fp8", "loss") for what in noted(kind)]
    everywhere: list[list[list[str]] | None] = [None] * dist.get_world_size()
    dist.all_gather_object(everywhere, found)
    ran: dict[str, list[str]] = {}
    for kind, what in (entry for each in everywhere for entry in each or []):
        if what not in ran.setdefault(kind, []):
            ran[kind].append(what)
    kernel = _attention(training, seq_len)
    parts = [f"{kernel} attention"] if kernel else []
    if fused := _fused(training, ran.get("columns", [])):
        parts.append(f"fused {', '.join(fused)}")
    parts += [CARRIED[what] for what in ran.get("beside", [])]
    parts += [f"fp8 {what}" for what in ran.get("fp8", [])]
    parts += [f"linear cross entropy{' in Triton' if what == 'triton' else ''}" for what in ran.get("loss", [])]
    parts.append("compiled blocks" if training.compiled and _graphs_compiled() else "eager")
    if training.graphs and all(graph.captured for graph in training.graphs):
        parts.append("CUDA graphs")
    return ", ".join(parts)


def ran_line(said: str) -> str:
    """The line, or two, within 80 columns."""
    return textwrap.fill(f"ran        {said}", 80, subsequent_indent=" " * 11, break_on_hyphens=False)


def _fused(training: Training, counts: list[str]) -> list[str]:
    """Names of the columns that were computed as one product, of a plan's gathers with so many columns."""
    names = []
    for style in training.plan.modules.values():
        columns: tuple[str, ...] = getattr(style, "columns", ())
        if len(columns) > 1 and str(len(columns)) in counts:
            short = [name.rpartition(".")[2].removesuffix("_proj") for name in columns]
            names.append(("" if all(len(name) == 1 for name in short) else "/").join(short))
    return list(dict.fromkeys(names))


def _graphs_compiled() -> bool:
    return compiled_graph_count() > 0


def _attention(training: Training, seq_len: int) -> str | None:
    """The kernel that attention runs; None where torch has one only, or the sizes are not known."""
    shape = training.source.config
    if training.device.type != "cuda" or shape is None:
        return None
    tp = 1 if training.plan.name == "article" else training.mesh["tp"].size()
    return attention_kernel(
        training.device,
        training.compute,
        heads=shape.num_attention_heads // tp,
        kv_heads=max(shape.num_key_value_heads // tp, 1),
        head_dim=shape.head_dim,
        seq_len=seq_len,
    )

"""The line that names the kernels and fast paths that the first steps executed: requested is not executed."""

from __future__ import annotations

import torch.distributed as dist
from torch.distributed.tensor import Replicate

from colrow.mesh import MeshAxes
from colrow.ops.execution_record import recorded
from colrow.plans.plan import Plan
from colrow.torch_compat import compiled_graph_count
from colrow.train.attention import attention_kernel
from colrow.train.setup import Training

OVERLAPS = {
    "copy_engine": "gathers and scatters on copy engines",
    "point_to_point": "gathers and scatters in chunks",
    "collectives": "overlapped scatter",
    "none": "nothing overlapped",
}
"""What overlaps with matmuls, by what the backward of a column-parallel linear noted."""
_NOTED = ("columns", "beside", "fp8", "loss", "data", "fused")
"""What operators record of themselves, under these keys of `ops.execution_record`."""


def steps_until_known(training: Training) -> int:
    """Steps after which everything has run once: compilation, and the capture of CUDA graphs."""
    return training.eager_steps + 1 if training.graphs else 1


def executed_paths(training: Training, seq_len: int) -> str:
    """What the steps so far executed, on any rank: `cuDNN attention, fused qkv, linear cross entropy, compiled blocks`.

    Collective. Operators note themselves as they run, graphs know whether they were captured, and torch counts the
    blocks that it compiled; attention's kernel is what torch selects for these sizes.
    """
    local = [[what, value] for what in _NOTED for value in recorded(what)]
    # gathered from all ranks, since they differ: only the last stage of a pipeline has a head
    everywhere: list[list[list[str]] | None] = [None] * dist.get_world_size()
    dist.all_gather_object(everywhere, local)
    executed: dict[str, list[str]] = {}
    for what, value in (entry for each in everywhere for entry in each or []):
        if value not in executed.setdefault(what, []):
            executed[what].append(value)
    kernel = _attention(training, seq_len)
    parts = [f"{kernel} attention"] if kernel else []
    if fused := _fused(training, executed.get("columns", [])):
        parts.append(f"fused {', '.join(fused)}")
    # in the order of a step: attention, products, communication, loss, data axes
    parts += [OVERLAPS[what] for what in executed.get("beside", [])]
    parts += [f"fp8 {what}" for what in executed.get("fp8", [])]
    parts += [f"linear cross entropy{' in Triton' if what == 'triton' else ''}" for what in executed.get("loss", [])]
    parts += [*executed.get("data", []), *executed.get("fused", [])]
    parts.append("compiled blocks" if training.compiled and compiled_graph_count() else "eager")
    if training.graphs and all(graph.captured for graph in training.graphs):
        parts.append("CUDA graphs")
    return ", ".join(parts)


def _fused(training: Training, counts: list[str]) -> list[str]:
    """Names of the linears that ran as one matmul: those of the plan's gathers over a number of linears in `counts`."""
    names = []
    for style in training.plan.modules.values():
        # an operator notes how many linears it multiplied, not which
        columns: tuple[str, ...] = getattr(style, "columns", ())
        if len(columns) > 1 and str(len(columns)) in counts:
            short = [name.rpartition(".")[2].removesuffix("_proj") for name in columns]
            names.append(("" if all(len(name) == 1 for name in short) else "/").join(short))
    return list(dict.fromkeys(names))


def _attention(training: Training, seq_len: int) -> str | None:
    """The kernel that attention runs; None on CPUs, where torch has only one, and where the sizes are not known."""
    shape = training.source.config
    if training.device.type != "cuda" or shape is None:
        return None
    tp = 1 if _gathers_heads(training.plan) else MeshAxes(training.mesh).size("tp")
    return attention_kernel(
        training.device,
        training.precision.compute_dtype,
        heads=shape.num_attention_heads // tp,
        kv_heads=max(shape.num_key_value_heads // tp, 1),
        head_dim=shape.head_dim,
        seq_len=seq_len,
    )


def _gathers_heads(plan: Plan) -> bool:
    """Whether each rank computes attention for all heads, as with the preset `article`."""
    queries = [style for key, style in plan.modules.items() if key.endswith("self_attn.q_proj")]
    return any(getattr(style, "output", None) == Replicate() for style in queries)

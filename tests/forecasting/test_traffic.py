"""Bytes and number of every collective of a step, forecast without ranks, are those of real ranks: exactly."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from colrow.forecasting.memory import Setting, stages_of
from colrow.forecasting.traffic import traffic_of
from colrow.forecasting.walk import Cell, walk
from colrow.mesh import AXES, Mesh
from colrow.ops.parallel_linear import OPERATORS
from colrow.parallel.data_parallel import apply_data_parallel, set_last_micro_batch
from colrow.parallel.loss import loss_context, model_loss
from colrow.parallel.parallelize import parallelize
from colrow.plans.plan import Plan
from colrow.sharding.operators import operator
from colrow.torch_compat import TorchDispatchMode, group_named, is_async, tree_leaves
from helpers.harness import Ranks
from helpers.llamas import meta, seeded

pytestmark = pytest.mark.distributed
SIZES = {"vocab_size": 66, "num_hidden_layers": 3}
BATCH, SEQ = 2, 16
Counts = Counter[tuple[str, str, int]]


@dataclass(frozen=True)
class Case:
    """A mesh of four ranks, and how a step runs on it."""

    mesh: Mesh
    plan: Any = "llama"
    loss: Any = "vocab_parallel"
    micro_batches: int = 1
    reshard: bool = True
    tied: bool = False
    fp8: bool = False
    wide: bool = False

    @property
    def sizes(self) -> dict[str, Any]:
        wide = {
            "hidden_size": 64,
            "intermediate_size": 64,
            "head_dim": 16,
        }  # of which 16 divides each side of a product
        return {**SIZES, **(wide if self.wide else {}), "tie_word_embeddings": self.tied}

    @property
    def named_plan(self) -> Plan:
        plan = Plan.preset(self.plan, self.loss)
        return plan.with_fp8("tensorwise") if self.fp8 else plan


CASES = {
    "tp4": Case(Mesh(tp=4), micro_batches=2),
    "tp2-shard2": Case(Mesh(tp=2, dp_shard=2), micro_batches=2),
    "tp2-replicate2-fast": Case(Mesh(tp=2, dp_replicate=2), "llama-fast", "linear"),
    "shard4-keep": Case(Mesh(dp_shard=4), micro_batches=2, reshard=False),
    "replicate2-shard2-tied": Case(Mesh(dp_replicate=2, dp_shard=2), tied=True),
    "tp2-shard2-fp8": Case(Mesh(tp=2, dp_shard=2), "llama-fast", "linear", fp8=True, wide=True),
}


class Collectives(TorchDispatchMode):
    """Counts (axis, kind, bytes of the larger side) of what this rank sends, inside colrow's operators too."""

    def __init__(self, axes: dict[tuple[int, ...], str]) -> None:
        super().__init__()
        self._axes, self.seen = axes, Counts()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        leaves = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if any(isinstance(leaf, DTensor) or is_async(leaf) for leaf in leaves):
            return NotImplemented  # it comes again, on local tensors
        if (implementation := OPERATORS.get(func.name().partition(".")[0])) is not None:
            with self:  # its collectives are inside
                return implementation(*args, **(kwargs or {}))
        out = func(*args, **(kwargs or {}))
        name = func.name().partition("::")[2].partition(".")[0]
        if func.namespace in ("c10d", "_c10d_functional") and (kind := operator(name).collective):
            group = next(_group_name(arg) for arg in args if _group_name(arg))
            sizes = [x.numel() * x.element_size() for x in tree_leaves((args, out)) if isinstance(x, Tensor)]
            members = tuple(dist.get_process_group_ranks(group_named(group)))
            if len(members) > 1:
                self.seen[self._axes[members], kind, max(sizes)] += 1
        return out


def _group_name(arg: Any) -> str:
    if isinstance(arg, torch.ScriptObject) and "ProcessGroup" in str(arg._type()):
        return str(dist.ProcessGroup.unbox(arg).group_name)
    return arg if isinstance(arg, str) and arg not in ("sum", "avg", "max") else ""


def count(device: str, cases: dict[str, Case]) -> dict[str, Counts]:
    return {name: _count(device, case) for name, case in cases.items()}


def _count(device: str, case: Case) -> Counts:
    mesh = case.mesh.build(device, dist.get_world_size())
    model, plan = seeded(device, **case.sizes), case.named_plan
    parallelize(model, plan, mesh)
    apply_data_parallel(model, mesh, model.layers, param_dtype=None, reshard_after_forward=case.reshard)
    ids = torch.zeros(BATCH, SEQ, dtype=torch.long, device=device)
    axes = {
        tuple(dist.get_process_group_ranks(mesh[axis].get_group())): axis
        for axis in AXES
        if getattr(case.mesh, axis) > 1
    }
    with Collectives(axes) as counted:
        for i in range(case.micro_batches):
            set_last_micro_batch(model, i == case.micro_batches - 1)
            with loss_context(plan, mesh):
                model_loss(model, plan, mesh, ids, ids, num_valid=ids.numel()).backward()
    return counted.seen


def forecast(case: Case, dtype: torch.dtype = torch.float32) -> Counts:
    cell = Cell(case.mesh.tp, BATCH, SEQ, compiled=False, dtype=dtype)
    walked = walk(meta(**case.sizes), case.named_plan, cell)
    setting = Setting(case.mesh, case.micro_batches, copies=False, reshard=case.reshard)
    (stage,) = stages_of(walked, setting)
    return Counts({(t.axis, t.kind, t.bytes): t.calls for t in traffic_of(walked, setting, stage)})


@pytest.mark.exhaustive
def test_collectives_of_six_meshes_are_those_of_ranks(ranks: Ranks) -> None:
    seen = ranks(4).run(count, CASES)[0]
    assert {name: forecast(case) for name, case in CASES.items()} == seen


def test_gathers_of_eight_bits_are_half_of_those_of_sixteen() -> None:
    """And a row for the scale; gradients are summed in the compute dtype as before."""
    case = replace(CASES["tp2-shard2-fp8"], mesh=Mesh(tp=2))
    low, high = (forecast(each, torch.bfloat16) for each in (case, replace(case, fp8=False)))
    D, tokens, layers = 64, BATCH * SEQ // 2, SIZES["num_hidden_layers"]
    packed, plain = (("tp", "all_gather", n) for n in (2 * (tokens + 1) * D, 2 * tokens * D * 2))
    inside = 4 * layers  # inputs of two columns, gradients of two rows
    assert low[packed] == inside
    assert high[plain] == low[plain] + inside  # those of embedding and head stay
    assert {key: n for key, n in low.items() if key[1] != "all_gather"} == {
        key: n for key, n in high.items() if key[1] != "all_gather"
    }


def test_another_micro_batch_is_seen() -> None:
    """The negative control: a forecast of another step has other counts."""
    case = CASES["tp2-shard2"]
    more = Case(case.mesh, micro_batches=3)
    assert forecast(case) != forecast(more)


def test_the_flat_engine_exchanges_gradients_in_every_micro_batch() -> None:
    flat, other = (
        forecast(Case(Mesh(dp_shard=2, data_engine=engine), micro_batches=3))  # type: ignore[arg-type]
        for engine in ("flat", "fsdp2")
    )
    exchanged = {key: calls for key, calls in flat.items() if key[1] == "all_to_all"}
    reduced = {key: calls for key, calls in other.items() if key[1] == "reduce_scatter"}
    assert {(axis, size): calls for (axis, _, size), calls in exchanged.items()} == {
        (axis, size): 3 * calls for (axis, _, size), calls in reduced.items()
    }
    assert reduced

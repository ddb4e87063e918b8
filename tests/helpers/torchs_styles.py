"""Cases like those of torch's tests of its styles and of `parallelize_module`; each runs on every rank."""

from __future__ import annotations

import copy
import warnings
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode

from colrow.errors import PlanError
from colrow.parallel.parallelize import parallelize
from colrow.plans.plan import Plan
from colrow.sharding.grad_norm import align_gradients
from colrow.sharding.layout import full_tensor
from colrow.torch_compat import seed_dtensors
from helpers.parity import relative, tp_mesh
from helpers.torchs_models import MLP, RMSNorm, Stack, Sum, built, collectives, drawn

RANKS = 4
REDUCED, GATHERED, SCATTERED = {"all-reduce": 1}, {"gather": 1}, {"scatter": 1}
COLUMNS = {"style": "colwise", "output": "replicate"}


def part(tensor: Tensor, dim: int | None) -> Tensor:
    """What this rank holds of a tensor that is sharded along `dim`, or replicated."""
    return tensor if dim is None else tensor.chunk(RANKS, dim)[dist.get_rank()]


def gradient_errors(model: nn.Module, reference: nn.Module) -> dict[str, float]:
    align_gradients(model.parameters())
    want = dict(reference.named_parameters())
    return {name: relative(full_tensor(p.grad), want[name].grad) for name, p in model.named_parameters()}


# -- one module under one style


def linear() -> nn.Module:
    return nn.Linear(16, 16)


def embedding() -> nn.Module:
    return nn.Embedding(16, 16)


# module, style, shape of x (ids where it has an end), dim of x that is sharded, dim of y, collectives of both passes
ONE: dict[str, tuple[Any, ...]] = {
    "columns": (linear, "colwise", (8, 16), None, 1, {}, REDUCED),
    "columns of sharded rows": (linear, {"style": "colwise", "input": "shard(0)"}, (32, 16), 0, 1, GATHERED, SCATTERED),
    "embedding by columns": (embedding, "colwise", (4, 2), None, 2, {}, {}),
    "rows": (linear, "rowwise", (8, 16), 1, None, REDUCED, {}),
    "rows into sharded rows": (linear, {"style": "rowwise", "output": "shard(0)"}, (8, 16), 1, 0, SCATTERED, GATHERED),
    "embedding by rows": (embedding, {"style": "rowwise", "input": "replicate"}, (4, 2), None, None, REDUCED, {}),
    "embedding by rows into sharded features": (
        embedding, {"style": "rowwise", "input": "replicate", "output": "shard(1)"}, (8,), None, 1, SCATTERED, GATHERED,
    ),
}  # fmt: skip


def one_case(device: str, build: Any, style: Any, shape: tuple[int, ...], x_dim: int | None, y_dim: int | None) -> Any:
    reference, model = built(build, device)
    parallelize(model, Plan({"": style}), tp_mesh(device, RANKS)["tp"])
    x = drawn(*shape, device=device)
    if build is embedding:
        x = torch.arange(x.numel(), device=device).view(shape)
    else:
        x.requires_grad_()
    local = part(x.detach(), x_dim).requires_grad_(x.requires_grad)
    with CommDebugMode() as forward:
        y = model(local)
    want = reference(x)
    weights = drawn(*want.shape, device=device, seed=2)
    (want * weights).sum().backward()
    with CommDebugMode() as backward:
        (y * part(weights, y_dim)).sum().backward()
    errors = {"y": relative(y, part(want, y_dim)), **gradient_errors(model, reference)}
    if x.grad is not None and local.grad is not None:
        errors["x"] = relative(local.grad, part(x.grad, x_dim))
    return errors, collectives(forward), collectives(backward)


def frozen_case(device: str, style: str) -> tuple[bool, bool]:
    model = nn.Linear(16, 16).to(device)
    model.weight.requires_grad_(False)
    parallelize(model, Plan({"": style}), tp_mesh(device, RANKS)["tp"])
    return model.weight.requires_grad, model.bias.requires_grad


# -- inputs and outputs of a module


def arranged_case(device: str) -> None:
    """Each of the styles that arrange activations, on a module that hands on what it gets."""
    mesh, x = tp_mesh(device, RANKS)["tp"], drawn(20, 7, device=device)

    def styled(**options: Any) -> nn.Module:
        return parallelize(nn.Identity(), Plan({"": options}), mesh)

    gathered = styled(style="prepare_input", input="shard(0)", desired="replicate")(part(x, 0))
    assert isinstance(gathered, DTensor)
    assert torch.equal(gathered.full_tensor(), x)
    assert torch.equal(gathered.redistribute(mesh, [Shard(0)]).to_local(), part(x, 0))
    sliced = styled(style="prepare_output", output="replicate", desired="shard(0)")
    assert torch.equal(sliced(x), part(x, 0))
    assert torch.equal(sliced(DTensor.from_local(x, mesh)), part(x, 0))
    both = {"input": "shard(0)", "desired": "replicate", "output": "replicate", "desired_output": "shard(1)"}
    assert torch.equal(styled(style="prepare_input_output", **both)(part(x, 0)), part(x, 1))  # 7 columns: 2, 2, 2, 1


def inputs_case(device: str) -> dict[str, tuple[float, int]]:
    """The error of the result and the number of collectives, for arguments by position and by name."""
    mesh, found = tp_mesh(device, RANKS)["tp"], {}
    x, y, z = (drawn(RANKS, 8, device=device, seed=seed) for seed in range(3))

    def measure(
        name: str, style: dict[str, Any], local: bool, *args: Any, want: tuple[Any, ...], **kwargs: Any
    ) -> None:
        reference, model = built(Sum, device)
        plan = {"": {"style": "prepare_input", **style}, "linear": {"style": "colwise", "use_local_output": local}}
        parallelize(model, Plan(plan), mesh)
        with CommDebugMode() as seen:
            out = model(*args, **kwargs)
        expected = reference(want[0], want[1], z=want[2])
        out = out.full_tensor() if isinstance(out, DTensor) else out
        found[name] = relative(out, part(expected, 1) if local else expected), seen.get_total_counts()

    positions = {"input": ["shard(0)", "none"], "desired": ["replicate", "none"]}
    measure("two by position", positions, True, part(x, 0), part(y, 1), want=(x, y, 0))
    names = {"input_kwargs": {"z": "shard(0)"}, "desired_kwargs": {"z": "replicate"}}
    measure("one by name", names, False, x, 2, z=part(z, 0), want=(x, 2, z))
    names = {"input_kwargs": dict.fromkeys("xz", "shard(0)"), "desired_kwargs": dict.fromkeys("xz", "replicate")}
    measure("all by name", names, False, x=part(x, 0), z=part(z, 0), y=2, want=(x, 2, z))
    placed = DTensor.from_local(part(x, 0), mesh, [Shard(0)])
    measure("a DTensor by name", names, False, x=placed, z=part(z, 0), y=2, want=(x, 2, z))
    return found


def lengths_case(device: str) -> None:
    """Layouts that do not fit each other are refused with the plan; those that do not fit the call, at the call."""
    mesh = tp_mesh(device, RANKS)["tp"]
    uneven = {"style": "prepare_input", "input": ["shard(0)"], "desired": ["replicate", "none"]}
    with pytest.raises(PlanError, match="input and desired are of different lengths"):
        parallelize(Sum().to(device), Plan({"": uneven}), mesh)
    short = parallelize(Sum().to(device), Plan({"": uneven | {"desired": ["replicate"]}}), mesh)
    with pytest.raises(ValueError, match="should have same length"):
        short(torch.ones(1, 8, device=device), torch.ones(4, 8, device=device))


# -- a norm on shards of the tokens


NORMS: dict[str, Callable[[], nn.Module]] = {
    "LayerNorm": lambda: nn.LayerNorm(12),
    "LayerNorm without parameters": lambda: nn.LayerNorm(12, elementwise_affine=False),
    "a norm of one's own": lambda: RMSNorm(12),
}


def norm_case(device: str, name: str, dim: int) -> tuple[dict[str, float], int, bool, set[str]]:
    """Errors, collectives, whether the output is sharded by tokens, and the placements of the gradients."""
    mesh = tp_mesh(device, RANKS)["tp"]
    reference, model = built(NORMS[name], device)
    parallelize(model, Plan({"": "sequence"}), mesh)
    x = drawn(20, 8, 12, device=device).requires_grad_()
    placed = distribute_tensor(x.detach(), mesh, [Shard(dim)]).requires_grad_()
    weights = drawn(20, 8, 12, device=device, seed=2)
    gradient = distribute_tensor(weights, mesh, [Shard(1)])
    with CommDebugMode() as seen:
        out = model(placed)
        out.backward(gradient)
    want = reference(x)
    want.backward(weights)
    assert placed.grad is not None
    placements = {str(p.grad.placements[0]) for p in model.parameters()}
    errors = {"y": relative(out.full_tensor(), want), "x": relative(placed.grad.full_tensor(), x.grad)}
    count = seen.get_total_counts()
    return errors | gradient_errors(model, reference), count, out.placements == (Shard(1),), placements


def dropout_case(device: str) -> tuple[int, bool, bool]:
    mesh = tp_mesh(device, RANKS)["tp"]
    if device == "cuda":
        seed_dtensors(0, mesh)  # as a run does
    model = parallelize(nn.Dropout(0.5), Plan({"": "sequence"}), mesh)
    x = distribute_tensor(torch.ones(20, 8, 12, device=device), mesh, [Shard(1)]).requires_grad_()
    with CommDebugMode() as seen:
        out = model(x)
        out.backward(torch.ones_like(out))
    assert x.grad is not None
    same_mask = torch.equal(out.to_local(), x.grad.to_local())  # what was dropped gets no gradient
    return seen.get_total_counts(), set(out.to_local().unique().tolist()) == {0.0, 2.0}, same_mask


# -- plans of a model


def nested() -> nn.Module:
    return nn.Sequential(OrderedDict([("encoder", MLP())]))


SHARDED_INSIDE = {
    "": {"style": "prepare_input_output", "input": "replicate", "desired": "shard(0)", "output": "shard(0)",
         "desired_output": "replicate"},
    "net1": {"style": "colwise", "input": "shard(0)"},
    "net2": {"style": "rowwise", "output": "shard(0)"},
}  # fmt: skip
PLANS: dict[str, tuple[Callable[[], nn.Module], dict[str, Any]]] = {
    "each linear by columns": (MLP, {"net1": COLUMNS, "net2": COLUMNS}),
    "nested": (nested, {"encoder.net1": COLUMNS, "encoder.net2": COLUMNS}),
    "star": (MLP, {"net*": COLUMNS}),
    "question mark": (MLP, {"net?": COLUMNS}),
    "range": (MLP, {"net[1-2]": COLUMNS}),
    "two wildcards": (Stack, {"layers.*.net[1]": "colwise", "layers.*.net[2]": "rowwise"}),
    "root": (MLP, SHARDED_INSIDE),
    "a linear by columns": (lambda: nn.Linear(12, 16), {"": COLUMNS}),
    "a linear by rows": (lambda: nn.Linear(12, 8), {"": {"style": "rowwise", "input": "replicate"}}),
}


NOT_SUMMED = {"net1": "colwise", "net2": {"style": "rowwise", "output": "partial"}}


def plan_case(device: str, name: str) -> dict[str, float]:
    """Errors of the output, the gradients, and the weights after a step."""
    build, plan = (PLANS | {"not summed": (MLP, NOT_SUMMED)})[name]
    reference, model = built(build, device)
    parallelize(model, Plan(plan), tp_mesh(device, RANKS)["tp"])
    x, outputs = drawn(16, 12, device=device), []
    for one in (reference, model):
        outputs.append(one(x))
        (outputs[-1] * drawn(*outputs[-1].shape, device=device, seed=2)).sum().backward()
    errors = gradient_errors(model, reference)
    for one in (reference, model):
        torch.optim.SGD(one.parameters(), lr=0.25).step()
    trained = dict(reference.named_parameters())
    errors |= {f"trained {k}": relative(full_tensor(p.detach()), trained[k]) for k, p in model.named_parameters()}
    return {"output": relative(outputs[1], outputs[0]), **errors}


def source_case(device: str) -> tuple[bool, float, int]:
    """Ranks start from different weights: whether rank 1's came to all, and the collectives where none are to come."""
    torch.manual_seed(dist.get_rank())
    model, mesh = MLP().to(device), tp_mesh(device, RANKS)["tp"]
    first, own = copy.deepcopy(model), copy.deepcopy(model)
    with CommDebugMode() as seen:
        parallelize(first, Plan({"net*": COLUMNS}), mesh, src_data_rank=1)
    sent = seen.get_total_counts() > 0
    pairs = zip(first.parameters(), model.parameters(), strict=True)
    error = max([relative(full_tensor(p.detach()), w.detach()) for p, w in pairs])
    with CommDebugMode() as seen:
        parallelize(own, Plan({"net1": "colwise", "net2": "rowwise"}), mesh, src_data_rank=None)
    return sent, error, seen.get_total_counts()


def refused_case(device: str) -> None:
    """What torch accepts and this project refuses: see the page."""
    mesh = tp_mesh(device, RANKS)["tp"]
    with pytest.raises(PlanError, match=r"key 'net0\.hello' matches no module"):
        parallelize(MLP().to(device), Plan({"net0.hello": "colwise", "net1": "colwise", "net2": "rowwise"}), mesh)
    for width in (3, 17):
        with pytest.raises(PlanError, match="not divisible by tp=4"):
            parallelize(MLP(width, 1).to(device), Plan({"net1": "colwise", "net2": "rowwise"}), mesh)
    with pytest.raises(TypeError, match="mesh"), mesh:
        parallelize(MLP().to(device), Plan({"net1": "colwise", "net2": "rowwise"}))  # type: ignore[call-arg]
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        parallelize(nn.Linear(12, 16).to(device), Plan({}), mesh)
    assert any("CR105" in str(warning.message) for warning in seen)

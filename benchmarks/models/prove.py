"""Prove a choice by running the exported graph on simulated ranks, with sharded weights, against the unsharded model.

It proves that slices, layouts and reductions are right, forward and backward; not the collectives of a runtime, which
`parity` proves. `Sabotage` breaks the choice on purpose, so that each proof can be seen to fail.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Node
from torch.fx.node import map_arg

from benchmarks.models.localize import localized
from colrow.derive.choice import Choice
from colrow.derive.choose import choose
from colrow.derive.infer import AxisInference, argument, facts_of, is_lookup, op_name
from colrow.derive.table import infer
from colrow.derive.trace import Trace, default_inputs, is_boundary, trace
from colrow.dryrun.calls import call_model
from colrow.parallel.outputs import main_tensor


class Sabotage(Enum):
    """A way to break a correct choice."""

    NONE = "none"
    CONTIGUOUS = "contiguous shards of packed weights"
    DROPPED = "one reduction dropped"


class ShardedRun:
    """Runs a traced graph on tp ranks side by side."""

    def __init__(self, traced: Trace, inference: AxisInference, choice: Choice, sabotage: Sabotage = Sabotage.NONE):
        self.traced, self.inference, self.choice, self.sabotage = traced, inference, choice, sabotage
        self.tp = choice.tp
        sums = [n for n, dims in inference.contracted.items() if choice.any_sharded(dims)]
        self.reductions = set(sums[1:] if sabotage is Sabotage.DROPPED else sums)
        self.partial = set(sums)
        self.averages = {n for n, dims in inference.averaged.items() if choice.any_sharded(dims)}

    # ------------------------------------------------------------------ shards of a tensor

    def shard(self, tensor: Tensor, dims: Any) -> list[Tensor]:
        """Each rank's shard of a tensor."""
        out = [tensor] * self.tp
        for k, dim in enumerate(dims):
            if not self.choice.sharded(dim):
                continue
            if self.sabotage is Sabotage.CONTIGUOUS and tensor.shape[k] % self.tp == 0:
                out = [list(t.chunk(self.tp, k))[r] for r, t in enumerate(out)]
            else:
                rows = [torch.tensor(self.choice.indices(dim, r), device=tensor.device) for r in range(self.tp)]
                out = [t.index_select(k, i) for t, i in zip(out, rows, strict=True)]
        return out

    def gather(self, parts: Sequence[Tensor], dims: Any) -> Tensor:
        """The unsharded tensor, from every rank's shard."""
        for k, dim in enumerate(dims):
            if self.choice.sharded(dim):
                order = torch.tensor([i for r in range(self.tp) for i in self.choice.indices(dim, r)])
                return torch.cat(list(parts), k).index_select(k, torch.argsort(order))
        return parts[0]

    # ------------------------------------------------------------------ the run

    def __call__(self, values: dict[str, Tensor]) -> Tensor:
        env: dict[Node, list[Any]] = {}
        for node in self.traced.nodes:
            if node.op == "output":
                out = self.traced.output()
                return self.gather(env[out], self.inference.dims[out])
            env[node] = self._run(node, env, values)
            dims = self.inference.dims.get(node)
            if isinstance(dims, list) and isinstance(env[node][0], Tensor):
                found, expected = list(env[node][0].shape), self.choice.local_shape(dims)
                assert found == expected, f"{node.name}: local shape {found}, expected {expected}"
        raise AssertionError("a graph without an output")

    def _run(self, node: Node, env: dict[Node, list[Any]], values: dict[str, Tensor]) -> list[Any]:
        if node.op == "placeholder":
            if not node.users:
                return [None] * self.tp
            value = values[node.name]
            return self.shard(value, self.inference.dims.get(node) or ())
        if node.op == "get_attr":
            value = self.traced.constants[str(node.target)]
            return self.shard(value, self.inference.dims.get(node) or ())
        if is_boundary(node):
            return env[node.all_input_nodes[0]]
        if not [n for n in node.all_input_nodes if n in env] or facts_of(node).rule == "constant":
            return self._constant(node, env)
        if node in self.averages and facts_of(node).rule == "norm":
            return self._gathered_norm(node, env)
        if node in self.partial and is_lookup(node):
            outs = self._lookup(node, env)
        else:
            outs = [
                self._call(node, self._local_args(node, r, env), self._kwargs(node, r, env)) for r in range(self.tp)
            ]
        if node in self.reductions:
            total = sum(outs[1:], outs[0])
            outs = [total] * self.tp
        elif node in self.averages:
            outs = [sum(outs[1:], outs[0]) / self.tp] * self.tp
        return outs

    def _call(self, node: Node, args: list[Any], kwargs: dict[str, Any]) -> Any:
        if op_name(node) == "copy":  # has no derivative
            return args[1].to(args[0].dtype).expand_as(args[0])
        target: Any = node.target
        if facts_of(node).rule == "view":
            target = torch.ops.aten.reshape.default
        return target(*args, **kwargs)

    def _kwargs(self, node: Node, rank: int, env: dict[Node, list[Any]]) -> dict[str, Any]:
        return dict(map_arg(node.kwargs, lambda n: env[n][rank]))

    def _constant(self, node: Node, env: dict[Node, list[Any]]) -> list[Any]:
        args = map_arg(node.args, lambda n: env[n][0])
        value = self._call(node, list(args), self._kwargs(node, 0, env))
        if not isinstance(value, Tensor):
            return [value] * self.tp
        return self.shard(value, self.inference.dims.get(node) or ())

    def _gathered_norm(self, node: Node, env: dict[Node, list[Any]]) -> list[Any]:
        """A norm over a sharded axis: what the runtime does with one small reduction is here a gather."""

        def gathered(n: Node) -> Tensor:
            return self.gather(env[n], self.inference.dims[n])

        out = self._call(node, list(map_arg(node.args, gathered)), dict(map_arg(node.kwargs, gathered)))
        return self.shard(out, self.inference.dims[node])

    def _lookup(self, node: Node, env: dict[Node, list[Any]]) -> list[Tensor]:
        table, ids = (env[n] for n in node.all_input_nodes[:2])
        rows = int(table[0].shape[0])
        outs = []
        for rank in range(self.tp):
            local = ids[rank] - rank * rows
            mine = (local >= 0) & (local < rows)
            found = torch.embedding(table[rank], local.clamp(0, rows - 1))
            padding = int(argument(node, 2, "padding_idx", -1))
            if padding >= 0:
                found = torch.where((ids[rank] == padding).unsqueeze(-1), found.detach(), found)
            outs.append(found * mine.unsqueeze(-1).to(found.dtype))
        return outs

    def _local_args(self, node: Node, rank: int, env: dict[Node, list[Any]]) -> list[Any]:
        args: list[Any] = list(map_arg(node.args, lambda n: env[n][rank]))
        args = localized(node, args, self.inference, self.choice)
        if node in self.partial and rank > 0:  # a bias is added once
            for position in facts_of(node).addends or ():
                if len(args) > position and args[position] is not None:
                    args[position] = torch.zeros_like(args[position])
        return args


@dataclass(frozen=True)
class GraphProof:
    """How far the sharded graph is from the model."""

    loss: float
    """Largest difference of an output element, relative to the largest output."""
    gradients: dict[str, float]
    """For each parameter: norm of the difference of gradients over the norm of the gradient."""
    sharded: int
    reductions: int

    @property
    def worst(self) -> float:
        return max(self.gradients.values(), default=0.0)


def graph_values(
    traced: Trace, model: nn.Module, inputs: Sequence[Tensor]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The value of every placeholder, and the parameters among them by their names in the model."""
    state = dict(model.named_parameters(remove_duplicate=False))
    values: dict[str, Tensor] = dict(traced.constants)
    params: dict[str, Tensor] = {}
    given = iter(inputs)
    for node in traced.nodes:
        if node.op != "placeholder":
            continue
        if node.name in traced.parameters:
            name = traced.parameters[node.name]
            params[name] = values[node.name] = state[name].detach().clone().requires_grad_()
        elif node.name in traced.inputs:
            values[node.name] = next(given)
        elif node.name not in values:
            values[node.name] = torch.empty(0)  # a tied duplicate, or one that nothing uses
    return values, params


def prove(
    model: nn.Module,
    tp: int,
    inputs: tuple[Tensor, ...] | None = None,
    sabotage: Sabotage = Sabotage.NONE,
    choice_of: Any = None,
) -> GraphProof:
    """Loss and every gradient of the sharded graph against `model`, in the model's own dtype.

    The loss is a random projection of the output, so that every output element counts.
    """
    inputs = inputs or default_inputs(model, tp)
    if inputs[0].dtype == torch.long:
        generator = torch.Generator().manual_seed(tp)
        rows = min(p.shape[0] for p in model.parameters() if p.dim() == 2 and p.shape[0] > 16)
        inputs = (torch.randint(0, rows, inputs[0].shape, generator=generator), *inputs[1:])
    traced = trace(model, inputs)
    inference = infer(traced)
    choice = (choice_of or choose)(inference, tp)
    run = ShardedRun(traced, inference, choice, sabotage)
    values, params = graph_values(traced, model, inputs)
    out = run(values)
    training = model.training
    model.eval()
    leaves_of = dict(model.named_parameters())
    expected_out = main_tensor(call_model(model, inputs))
    model.train(training)
    probe = torch.randn(expected_out.shape, generator=torch.Generator().manual_seed(1)).to(expected_out)
    wanted: tuple[Any, ...] = torch.autograd.grad(
        (expected_out * probe).sum(), list(leaves_of.values()), allow_unused=True
    )
    found: tuple[Any, ...] = torch.autograd.grad((out * probe).sum(), list(params.values()), allow_unused=True)
    by_identity = {id(leaves_of[n]): g for n, g in zip(leaves_of, wanted, strict=True)}
    state = dict(model.named_parameters(remove_duplicate=False))
    errors: dict[str, float] = {}
    for name, gradient in zip(params, found, strict=True):
        target = by_identity.get(id(state[name]))
        if target is None and gradient is None:
            continue
        if target is None or gradient is None:
            errors[name] = float("inf")
            continue
        scale = max(float(target.norm()), 1e-6 * float(probe.norm()) / max(1, target.numel()) ** 0.5)
        errors[name] = float((gradient - target).norm()) / scale
    loss = float((out - expected_out).detach().abs().max() / expected_out.detach().abs().max())
    sharded = sum(choice.any_sharded(inference.of(n)) for n in inference.params)
    return GraphProof(loss, errors, sharded, len(run.partial))

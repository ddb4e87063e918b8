"""Graphs that are copied node by node are those that torch would have traced again."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import Tensor, nn
from torch.fx import Graph, Node

from colrow.derive.flattened import SCATTERS, NotFlattenedError, flattened
from colrow.derive.recorded import Recording, record
from colrow.derive.trace import trace
from colrow.dryrun.calls import Inputs

X = torch.randn(3, 34, 8)


class Mixer(nn.Module):
    """Views and copies by one operator, pieces, dropout, a constant, writes in place and a region without gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.o, self.drop = nn.Linear(8, 48), nn.Linear(16, 8), nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.inner(x).to(torch.float32).chunk(3, -1)
        q, k, v = (t.reshape(3, 34, 4, 4).transpose(1, 2) for t in (q, k, v))
        with torch.no_grad():
            angle = torch.arange(x.shape[1], dtype=x.dtype)[:, None].cos().contiguous()
            parts = angle.double(), angle
        scores = q * parts[1] @ k.transpose(-1, -2)
        scores += 1
        scores.masked_fill_(scores > 3, 2.0).mul_(torch.tensor(0.5))
        order = torch.zeros(34, dtype=torch.int64)
        order[torch.arange(34)] = torch.arange(34)
        mixed = (self.drop(scores.softmax(-1)) @ v)[:, :, order].transpose(1, 2).reshape(3, 34, -1)
        return x + self.o(mixed.contiguous())


class Writes(nn.Module):
    """Writes into memory that several tensors have."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.register_buffer("count", torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        y = (x * 2).contiguous()
        piece = y[:, 1:, 0]
        if self.how == "views":
            for i in range(3):
                y[:, i, 2:] = y[:, i, :-2] + piece[:, :1]
                piece[:, 1:] *= 2
            y.mul_(3)
            with torch.no_grad():
                y[0].add_(1)
        elif self.how == "state":
            with torch.no_grad():
                self.count.mul_(3)
            y[:, 1:] += self.count
        elif self.how == "argument":
            x.add_(1)
        elif self.how == "other views":
            y.transpose(0, 1)[1:] += 1
        elif self.how == "several views":
            first, _ = y.split(4, -1)
            y.add_(1)
            return y + first.sum()
        elif self.how == "several views, through them":
            y.split(4, -1)[0].add_(1)
        return y.double() + piece.sum()


def listed(graph: Graph) -> tuple[set[object], list[object]]:
    """The placeholders, and the other nodes with their operands by place, but for assertions, which say nothing of what
    is computed."""
    index: dict[Node, object] = {n: n.name.replace("inputs_0", "x") for n in graph.nodes if n.op == "placeholder"}
    placeholders, others = {*index.values()}, list[object]()
    for node in graph.nodes:
        if node in index or "assert" in str(node.target):
            continue
        index[node] = len(others)
        value = node.meta.get("val")
        given = torch.fx.node.map_arg((node.args, node.kwargs), lambda n: index[n])
        shape = (value.dtype, value.shape, value.stride()) if isinstance(value, Tensor) else None
        others.append((str(node.target), str(given), shape))
    return placeholders, others


def computed(graph: Graph) -> Counter[str]:
    """How often each operator runs, but for views, which torch takes again more often, and assertions."""
    names = (str(n.target) for n in graph.nodes if n.op == "call_function" and n.target not in SCATTERS)
    return Counter(name for name in names if "assert" not in name)


def placeholders(graph: Graph) -> list[str]:
    return [str(node.target) for node in graph.nodes if node.op == "placeholder"]


def exported(model: nn.Module) -> Graph:
    return torch.export.export(model.eval(), (X.clone(),), strict=False).run_decompositions({}).graph


def recorded(model: nn.Module) -> Recording:
    return record(model.eval(), Inputs.of((X.clone(),)), lambda x: (model(x),))


def test_a_copied_graph_is_the_one_that_torch_traces_again() -> None:
    assert listed(flattened(recorded(Mixer())).graph) == listed(exported(Mixer()))


@pytest.mark.parametrize("how", ["views", "state"])
def test_writes_into_views_and_state_are_new_tensors(how: str) -> None:
    model = Writes(how)
    found = flattened(recorded(model))
    assert not any(n.target._schema.is_mutable for n in found.graph.nodes if hasattr(n.target, "_schema"))
    assert computed(found.graph) == computed(exported(Writes(how)))
    values = {**{name: X.clone() for name in found.inputs}, "b_count": torch.ones(())}
    module = torch.fx.GraphModule(nn.Module(), found.graph)
    results = torch.fx.Interpreter(module).run(*(values[name] for name in placeholders(found.graph)))
    assert torch.equal(results[0], model(X.clone()))
    assert [x.item() for x in results[1:]] == [3.0] * (how == "state")


@pytest.mark.parametrize("how", ["argument", "other views", "several views", "several views, through them"])
def test_other_writes_are_left_to_torch(how: str) -> None:
    with pytest.raises(NotFlattenedError):
        flattened(recorded(Writes(how)))
    kept = trace(Writes(how), (X.clone(),))
    assert kept.exports
    assert not any(n.target._schema.is_mutable for n in kept.nodes if hasattr(n.target, "_schema"))

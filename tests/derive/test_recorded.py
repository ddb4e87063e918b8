"""A recorded graph has the operators of an exported one, and what cannot be recorded is exported."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.fx import Node

from colrow.derive.failure import TraceError
from colrow.derive.infer import module_path, op_name
from colrow.derive.recorded import NotRecordedError, Recording
from colrow.derive.trace import Run, trace
from colrow.derive.undecomposed import computing_nodes, known_shape
from colrow.torch_compat import is_fake

X = torch.randn(3, 34, 8)


class Attention(nn.Module):
    """Composite operators, a region without gradients, a constant, a table, a write in place, and a tied weight."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.o, self.norm = nn.Linear(8, 24), nn.Linear(8, 8), nn.LayerNorm(8)
        self.last = nn.Linear(8, 8)
        self.last.weight = self.o.weight
        self.table = torch.randn(34, 1)
        self.calls = 0
        self.seen: Tensor | None = None
        self.register_buffer("scale", torch.ones(8))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        q, k, v = (t.unflatten(-1, (2, 4)).transpose(1, 2) for t in self.inner(self.norm(x) * self.scale).chunk(3, -1))
        with torch.no_grad():
            mask = torch.ones_like(x[0, :, 0]).cumsum(0) + torch.arange(34) + torch.tensor([0.5])
        mixed = nn.functional.scaled_dot_product_attention(q + self.table, k, v, mask.expand(34, 34))
        self.seen = mixed
        mixed = mixed.transpose(1, 2).flatten(2)
        mixed += 1
        return x + self.last(self.o(mixed))


def recorded(model: nn.Module) -> Recording:
    found, _ = Run().operators(model, (X,))
    assert isinstance(found, Recording)
    return found


def described(node: Node) -> object:
    return op_name(node), module_path(node), known_shape(node), len(node.all_input_nodes)


def test_a_recording_has_the_operators_of_an_export() -> None:
    model = Attention()
    found = recorded(model)
    want, _ = Run(exports=True).operators(model, (X,))
    assert list(map(described, computing_nodes(found.graph))) == list(map(described, computing_nodes(want.graph)))
    assert [tuple(value.shape) for value in found.constants.values()] == [(1,), (34, 1)]
    assert found.parameters == {
        f"p_{name.replace('.', '_')}": name for name, _ in model.named_parameters()
    }  # the tied weight by its first name


def test_a_recording_leaves_the_model_as_it_was() -> None:
    model = Attention()
    before = dict(model.state_dict(keep_vars=True))
    recorded(model)
    assert all(value is before[name] for name, value in model.state_dict(keep_vars=True).items())
    assert (model.calls, model.seen) == (0, None)
    assert torch.is_grad_enabled()
    assert not is_fake(model(X))


class Counted(nn.Module):
    """Puts a new tensor in its buffer's place."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        self.count = self.count + 1
        return x * self.count


def by_autocast(x: Tensor) -> Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return (x * (x @ x.transpose(1, 2)).sum()).float()


OTHERS: dict[str, Callable[[Tensor], Tensor]] = {
    "over a batch": torch.vmap(lambda x: torch.nn.functional.layer_norm(x, (8,))),
    "autocast": by_autocast,
    "a buffer": Counted(),
    "functions": lambda x: torch.cond(x.sum() > 3, lambda x: x + 1, lambda x: x - 1, (x,)),
}


class Calls(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.up, self.function = nn.Linear(8, 8), function

    def forward(self, x: Tensor) -> Tensor:
        return self.up(self.function(x))


@pytest.mark.parametrize("how", OTHERS)
def test_what_cannot_be_recorded_is_exported(how: str) -> None:
    model = Calls(OTHERS[how])
    with pytest.raises((NotRecordedError, TraceError)):
        recorded(model)
    found = trace(model, (X,))
    assert found.exports
    assert "linear" in {op_name(node) for node in found.nodes}


class TwoNames(nn.Module):
    """Holds a module twice, as a list of layers and something that works on them do."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(34))
        self.again = self.first

    def forward(self, x: Tensor) -> Tensor:
        return self.again(x)


def test_a_module_of_two_names_keeps_its_tensors() -> None:
    model = TwoNames()
    before = [*model.parameters(), *model.buffers()]
    trace(model, (X,))
    assert all(a is b for a, b in zip([*model.parameters(), *model.buffers()], before, strict=True))
    assert not any(map(is_fake, before))

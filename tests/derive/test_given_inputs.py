"""Arguments that are no plain tensors: tensors inside of lists and dicts, numbers, None."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from colrow.checking.check import check
from colrow.derive.derivation import derive
from colrow.errors import PlanError
from colrow.mesh import Mesh
from colrow.verifying.verify import verify


class Tower(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.users, self.items = nn.Embedding(96, 16), nn.Embedding(48, 16)
        self.up, self.down = nn.Linear(37, 64), nn.Linear(64, 32)

    def forward(self, features: dict[str, Any], passes: int = 1, scale: Tensor | None = None) -> Tensor:
        dense: Tensor = torch.cat(features["dense"], -1)
        x = torch.cat([self.users(features["user"]), self.items(features["item"]), dense], -1)
        for _ in range(passes):
            y = self.down(F.relu(self.up(x)))
        return y if scale is None else y * scale


def features() -> dict[str, Any]:
    ids = torch.arange(6)
    return {"user": ids, "item": ids % 5, "dense": [torch.rand(6, 2), torch.rand(6, 3)]}


GIVEN = {
    "a dict": lambda: (features(),),
    "a number and None behind it": lambda: (features(), 2, None),
    "a dict by name": lambda: {"features": features(), "scale": torch.rand(32)},
}


@pytest.mark.parametrize("name", GIVEN)
def test_a_model_that_takes_more_than_tensors_is_split_and_proven(name: str) -> None:
    model, inputs = Tower(), GIVEN[name]()
    found = derive(model, 2, inputs=inputs)
    assert {"users.weight", "items.weight", "up.weight", "down.weight"} <= {*found.sharded}
    assert check(model, found.plan(), Mesh(tp=2), inputs=inputs) == []


def test_values_inside_of_a_dict_are_run_in_double_precision() -> None:
    model = Tower()
    plan = derive(model, 2, inputs=(features(),)).plan()
    assert verify(model, plan, 2, inputs=(features(),)).verdict == "proved"


def test_the_batch_inside_of_a_dict_is_no_axis_to_split() -> None:
    found = derive(Tower(), 2, inputs=(features(),))
    assert found.trace is not None
    assert found.trace.inputs == ("inputs_0", "inputs_1", "inputs_2", "inputs_3")


def test_inputs_without_a_tensor_are_refused() -> None:
    with pytest.raises(PlanError, match="hold no tensor, but int, str: give tensors"):
        derive(Tower(), 2, inputs=(1, "a"))

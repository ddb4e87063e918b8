"""A saved plan knows the model that it was made for: the check notices another one."""

from __future__ import annotations

import importlib.util
import shutil
import sys
from pathlib import Path
from types import ModuleType

import pytest
from torch import nn

from colrow.checking.check import check_static
from colrow.errors import PlanError
from colrow.plans.fingerprint import Fingerprint, _Source
from colrow.plans.plan import Plan

CODE = """
from torch import nn

def scale(x):
    return x * 2

class Base(nn.Module):
    def forward(self, x):
        return self.norm(x)

class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.up, self.down = nn.Linear(16, width), nn.Linear(width, 16)

    def forward(self, x):
        return scale(self.down(self.up(x)))

class Model(Base):
    def __init__(self, width=32, layers=2):
        super().__init__()
        self.blocks, self.norm = nn.ModuleList(Block(width) for _ in range(layers)), nn.LayerNorm(16)

def unused():
    return 1
"""


def load(folder: Path, code: str) -> ModuleType:
    """The module of this code, as after a restart."""
    file = folder / "written.py"
    file.write_text(code, encoding="utf-8")
    _Source.of.cache_clear()
    shutil.rmtree(folder / "__pycache__", ignore_errors=True)  # two texts of one second and size have one .pyc
    spec = importlib.util.spec_from_file_location("written", file)
    assert spec is not None
    assert spec.loader is not None
    sys.modules["written"] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def saved(model: nn.Module, folder: Path) -> Plan:
    path = folder / "plan.yaml"
    Plan(modules={"blocks.*.up": "colwise", "blocks.*.down": "rowwise"}).made_for(model).save(path)
    return Plan.load(path)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (("", ""), None),
        (("return 1", "return 3"), None),
        (("x * 2", "x * 3"), "the source of Block changed"),
        (("self.down(self.up(x))", "self.down(self.up(x).relu())"), "the source of Block changed"),
        (("self.norm(x)", "x"), "the source of Model changed"),
        (("width=32", "width=64"), "it has 10 parameters with 4,288 elements, not 10 with 2,176"),
        (("self.norm =", "self.final ="), "its parameters have other names or shapes"),
    ],
)
def test_a_changed_model_is_noticed(change: tuple[str, str], words: str | None, tmp_path: Path) -> None:
    plan = saved(load(tmp_path, CODE).Model(), tmp_path)
    found = check_static(load(tmp_path, CODE.replace(*change)).Model(), plan, 2, 16)
    assert [f.code for f in found] == ([] if words is None else ["CR106"])
    if words is not None:
        assert words in found[0].message
        assert found[0].severity == "warning"


def test_another_class_is_named(tmp_path: Path) -> None:
    plan = saved(load(tmp_path, CODE).Model(), tmp_path)
    assert plan.fingerprint is not None
    other = load(tmp_path, CODE.replace("class Block", "class Layer").replace("Block(", "Layer(")).Model()
    assert plan.fingerprint.differences(other) == ["the source of Model changed", "Layer came in", "Block went out"]


def test_a_plan_without_one_is_for_any_model(tmp_path: Path) -> None:
    plan = Plan(modules={"blocks.*.up": "colwise", "blocks.*.down": "rowwise"})
    assert check_static(load(tmp_path, CODE).Model(width=64), plan, 2, 16) == []
    assert "fingerprint" not in plan.to_yaml()


def test_torchs_classes_and_those_without_a_file_do_not_count() -> None:
    local = type("Typed", (nn.Linear,), {})(4, 4)
    assert Fingerprint.of(nn.Sequential(local, nn.Linear(4, 4))).classes == {}


def test_what_is_no_fingerprint_is_refused() -> None:
    with pytest.raises(PlanError, match="plan: the key fingerprint is not what colrow writes"):
        Plan.from_yaml("modules: {}\nfingerprint: {parameters: 3}\n")

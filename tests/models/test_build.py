"""One builder: a command line's MODEL and a run's `model` section name the same models."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from colrow.cli.flags import PlanFlags
from colrow.config_sections import ModelSection
from colrow.errors import ConfigError
from colrow.models.build import Source, build_source, parse_model
from colrow.models.huggingface import config_to_huggingface
from colrow.models.llama import Llama
from colrow.models.shapes import shape

MINE = """
import torch

def build():
    return torch.nn.Linear(2, 3)

def number():
    return 3
"""


def config_json(folder: Path, **changes: Any) -> Path:
    tree = config_to_huggingface(shape("laptop"), torch.float32) | changes
    (folder / "config.json").write_text(json.dumps(tree), encoding="utf-8")
    return folder / "config.json"


def built(text: str) -> Source:
    source = build_source(parse_model(text), seed=0)
    by_cli = PlanFlags(text, tp=1).load_model()
    assert type(by_cli) is type(source.model)
    assert list(by_cli.state_dict()) == list(source.model.state_dict())
    return source


def test_a_named_shape_is_built_on_the_meta_device_to_be_seeded() -> None:
    source = built("laptop")
    assert (source.weights, source.config) == ("seeded", shape("laptop"))
    assert all(param.is_meta for param in source.model.parameters())


def test_a_callable_is_found_from_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine_here.py").write_text(MINE, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    assert isinstance(built("mine_here:build").model, torch.nn.Linear)
    for name, fault in (
        ("number", "returns a int: it must return an nn.Module"),
        ("none", r"no attribute 'none': write package.module:callable"),
    ):
        with pytest.raises(ConfigError, match=fault):
            build_source(ModelSection(python=f"mine_here:{name}"), seed=0)
    with pytest.raises(ConfigError, match="No module named 'mine_nowhere'"):
        built("mine_nowhere:build")


def test_a_folder_and_its_config_json_are_colrows_llama_where_that_fits(tmp_path: Path) -> None:
    file = config_json(tmp_path)
    for path in (tmp_path, file):
        source = built(str(path))
        assert isinstance(source.model, Llama)
        assert (source.weights, source.folder) == ("folder", tmp_path)


@pytest.mark.parametrize("change", [{"mlp_bias": True}, {"model_type": "gemma"}], ids=["option", "family"])
def test_a_folder_that_colrows_llama_does_not_compute_is_transformers(change: dict[str, Any], tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    file = config_json(tmp_path, **change)
    for path in (tmp_path, file):
        source = built(str(path))
        assert type(source.model).__module__.startswith("transformers.")
        assert (source.weights, source.folder, source.config) == ("folder", tmp_path, None)
        assert source.model.training
        assert all(param.is_meta for param in source.model.parameters())
    with pytest.raises(ConfigError, match=r"set model\.implementation to transformers"):
        build_source(ModelSection(huggingface=str(tmp_path), implementation="colrow"), seed=0)


def test_what_nobody_computes_names_the_reason(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    config_json(tmp_path, model_type="no-such-type")
    with pytest.raises(ConfigError, match=r"transformers cannot build the model in .*no-such-type"):
        built(str(tmp_path))
    config_json(tmp_path, model_type="t5")
    with pytest.raises(ConfigError, match=r"t5 is no causal language model, .*: build another in model\.python"):
        built(str(tmp_path))
    (tmp_path / "config.json").unlink()
    with pytest.raises(ConfigError, match=r"holds no config\.json"):
        built(str(tmp_path))
    with pytest.raises(ConfigError, match="no model is called 'laptob'"):
        built("laptob")


FOREIGN = """
import pathlib
pathlib.Path({ran!r}).touch()
from transformers import LlamaConfig, LlamaForCausalLM

class Config(LlamaConfig):
    model_type = "foreign"

class Model(LlamaForCausalLM):
    config_class = Config
"""


def test_code_in_a_model_folder_runs_only_when_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers")
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    folder, ran = tmp_path / "folder", tmp_path / "ran"
    folder.mkdir()
    (folder / "code.py").write_text(FOREIGN.format(ran=str(ran)))
    names = {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}
    config_json(folder, model_type="foreign", architectures=["Model"], auto_map=names, num_hidden_layers=1)
    with pytest.raises(ConfigError, match=r"Python code of that folder \(code.Model\).*--trust-code"):
        build_source(parse_model(str(folder)), seed=0)
    assert not ran.exists()
    source = build_source(parse_model(str(folder), trust_code=True), seed=0)
    assert type(source.model).__name__ == "Model"
    assert ran.exists()
    config_json(folder, auto_map=names)  # calls itself a Llama: the folder's code is not needed, and not run
    ran.unlink()
    assert isinstance(build_source(parse_model(str(folder)), seed=0).model, Llama)
    assert not ran.exists()
    trusted = build_source(parse_model(str(folder), trust_code=True), seed=0)
    assert type(trusted.model).__name__ == "Model"

"""Configs: every shipped one loads, and what is wrong is named with its fix."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from colrow.config import dump_config, load_config, parse_config
from colrow.errors import ConfigError
from colrow.mesh import Mesh

CONFIGS = sorted((Path(__file__).parents[1] / "configs").glob("*.yaml"))
GOOD = {
    "run": {"dir": "runs/x"},
    "model": {"shape": "laptop"},
    "data": {"corpus": "stdlib", "seq_len": 256},
    "train": {"steps": 3, "global_batch": 4, "micro_batch": 2, "lr": 1e-3},
}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_shipped_config_loads(path: Path) -> None:
    config = load_config(path)
    assert parse_config(yaml.safe_load(dump_config(config))) == config


def test_overrides_go_over_the_file(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(yaml.safe_dump(GOOD))
    config = load_config(file, {"mesh.tp": 4, "train.steps": 20})
    assert (config.mesh.tp, config.train.steps) == (4, 20)


@pytest.mark.parametrize(
    ("section", "change", "message"),
    [
        ("train", {"stepz": 3}, "unknown key train.stepz; did you mean 'steps'"),
        ("mesh", {"tensor": 2}, "unknown key mesh.tensor; known names: dp_replicate, dp_shard, pp, tp"),
        ("mesh", {"tp": 0}, "mesh.tp: Input should be greater than 0"),
        ("model", {"huggingface": "DIR"}, "give exactly one of shape, huggingface, python"),
        ("train", {"lr": "fast"}, "train.lr: Input should be a valid number"),
    ],
)
def test_what_is_wrong_is_named(section: str, change: dict[str, object], message: str) -> None:
    tree = {key: dict(value) for key, value in GOOD.items()}
    tree.setdefault(section, {}).update(change)
    with pytest.raises(ConfigError, match=message):
        parse_config(tree)


def test_every_mistake_is_reported_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config({"run": {"dir": "x"}, "model": {"shape": "laptop"}})
    assert {"config: data is missing", "config: train is missing"} <= set(str(caught.value).splitlines())


@pytest.mark.parametrize(
    ("text", "message"), [(None, "cannot read config"), ("a: [", "is not YAML"), ("- 1", "holds no mapping")]
)
def test_a_file_that_is_no_config(tmp_path: Path, text: str | None, message: str) -> None:
    file = tmp_path / "c.yaml"
    if text is not None:
        file.write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_config(file)


def test_a_mesh_that_does_not_fit_names_those_that_do() -> None:
    with pytest.raises(ConfigError, match="meshes that fit: dp_shard 4 × tp 2"):
        Mesh(tp=2, dp_shard=3).require_world_size(8)

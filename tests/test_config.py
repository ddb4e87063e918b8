"""Configs: every shipped one loads, and what is wrong is named with its fix."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from colrow.cli import main
from colrow.cli.config_flags import read_flags
from colrow.config import RunConfig, dump_config, load_config, parse_config
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
        ("train", {"stepz": 3}, "unknown key train.stepz; did you mean 'train.steps'"),
        ("mesh", {"tensor": 2}, "unknown key mesh.tensor; known names: data_engine, dp_replicate, dp_shard, pp, tp"),
        ("mesh", {"tp": 0}, "mesh.tp: Input should be greater than 0"),
        ("model", {"huggingface": "DIR"}, "give one of shape, huggingface, python"),
        ("train", {"lr": "fast"}, "train.lr: Input should be a valid number"),
    ],
)
def test_what_is_wrong_is_named(section: str, change: dict[str, object], message: str) -> None:
    tree = {key: dict(value) for key, value in GOOD.items()}
    tree.setdefault(section, {}).update(change)
    with pytest.raises(ConfigError, match=message):
        parse_config(tree)


FAULTS = [
    (["--train.stepps", "3"], {"train": {"stepps": 3}}, "unknown key train.stepps; did you mean 'train.steps'?"),
    (["--steps", "3"], {"steps": 3}, "unknown key steps; did you mean 'train.steps'?"),
    (["--every", "3"], {"every": 3}, "unknown key every; did you mean 'eval.every' or 'checkpoint.every'?"),
    (["--trian.steps=3"], {"trian": {"steps": 3}}, "unknown key trian; did you mean 'train'?"),
    (["--mesh.pt", "2"], {"mesh": {"pt": 2}}, "unknown key mesh.pt; did you mean 'mesh.tp'?"),
    (["--mesh.tp", "2.5"], {"mesh": {"tp": 2.5}}, "mesh.tp: Input should be a valid integer"),
    (["--mesh", "4"], {"mesh": 4}, "mesh is a section: give its keys"),
    (["--train.steps", "many"], {"train": {"steps": "many"}}, "train.steps: Input should be a valid integer"),
    (["--train.lr", ".inf"], {"train": {"lr": float("inf")}}, "finite number"),
    (["--train.lr", "1e999"], {"train": {"lr": "1e999"}}, "train.lr: Input should be a finite number"),
    (["--train.betas", "0.9", "x"], {"train": {"betas": [0.9, "x"]}}, "train.betas.1: Input should be a valid number"),
    (["--check", "maybe"], {"check": "maybe"}, "check: Input should be a valid boolean"),
    (["--device", "tpu"], {"device": "tpu"}, "device: Input should be 'auto', 'cpu' or 'cuda'"),
    (["--train.cuda_graph", "maybe"], {"train": {"cuda_graph": "maybe"}}, "train.cuda_graph: Input should be true, "),
    (["--train.steps", "null"], {"train": {"steps": None}}, "train.steps: Input should be a valid integer"),
]


@pytest.mark.parametrize(("flags", "change", "message"), FAULTS, ids=lambda value: str(value)[:30])
def test_a_fault_gives_one_line_in_the_file_and_as_a_flag(
    flags: list[str], change: dict[str, object], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(yaml.safe_dump(GOOD))
    assert main(["train", str(file), *flags]) == 2
    by_flag = capsys.readouterr().err
    tree: dict[str, object] = dict(GOOD)
    for key, value in change.items():
        tree[key] = {**GOOD.get(key, {}), **value} if isinstance(value, dict) else value
    file.write_text(yaml.safe_dump(tree))
    assert main(["train", str(file)]) == 2
    in_file = capsys.readouterr().err
    assert message in by_flag
    assert message in in_file
    assert len(by_flag.splitlines()) == 1
    if ".inf" not in flags:  # a number that is not finite is found where it stands: in the file, by its line
        assert by_flag == in_file


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["3"], "'3' belongs to no flag"),
        (["-x", "3"], "'-x' belongs to no flag"),
        (["--train.steps"], "--train.steps has no value"),
        (["--train.steps", "3", "4"], "takes one value"),
    ],
)
def test_words_that_are_no_flags(flags: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_flags(flags)


def test_flags_are_read_as_the_file_is(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(yaml.safe_dump(GOOD))
    flags = [
        "--run.dir",
        "2026",
        "--check",
        "false",
        "--train.compile",
        "True",
        "--train.grad-clip=1",
        "--train.grad-clip=None",
    ]
    flags += ["--train.betas", "0.8", "0.99", "--loss", "null", "--sample.prompt", "def f(x): # none"]
    config = load_config(file, read_flags(flags))
    assert (config.run.dir, config.check, config.train.compile, config.train.grad_clip) == (
        Path("2026"), False, True, None,
    )  # fmt: skip
    assert (config.train.betas, config.loss, config.sample.prompt) == ((0.8, 0.99), None, "def f(x): # none")


def test_a_word_that_yaml_reads_as_false_is_a_choice_too(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(yaml.safe_dump(GOOD) + "forecast: off\n")
    assert load_config(file).forecast == load_config(file, read_flags(["--forecast", "off"])).forecast == "off"


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


def test_a_config_comes_back_from_its_json() -> None:
    """As the jobs of a benchmark and the forecasts of arms take it."""
    tree = {
        "run": {"dir": "~/runs"},
        "model": {"shape": "laptop"},
        "data": {"corpus": "stdlib", "seq_len": 8},
        "train": {"steps": 1, "global_batch": 1, "micro_batch": 1, "lr": 1e-3},
    }
    config = parse_config(tree)
    assert config.run.dir == Path("~/runs").expanduser()
    assert RunConfig.model_validate_json(config.model_dump_json()) == config

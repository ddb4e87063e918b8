"""`mesh: auto` and `train.micro_batch: auto`: chosen once, printed, kept by the run's folder, seen by the ranks."""

from __future__ import annotations

import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from colrow.cli.config_flags import read_flags
from colrow.config import RunConfig, dump_config, load_config, parse_config
from colrow.errors import ConfigError
from colrow.forecasting.choices import Choices
from colrow.forecasting.devices import Device, device_named
from colrow.mesh import Mesh
from colrow.models.build import build_source
from colrow.run import auto
from colrow.run.auto import choose
from helpers.forked import Commands

H200 = device_named("h200")
SLOW = dict.fromkeys((2, 4), ((1.0, 1e-3), (1e9, 10.0)))
BY_COPIES = replace(H200, rates=replace(H200.rates, links=SLOW))
"""Only copy engines send fast."""


@pytest.fixture
def requested(tree: dict[str, Any]) -> dict[str, Any]:
    """A config as YAML has it; compiling its walk would take seconds."""
    tree["mesh"] = "auto"
    tree["train"] |= {"compile": False, "micro_batch": "auto", "global_batch": 4}
    return tree


def on(monkeypatch: pytest.MonkeyPatch, device: Device, gpus: int) -> None:
    monkeypatch.setattr(auto, "_devices", lambda *_: (device, gpus))


FLAGS: list[list[str]] = [
    [],
    ["--mesh", "auto"],
    ["--mesh.tp", "2", "--mesh", "auto"],
    ["--mesh=auto", "--train.micro_batch", "auto"],
]


def test_what_says_auto_is_chosen_and_the_ranks_see_it(
    requested: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    on(monkeypatch, BY_COPIES, 2)
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(requested), encoding="utf-8")
    config = load_config(path, auto=True)
    assert config.auto == {"mesh", "train.micro_batch"}
    choice = choose(config)
    assert not choice.config.auto
    assert choice.config.mesh == Mesh(dp_shard=2, data_engine="flat")
    assert choice.config.fsdp.gather == choice.config.fsdp.exchange == "copy_engine"
    for flags in FLAGS:
        assert load_config(path, read_flags(flags), auto=True) == config
        assert load_config(path, read_flags([*flags, *choice.flags])) == choice.config
    text = " ".join(" ".join(choice.lines).split())
    engine = "mesh.data_engine flat, fsdp.gather copy_engine, fsdp.exchange copy_engine"
    size = choice.config.train.micro_batch
    assert text.startswith(f"chosen mesh {choice.config.mesh}, {engine}, train.micro_batch {size}: ")
    assert text.count(" loses ") == 3
    assert max(len(line) for lines in choice.lines for line in lines.splitlines()) <= 80
    nothing = choose(choice.config)
    assert (nothing.config, nothing.lines, nothing.flags) == (choice.config, (), ())


@pytest.mark.exhaustive
def test_the_fastest_that_fits_is_chosen(requested: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """What cannot send fast is not split; what has no memory takes fewer sequences: other devices, other choices."""
    config = parse_config(requested)
    on(monkeypatch, BY_COPIES, 2)
    assert choose(config).config.mesh.tp == 1
    large = choose(config).config.train.micro_batch
    assert large > 1  # the CPU's cost of an operator is spread over more
    for constant in ("CONTEXT", "WORKSPACES"):  # larger than this model
        monkeypatch.setattr(f"colrow.forecasting.memory.{constant}", 0)
    one = parse_config({**requested, "mesh": {}})
    fixed = parse_config({**requested, "train": {**requested["train"], "micro_batch": 1}})
    choices = Choices(fixed, build_source(fixed.model, 0).model, H200, 1, as_given=True)
    needed = choices.best(Mesh()).memory.device
    on(monkeypatch, replace(H200, memory=1.1 * needed), 1)
    assert choose(one).config.train.micro_batch < large
    on(monkeypatch, replace(H200, memory=0.5 * needed), 1)
    with pytest.raises(ConfigError, match=r"^train.micro_batch: auto: nothing fits \(.* needs least memory") as refused:
        choose(one)
    assert "\n" not in str(refused.value)


@pytest.mark.exhaustive
def test_the_flat_engine_is_chosen_where_it_can_run(requested: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def chosen(device: Device = BY_COPIES, gpus: int = 2, **changes: Any) -> RunConfig:
        on(monkeypatch, device, gpus)
        return choose(parse_config({**requested, **changes})).config

    train = requested["train"] | {"micro_batch": 1}
    assert chosen(train=train).fsdp.gather == "copy_engine"
    apart = replace(BY_COPIES, rates=replace(BY_COPIES.rates, peer_copy=0.0))
    assert chosen(apart, train=train).fsdp.gather == "collectives"
    assert chosen(train=train | {"replay_every": 5}).mesh.data_engine == "fsdp2"
    given = chosen(train=train, fsdp={"gather": "copy_engine"})  # no other mesh can run it
    assert (given.mesh.data_engine, given.fsdp.gather) == ("flat", "copy_engine")
    monkeypatch.setattr(Choices, "_model_can_be_flat", False)
    assert chosen(train=train).mesh.data_engine == "fsdp2"
    monkeypatch.undo()
    by_hand = chosen(mesh={"dp_shard": 2, "data_engine": "flat"})
    assert (by_hand.mesh.data_engine, by_hand.fsdp.gather) == ("flat", "collectives")
    assert chosen(mesh={"dp_shard": 2}).mesh.data_engine == "fsdp2"


def test_the_flat_engine_stays_inside_a_host(requested: dict[str, Any]) -> None:
    config = parse_config(requested)
    choices = Choices(config, build_source(config.model, 0).model, H200, 4, hosts=2)

    def engines(**axes: int) -> list[tuple[str, str]]:
        found = choices._engines(choices._on(Mesh(**axes), 1))
        return [(each.mesh.data_engine, each.fsdp.exchange) for each in found]

    fsdp2, flat, by_copies = ("fsdp2", "collectives"), ("flat", "collectives"), ("flat", "copy_engine")
    assert engines(dp_replicate=2, dp_shard=2) == [fsdp2, by_copies]
    assert engines(dp_replicate=4) == [fsdp2, flat]
    assert engines(dp_shard=4) == engines(dp_shard=2, tp=2) == [fsdp2]
    assert engines(pp=2, dp_shard=2) == [fsdp2]


@pytest.mark.exhaustive
def test_what_is_given_stays(requested: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    on(monkeypatch, H200, 2)
    given = parse_config({**requested, "mesh": {"tp": 2}})
    chosen = choose(given)
    assert chosen.config.mesh == Mesh(tp=2)
    assert [flag for flag in chosen.flags if flag.startswith("--mesh")] == []
    fixed = parse_config({**requested, "train": {**requested["train"], "micro_batch": 2}})
    assert choose(fixed).config.train.micro_batch == 2


def test_a_continued_run_keeps_what_was_chosen(requested: dict[str, Any], tmp_path: Path) -> None:
    requested["run"]["dir"] = str(tmp_path)
    config = parse_config(requested)
    before = config.with_chosen(Mesh(tp=2, dp_shard=2, data_engine="flat"), 1, "copy_engine", "collectives")
    (tmp_path / "config.yaml").write_text(dump_config(before), encoding="utf-8")
    for in_launcher in (True, False):
        kept = choose(config, in_launcher=in_launcher)
        assert kept.config == before
        assert "when the run was started" in " ".join(kept.lines[0].split())


def test_bad_uses_are_one_line(requested: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"^mesh: auto and train.micro_batch: auto is chosen by colrow's own launcher"
    ):
        choose(parse_config(requested), in_launcher=False)
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(requested), encoding="utf-8")
    with pytest.raises(ConfigError, match=r"is for `colrow train` and `colrow forecast`: give a value here$"):
        load_config(path)
    for key, value, message in (
        ("mesh", "automatic", r"give its keys, such as mesh.KEY, or auto \(given: 'automatic'\)$"),
        ("mesh", {"tp": "auto"}, r"mesh.tp: .*; mesh: auto chooses all axes \(given: 'auto'\)$"),
        ("train", {**requested["train"], "micro_batch": "Auto"}, r"train.micro_batch: .*, or auto \(given: 'Auto'\)$"),
    ):
        with pytest.raises(ConfigError, match=message) as refused:
            parse_config({**requested, key: value})
        assert "\n" not in str(refused.value)


@pytest.mark.exhaustive
def test_a_run_on_a_cpu_chooses_writes_and_keeps(requested: dict[str, Any], tmp_path: Path, commands: Commands) -> None:
    requested["run"]["dir"] = str(tmp_path / "run")
    requested["data"]["validation_fraction"] = 0.3
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(requested), encoding="utf-8")
    environment = commands.environment()

    def train(steps: str) -> str:
        done = subprocess.run(
            ["colrow", "train", str(path), "--train.steps", steps],
            capture_output=True, text=True, env=environment, cwd=tmp_path, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout

    text = "".join(f"def f{i}(x):\n    return x * {i * i}\n" for i in range(8000))
    (tmp_path / "text.txt").write_text(text, encoding="utf-8")
    assert "chosen     mesh 1 process, train.micro_batch" in train("2")
    written: RunConfig = load_config(tmp_path / "run" / "config.yaml")
    assert "when the run was" in train("3")
    assert load_config(tmp_path / "run" / "config.yaml").train.micro_batch == written.train.micro_batch

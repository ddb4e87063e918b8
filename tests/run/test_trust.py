"""Code that a run folder names runs for who made the folder; others have to ask for it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from colrow.cli import main
from colrow.config import RunConfig, dump_config, load_config
from colrow.errors import ConfigError
from colrow.run.trust import MARK, mark_as_ours, require_trusted

PYTHON = {"model": {"python": "mine:build"}}


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def folder_of(config: RunConfig) -> Path:
    config.run.dir.mkdir(parents=True)
    text = dump_config(config)
    (config.run.dir / "config.yaml").write_text(text, encoding="utf-8")
    (config.run.dir / "plan.yaml").write_text("modules: {}\n", encoding="utf-8")
    mark_as_ours(config.run.dir, text)
    return config.run.dir / "config.yaml"


def test_a_folder_of_ones_own_is_trusted_until_its_config_changes(config: Callable[..., RunConfig]) -> None:
    file = folder_of(config(**PYTHON))
    require_trusted(load_config(file), file, trust_code=False)
    file.write_text(file.read_text().replace("mine:build", "theirs:build"))
    with pytest.raises(ConfigError, match=r"names code \(theirs:build\) and was not written by a run of this user"):
        require_trusted(load_config(file), file, trust_code=False)
    require_trusted(load_config(file), file, trust_code=True)


def test_a_folder_of_another_user_is_not(
    config: Callable[..., RunConfig], home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = folder_of(config(**PYTHON))
    shutil.rmtree(home)
    ran = tmp_path / "ran"
    (tmp_path / "mine.py").write_text(f"open({str(ran)!r}, 'w')\n")
    for argv in (
        ["export", str(file.parent), "-o", str(tmp_path / "out")],
        ["generate", str(file.parent), "--prompt", "a"],
        ["train", str(file)],
        ["train", str(file), "--model.trust_code", "false"],
        ["forecast", str(file)],
        ["bench", str(file)],
    ):
        assert main(argv) == 2
        error = capsys.readouterr().err
        assert "--trust-code then runs it" in error
        assert len(error.splitlines()) == 1
    assert not ran.exists()
    assert not (home / "colrow" / "key").exists()  # asking makes no key


def test_a_config_that_names_no_code_needs_no_mark(config: Callable[..., RunConfig]) -> None:
    file = folder_of(config())
    (file.parent / MARK).unlink()
    require_trusted(load_config(file), file, trust_code=False)


def test_the_key_is_the_users_alone(config: Callable[..., RunConfig], home: Path) -> None:
    folder_of(config())
    key = home / "colrow" / "key"
    assert key.stat().st_mode & 0o077 == 0
    assert len(key.read_bytes()) == 32

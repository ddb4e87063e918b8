"""Wrong words behind a verb: one line of at most 80 columns and exit status 2, whichever verb it is."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import shutil
import sys
import time
from pathlib import Path

import pytest

from colrow.cli import VERBS, main
from colrow.cli.bench import Flags as BenchFlags
from colrow.cli.check import Flags as CheckFlags
from colrow.cli.config_flags import read_flags
from colrow.cli.flags import parse
from colrow.cli.generate import Flags as GenerateFlags
from colrow.cli.text import Terminal
from colrow.errors import ConfigError

GOOD = {"check": ["laptop", "--tp", "2"], "plan": ["laptop", "--tp", "2"], "verify": ["laptop", "--tp", "2"]}
GOOD |= {"forecast": ["c.yaml"], "checkpoints": ["run"], "export": ["run", "-o", "out"], "calibrate": ["-o", "t.json"]}
GOOD |= {"generate": ["run", "--prompt", "a"], "bench": ["c.yaml"], "train": ["c.yaml"]}
WRONG = [["--bogus", "3"], ["--bogus=3"], ["-q"], ["surplus", "words"], ["--"], ["--é"], ["--" + "x" * 300]]


@pytest.mark.parametrize("verb", VERBS)
def test_a_wrong_word_is_one_line(
    verb: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert verb in GOOD, "give words that the verb takes in GOOD"
    shutil.copy(Path(__file__).parents[2] / "configs/laptop.yaml", tmp_path / "c.yaml")
    monkeypatch.chdir(tmp_path)
    for words in WRONG:
        assert main([verb, *GOOD[verb], *words]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"colrow {verb}: error: ")
        assert len(line) <= 80 or "known names" in line, line


@pytest.mark.parametrize(
    ("words", "text"),
    [
        ("laptop --pt 2", "unknown flag --pt; did you mean '--tp'?"),
        ("laptop -tp 2", "unknown flag -tp; did you mean '--tp'?"),
        ("laptop --mesh.tp 2", "unknown flag --mesh.tp; did you mean '--tp'?"),
        ("laptop --tp 2 --batchsize 3", "unknown flag --batchsize; did you mean '--batch-size'?"),
        ("laptop --tp 2 --jsson", "unknown flag --jsson; did you mean '--json'?"),
        ("laptop", "--tp is missing"),
        ("--tp 2", "MODEL is missing"),
        ("laptop --tp", "--tp has no value"),
        ("laptop --tp --json", "--tp has no value"),
        ("laptop --tp x", "--tp: Input should be a valid integer (given: 'x')"),
        ("laptop --tp 2.5", "--tp: Input should be a valid integer (given: 2.5)"),
        ("laptop --tp 2 --json=maybe", "--json: Input should be a valid boolean (given: 'maybe')"),
    ],
)
def test_what_is_wrong_is_named(words: str, text: str) -> None:
    with pytest.raises(ConfigError, match="^" + re.escape(text)):
        parse(CheckFlags, "check", words.split())


def test_numbers_are_finite_and_names_known() -> None:
    for words in ("--temperature nan", "--temperature 1e999", "--device tpu", "--seed 1.5"):
        with pytest.raises(ConfigError, match=f"^{words.split()[0]}: Input should be"):
            parse(GenerateFlags, "generate", ["run", "--prompt", "a", *words.split()])


@pytest.mark.parametrize(
    ("words", "command"),
    [
        ("--mesh.tp 1 c.yaml", "colrow train c.yaml --mesh.tp 1"),
        ("--sample.prompt=a c.yaml --check false", "colrow train c.yaml --sample.prompt=a --check false"),
        ("--mesh.tp 1", "colrow train CONFIG.yaml --mesh.tp 1"),
    ],
)
def test_a_config_behind_flags_is_put_first(words: str, command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", *words.split()]) == 2
    assert capsys.readouterr().err == f"colrow train: error: the config file comes first: {command}\n"


def test_texts_of_a_list_stay_texts() -> None:
    """YAML would make a mapping of `transformers:`, a boolean of `on` and a number of `12`."""
    arms = ["torchtitan:DIR", "transformers:", "config:plan=derive"]
    assert parse(BenchFlags, "bench", ["c.yaml", "--arms", *arms]).arms == tuple(arms)
    assert read_flags(["--train.no_decay", "norm:", "on", "12"]) == {"train.no_decay": ["norm:", "on", "12"]}
    assert read_flags(["--train.no_decay", "norm:"]) == {"train.no_decay": ["norm:"]}
    assert read_flags(["--train.no_decay", "[norm, head]"]) == {"train.no_decay": ["norm", "head"]}
    assert read_flags(["--train.betas", "[0.5, 0.6]"]) == {"train.betas": [0.5, 0.6]}


def test_words_are_read_as_in_a_config() -> None:
    for spelled in ("--json", "--json true", "--json=True", "--json on", "--no-strict --json"):
        flags = parse(CheckFlags, "check", [*spelled.split(), "laptop", "--tp=2", "--keep_whole", "a", "b"])
        assert (flags.json, flags.strict, flags.model, flags.tp, flags.keep_whole) == (
            True,
            False,
            "laptop",
            2,
            ("a", "b"),
        )
    for spelled in ("--json false", "--no-json", "--json=No", "--json --json off"):
        assert parse(CheckFlags, "check", ["laptop", "--tp", "2", *spelled.split()]).json is False
    flags = parse(GenerateFlags, "generate", ["run", "--prompt", "--- a list", "--temperature", "0", "--top-k", "None"])
    assert (flags.prompt, flags.temperature, flags.top_k) == ("--- a list", 0.0, None)
    assert parse(GenerateFlags, "generate", ["2026", "--prompt", "-x"]).source == Path("2026")


@pytest.mark.parametrize("rank", [0, 1])
def test_an_error_that_all_ranks_find_is_printed_once(
    rank: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """torchrun prints the error file of each rank that it did not end first: the host's other ranks wait for that."""
    for name in ("RANK", "LOCAL_RANK"):
        monkeypatch.setenv(name, str(rank))
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    waited: list[float] = []
    monkeypatch.setattr(time, "sleep", waited.append)
    monkeypatch.setattr(os, "_exit", sys.exit)
    with_launcher: list[bool] = []
    monkeypatch.setattr("colrow.run.heartbeat.end_with_launcher", lambda: with_launcher.append(True))
    with pytest.raises(SystemExit) as ended:
        main(["generate", "run", "--promt", "a"])
    assert ended.value.code == 2
    assert capsys.readouterr().err == ""
    message = json.loads((tmp_path / "error.json").read_text())["message"]["message"]
    assert message == "unknown flag --promt; did you mean '--prompt'?"
    assert len(waited) == rank
    assert with_launcher == [True]  # whatever the verb: no rank lives on when its launcher is killed


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (
            OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "plan.yaml"),
            "plan.yaml: No space left on device: free some",
        ),
        (PermissionError(errno.EACCES, os.strerror(errno.EACCES), "x"), "x: Permission denied: see who owns it"),
    ],
)
def test_an_error_of_a_file_is_one_line(
    error: OSError, text: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(argv: list[str]) -> int:
        raise error

    monkeypatch.setattr("colrow.cli.checkpoints.main", fail)
    assert main(["checkpoints", "x"]) == 2
    assert capsys.readouterr().err.startswith(f"colrow checkpoints: error: {text}")


def test_a_table_into_a_closed_pipe_is_no_finding() -> None:
    """rich itself would exit with 1."""
    reader, writer = os.pipe()
    os.close(reader)
    file = os.fdopen(writer, "w")
    with pytest.raises(BrokenPipeError):
        Terminal(file=file).print("x")
    with contextlib.suppress(BrokenPipeError):
        file.close()


def test_a_text_in_brackets_is_printed_as_it_stands(capsys: pytest.CaptureFixture[str]) -> None:
    Terminal(width=40).say("  a view to [batch, heads] in layers.0.self_attn.q_proj", 4)
    out = capsys.readouterr().out
    assert out == "  a view to [batch, heads] in\n      layers.0.self_attn.q_proj\n"
    Terminal(width=80).print("a view to [batch, heads]")
    assert "batch" not in capsys.readouterr().out  # rich takes it for markup

"""Values that a tired or hostile user brings: each is one line and exit status 2, without a traceback or a wait."""

from __future__ import annotations

import json
import os
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from colrow.cli import main
from colrow.config import parse_config
from colrow.config_sections import DataSection
from colrow.data.corpus import open_corpus
from colrow.data.tokenizer import load_tokenizer, train_tokenizer
from colrow.errors import ConfigError, DataError
from colrow.models.huggingface import config_to_huggingface
from colrow.models.shapes import shape
from colrow.parallel.pipeline_split import fit_micro_batch
from helpers.started import without_ranks

CONFIG = """run: {dir: run}
model: {shape: laptop, layers: 1}
data: {corpus: "*.txt", seq_len: 32, tokenizer: {vocab_size: 300}, cache: cache, workers: 1}
train: {steps: 2, global_batch: 4, micro_batch: 2, lr: 1.0e-3}
device: cpu
"""
PYTHON = "--model.shape null --model.layers null --model.python"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "c.yaml").write_text(CONFIG)
    (tmp_path / "kernel").symlink_to("/proc/kmsg")
    (tmp_path / "text.txt").write_text("\n\n".join(f"row {i} times {i % 97} is {i * 31 % 89}." for i in range(3000)))
    return tmp_path


def refused(argv: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line of an error."""
    assert main(argv) == 2
    *_, line = capsys.readouterr().err.splitlines()
    assert line.startswith(f"colrow {argv[0]}: error: ")
    return line


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ("--model.layers 100000000", "model.layers: Input should be less than or equal to 10000"),
        ("--train.steps 99999999999999999999999", "train.steps: Input should be less than 9223372036854775808"),
        ("--run.seed 9223372036854775808", "run.seed: Input should be less than 9223372036854775808"),
        ("--train.betas 0.9 1.0", "train.betas.1: Input should be less than 1"),
        ("--data.corpus /dev/zero", "corpus '/dev/zero': /dev/zero is a device: write its text into a file"),
        ("--data.corpus /proc/kmsg", "/proc/kmsg is a file of the kernel"),
        ("--data.corpus /sys/**/*", "/sys is a file of the kernel"),
        ("--data.corpus k*nel", "matches kernel, which is a file of the kernel"),
        ("--plan kernel", "kernel is a file of the kernel: give a file on a disk"),
        ("--train.steps 010", "line 1 holds 010, which YAML reads as 8: write 8, or put it in quotes"),
        ("--train.steps 1:30", "line 1 holds 1:30, which YAML reads as 90"),
        ("--train.lr 1:30.5", "line 1 holds 1:30.5, which YAML reads as 90.5"),
        (f"--train.steps {'9' * 5000}", "holds a number of 5,000 digits"),
        (
            "--mesh.dp_shard 9000000000000000000 --mesh.dp_replicate 9000000000000000000",
            "no cluster more than 1,000,000",
        ),
        ("--train.global_batch 9000000000000000000", "train.global_batch: Input should be less than or equal to"),
        ("--run.dir=", "run.dir: Input is empty: give a path, or . for the current folder"),
        ("--data.cache=", "data.cache: Input is empty"),
        ("--run.dir a\0b", "run.dir: Input holds characters that no path should have"),
        ("--run.dir a\udcffb", "run.dir: Input holds characters that no path should have"),
        ("--run.dir /proc/none", "cannot write to the run's folder /proc/none"),
        ("--run.dir c.yaml", "cannot write to the run's folder c.yaml"),
        ("--data.cache c.yaml", "cannot write to the cache folder c.yaml"),
        (f"{PYTHON} os:system", "model os:system cannot be called without arguments"),
        (f"{PYTHON} os:path", "model os:path is a module: name a callable"),
        (f"{PYTHON} os:getcwd", "returns a str: it must return an nn.Module"),
    ],
)
def test_a_config_that_cannot_run(
    flags: str, says: str, folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    ordered = without_ranks(monkeypatch)
    assert says in refused(["train", "c.yaml", *flags.split()], capsys)
    assert ordered == []


def test_the_nearest_batches_are_found_at_once() -> None:
    """Of a prime that no mesh divides, among ten million."""
    for mesh, near in (("{dp_shard: 3}", "9999990 or 9999993"), ("{pp: 4, dp_shard: 3}", "9999990 or 9999993")):
        batch = CONFIG.replace("global_batch: 4", "global_batch: 9999991").replace(
            "micro_batch: 2", "micro_batch: 9999991"
        )
        config = parse_config(yaml.safe_load(f"{batch}mesh: {mesh}"))
        start = time.process_time()
        with pytest.raises(ConfigError, match=f"set train.global_batch to {near}$"):
            fit_micro_batch(config)
        assert time.process_time() - start < 1


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "model.safetensors.index.json", "tokenizer.json"])
def test_a_pipe_in_a_models_folder_is_not_waited_for(
    name: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = replace(shape("laptop"), num_hidden_layers=1, vocab_size=300)
    (folder / "m").mkdir()
    write_tokenizer(folder / "m")
    (folder / "m/config.json").write_text(json.dumps(config_to_huggingface(config, torch.float32)))
    (folder / "m" / name).unlink(missing_ok=True)
    os.mkfifo(folder / "m" / name)
    assert f"m/{name} is a pipe: give a file" in refused(["generate", "m", "--prompt", "a"], capsys)


def test_a_vocabulary_with_an_id_beyond_all_is_refused(folder: Path) -> None:
    tree = write_tokenizer(folder)
    tree["model"]["vocab"]["zzz"] = 2**31
    (folder / "tokenizer.json").write_text(json.dumps(tree))
    with pytest.raises(DataError, match="has a token of id 2,147,483,648, and no vocabulary more than 10,000,000"):
        load_tokenizer(folder)


def write_tokenizer(folder: Path) -> dict[str, Any]:
    """A tokenizer.json of the folder's text; what it holds."""
    corpus = open_corpus(DataSection(corpus="text.txt", seq_len=32))
    train_tokenizer(corpus, 300).save(folder)
    tree: dict[str, Any] = json.loads((folder / "tokenizer.json").read_text())
    return tree


def test_pipes_are_not_waited_for(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Without a writer a pipe is waited for."""
    os.mkfifo("pipe")
    assert "pipe is a pipe: give a file on a disk" in refused(["train", "pipe"], capsys)
    assert "pipe is a pipe: give a file on a disk" in refused(
        ["check", "laptop", "--tp", "2", "--plan", "pipe"], capsys
    )
    (folder / "model").mkdir()
    os.mkfifo("model/config.json")
    assert "model/config.json is a pipe" in refused(["check", "model", "--tp", "2"], capsys)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"hidden_size": 2**39, "head_dim": 2**36}, "the model's sizes are too large"),
        ({"num_hidden_layers": 10**8}, "no model has more than 10,000 layers"),
        ({"rope_theta": -1}, "rope_theta is -1: give a number above 0"),
        ({"rms_norm_eps": 0}, "rms_norm_eps is 0: give a number above 0"),
        ({"num_key_value_heads": 0}, "num_key_value_heads is '0': give a positive whole number"),
    ],
)
def test_sizes_that_no_model_has(
    change: dict[str, float], says: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tree = config_to_huggingface(shape("laptop"), torch.float32)
    for key in ("rope_parameters", "rope_scaling"):
        tree.pop(key, None)
    (folder / "config.json").write_text(json.dumps(tree | change))
    assert says in refused(["check", str(folder), "--tp", "2"], capsys)


@pytest.mark.parametrize(
    ("command", "says"),
    [
        ("plan laptop --tp 2 -o .", ". is a folder: give a file"),
        ("plan laptop --tp 2 --html no/page.html", "the folder of no/page.html is not there: make no"),
        ("plan laptop --tp 2 -o /dev/full", "/dev/full: No space left on device: free some space"),
        ("bench c.yaml --output no/out.json", "the folder of no/out.json is not there"),
        ("bench --shape laptob", "unknown shape 'laptob'; did you mean 'laptop'?"),
        ("calibrate --device cpu -o no/table.json", "the folder of no/table.json is not there"),
        ("forecast c.yaml --gpus 999999999999", "--gpus 999999999999: give at most 100,000"),
        ("check laptop --tp 99999999999999999999", "--tp: Input should be less than 9223372036854775808"),
        ("check laptop --tp 2 --inputs os:path", "inputs os:path is a module: name a callable"),
        ("check laptop --tp 2 --inputs os:system", "inputs os:system cannot be called without arguments"),
        ("check laptop --tp 2 --inputs os:getcwd", "--inputs os:getcwd returns a str"),
        ("export run -o out --max-shard-gb 1e300", "--max-shard-gb: Input should be less than or equal to"),
        ("export run -o out --max-shard-gb 0", "--max-shard-gb: Input should be greater than 0"),
    ],
)
def test_a_verb_says_what_is_wrong_before_its_work(
    command: str, says: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert says in refused(command.split(), capsys)


def test_text_that_is_not_utf8_is_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "--prompt: its text is not UTF-8" in refused(["generate", "run", "--prompt", "\udcff"], capsys)
    assert "--sample.prompt: its text is not UTF-8" in refused(["train", "c.yaml", "--sample.prompt", "\udcff"], capsys)


@pytest.mark.parametrize(
    ("variables", "says"),
    [
        ({"RANK": "a", "WORLD_SIZE": "2"}, "RANK='a' of the environment is no number"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK=2 and WORLD_SIZE=2 of the environment do not fit"),
        ({"RANK": "0", "WORLD_SIZE": "2"}, "MASTER_ADDR is not: start by torchrun, or unset them"),
    ],
)
def test_variables_that_torchrun_did_not_set(
    variables: dict[str, str], says: str, folder: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    for name in ("TORCHELASTIC_ERROR_FILE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert says in refused(["generate", "run", "--prompt", "a"], capsys)

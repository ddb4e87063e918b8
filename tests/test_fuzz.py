"""Random edits of the files that people bring: each is accepted, or refused in an error that a user can read.

`pytest tests/test_fuzz.py --exhaustive` makes 350 edits of each of six kinds; without it, 15.
"""

from __future__ import annotations

import copy
import json
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors import safe_open

from colrow.checkpoint.distributed import Checkpoints
from colrow.checkpoint.export import export
from colrow.checkpoint.huggingface import load_weights
from colrow.cli import main
from colrow.cli.config_flags import read_flags
from colrow.config import dump_config, load_config
from colrow.config_sections import DataSection
from colrow.data.corpus import open_corpus
from colrow.data.tokenizer import load_tokenizer, train_tokenizer
from colrow.errors import ColrowError
from colrow.models.huggingface import config_to_huggingface, read_config
from colrow.models.llama import Llama
from colrow.models.shapes import shape
from colrow.plans.plan import Plan
from helpers.variants import params

CONFIGS = Path(__file__).parents[1] / "configs"
MOST_SECONDS = 5.0
"""Of CPU time for one edit; the slowest reads a model's weights."""

LEAVES: list[Any] = [
    None, True, False, 0, 1, -1, 2**31, 2**63, 10**30, 0.5, -0.0, 1e308, "", " ", "a", "null", "é\u2028", "../x", "/",
    "x" * 5000,
    [], {}, [[]], {"": None}, [1, "a", None], float("inf"), float("nan"), "0x10", "1e400", "\x00", "{", "*", "[1-", "?",
]  # fmt: skip


def places(tree: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of every value in a tree of mappings and lists."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in items:
        yield (*path, key)
        yield from places(value, (*path, key))


def edited(tree: Any, chance: random.Random) -> Any:
    """A copy with one to three values replaced, removed, renamed, repeated or nested."""
    tree = copy.deepcopy(tree)
    for _ in range(chance.randint(1, 3)):
        found = list(places(tree))
        if not found:
            return chance.choice(LEAVES)
        *way, last = chance.choice(found)
        at = tree
        for key in way:
            at = at[key]
        match chance.randrange(6):
            case 0 | 1:
                at[last] = copy.deepcopy(chance.choice(LEAVES))
            case 2:
                del at[last]
            case 3 if isinstance(at, dict):
                at[f"{last}{chance.choice(['', 'x', '.0', '*', ' '])}"[chance.randrange(2) :]] = at.pop(last)
            case 4:
                at[last] = [at[last], copy.deepcopy(at[last])]
            case _:
                at[last] = {"x": at[last]}
    return tree


def scrambled(data: bytes, chance: random.Random) -> bytes:
    """One to three runs of bytes changed, cut out, or repeated."""
    for _ in range(chance.randint(1, 3)):
        at, length = chance.randrange(len(data) + 1), chance.randint(1, 12)
        put = chance.choice([b"", bytes(chance.randrange(256) for _ in range(length)), data[at : at + length] * 3])
        data = data[:at] + put + data[at + length :]
    return data


class Files:
    """The kinds of file: for each, a good one, and what reads it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.model = folder / "model"
        self.model.mkdir()
        tree = config_to_huggingface(shape("laptop"), torch.float32)
        tree |= {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "vocab_size": 300, "head_dim": 8}
        tree |= {"num_attention_heads": 2, "num_key_value_heads": 1}
        (self.model / "config.json").write_text(json.dumps(tree))
        with torch.device("meta"):
            llama = Llama(read_config(self.model))
        llama.to_empty(device="cpu")
        with torch.no_grad():
            for param in llama.parameters():
                param.fill_(0.5)
        export(llama, folder / "export", llama.config, None)
        (folder / "export" / "model.safetensors").rename(folder / "export" / "part-1.safetensors")
        self.llama = llama
        text = folder / "text.txt"
        text.write_text("a few words\n\nand some more words\n" * 20)
        train_tokenizer(open_corpus(DataSection(corpus=str(text), seq_len=8)), 262).save(folder / "tokenizer.json")
        self.checkpoints = Checkpoints(folder / "checkpoints")
        self.checkpoints.save(1, llama, None, {"step": 1})

    def config(self) -> tuple[bytes, Callable[[Path], object]]:
        def read(path: Path) -> None:
            config = load_config(path)
            path.write_text(dump_config(config))
            assert load_config(path) == config

        return dump_config(load_config(CONFIGS / "laptop.yaml")).encode(), read

    def plan(self) -> tuple[bytes, Callable[[Path], object]]:
        def read(path: Path) -> None:
            plan = Plan.load(path)
            assert Plan.from_yaml(plan.to_yaml()).modules == plan.modules
            plan.check_shapes(self.llama, 2)

        return Plan.preset("llama-fast").to_yaml().encode(), read

    def model_config(self) -> tuple[bytes, Callable[[Path], object]]:
        def read(path: Path) -> None:
            config = read_config(path)
            if config.vocab_size * config.hidden_size < 1 << 24 and config.num_hidden_layers < 100:
                with torch.device("meta"):
                    Llama(config)

        return (self.model / "config.json").read_bytes(), read

    def tokenizer(self) -> tuple[bytes, Callable[[Path], object]]:
        return (self.folder / "tokenizer.json").read_bytes(), load_tokenizer

    def manifest(self) -> tuple[bytes, Callable[[Path], object]]:
        file = self.checkpoints.folder / "step-1" / "manifest.json"
        good = file.read_bytes()

        def read(path: Path) -> None:
            file.write_bytes(path.read_bytes())
            try:
                self.checkpoints.list(checksums=True)
                assert self.checkpoints.load(1, self.llama) == {"step": 1}
                assert all(param.eq(0.5).all() for param in self.llama.parameters())  # never a wrong success
            finally:
                file.write_bytes(good)

        return good, read

    def index(self) -> tuple[bytes, Callable[[Path], object]]:
        with safe_open(self.folder / "export" / "part-1.safetensors", "pt") as file:
            tree = {"metadata": {}, "weight_map": dict.fromkeys(file.keys(), "part-1.safetensors")}
        index = self.folder / "export" / "model.safetensors.index.json"

        def read(path: Path) -> None:
            index.write_bytes(path.read_bytes())
            load_weights(self.llama, index.parent)

        return json.dumps(tree).encode(), read


def _require_readable(error: Exception, of: str) -> None:
    """Fail unless the error is one for users, of bounded length."""
    if not isinstance(error, ColrowError) or not 0 < len(str(error)) < 8000:
        raise AssertionError(f"{of}: {type(error).__name__}: {error}") from error


KINDS = ["config", "plan", "model_config", "tokenizer", "manifest", "index"]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    return Files(tmp_path_factory.mktemp("files"))


@pytest.mark.parametrize(
    ("kind", "edits"), params([(k, n) for k in KINDS for n in (15, 350)], lambda kind, edits: edits > 15)
)
def test_an_edited_file_is_accepted_or_refused_in_one_error(kind: str, edits: int, files: Files) -> None:
    good, read = getattr(files, kind)()
    path = files.folder / f"edited.{'yaml' if kind in ('config', 'plan') else 'json'}"
    path.write_bytes(good)
    read(path)
    refused = 0
    for seed in range(edits):
        chance = random.Random(f"{kind} {seed}")
        if chance.random() < 0.3:
            data = scrambled(good, chance)
        elif kind in ("config", "plan"):
            data = yaml.safe_dump(edited(yaml.safe_load(good), chance), sort_keys=False).encode()
        else:
            data = json.dumps(edited(json.loads(good), chance)).encode()
        path.write_bytes(data)
        begin = time.process_time()
        try:
            read(path)
        except Exception as error:
            _require_readable(error, f"edit {seed} of a {kind}")
            refused += 1
        assert time.process_time() - begin < MOST_SECONDS, f"edit {seed}"
    assert refused > edits / 10  # most edits do harm


FLAG_WORDS = [
    "--", "-", "--train.lr", "--mesh", "--mesh.tp", "--plan", "=", "--=", "--x.y.z", "-1", "[", "{a: 1}", "null", "*x",
    "&a", "\n",
]  # fmt: skip


@pytest.mark.parametrize("count", params([100, 2000], lambda count: count > 100))
def test_random_flags_end_in_one_error(count: int, tmp_path: Path) -> None:
    for seed in range(count):
        chance = random.Random(seed)
        words = [chance.choice(FLAG_WORDS) for _ in range(chance.randint(1, 4))]
        try:
            load_config(CONFIGS / "laptop.yaml", read_flags(words))
        except Exception as error:
            _require_readable(error, " ".join(words))


def test_the_fuzzer_finds_a_traceback(files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    """The control: a reader that lets a TypeError out is found."""
    careless = (b"train: {lr: 1}\nmesh: {tp: 1}\n", lambda path: len(yaml.safe_load(path.read_bytes())))
    monkeypatch.setattr(Files, "config", lambda self: careless)
    with pytest.raises(AssertionError, match=r"edit .* of a config: "):
        test_an_edited_file_is_accepted_or_refused_in_one_error("config", 200, files)


def test_a_wrong_verb_or_file_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for argv in (["trian"], ["train", str(tmp_path)], ["train", str(tmp_path / "none.yaml")]):
        assert main(argv) == 2
        assert len(capsys.readouterr().err.splitlines()) == 1

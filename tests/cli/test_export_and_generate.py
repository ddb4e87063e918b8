"""`colrow export` and `colrow generate`, on a run's folder that holds what training leaves."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor, nn

from colrow.checkpoint.distributed import Checkpoints
from colrow.cli import main
from colrow.config_sections import DataSection
from colrow.data.corpus import open_corpus
from colrow.data.tokenizer import Tokenizer, train_tokenizer
from colrow.models.llama import Llama, LlamaConfig
from colrow.parallel.initialize import fill_seeded
from colrow.run.trust import MARK, mark_as_ours
from helpers.forked import Commands

CONFIG = LlamaConfig(
    vocab_size=272,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=64,
)
PROMPT = "def main("


def build() -> Llama:
    """What the run's config calls: a model whose tokens differ in likelihood, for weights of 0.02 nearly do not."""
    model = Llama(CONFIG)
    fill_seeded(model, 0)
    with torch.no_grad():
        for param in model.parameters():
            param.mul_(5.0 if param.ndim > 1 else 1.0)
    return model


class Other(nn.Module):
    """No Llama: its names match no key of a preset, and its layers read the width of their own weights."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.config = SimpleNamespace(vocab_size=272)
        self.wte = nn.Embedding(272, 32)
        self.norms = nn.ModuleList(nn.LayerNorm(32) for _ in range(2))
        self.ups = nn.ModuleList(nn.Linear(32, 64) for _ in range(2))
        self.downs = nn.ModuleList(nn.Linear(64, 32) for _ in range(2))
        self.out = nn.Linear(32, 272, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = 9 * self.wte(ids)
        for norm, up, down in zip(self.norms, self.ups, self.downs, strict=True):
            x = x + down(torch.relu(up(norm(x))))
        return self.out(x)


class Pair(Other):
    """Logits first, as many models return them."""

    def forward(self, ids: Tensor) -> Any:
        return super().forward(ids), torch.zeros(())


class Named(Other):
    def forward(self, ids: Tensor) -> Any:
        return {"hidden": torch.zeros(3), "logits": super().forward(ids)}


class Flattened(Other):
    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids).flatten(0, 1)


class Pooled(Other):
    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids).mean(1)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    text = tmp_path_factory.mktemp("corpus") / "small.txt"
    text.write_text("def main(argv):\n    return 0\n" * 9)
    return train_tokenizer(open_corpus(DataSection(corpus=str(text), seq_len=32)), 272)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "small"
    write_config(folder, "build", tokenizer)
    checkpoints = Checkpoints(folder / "checkpoints", vocabulary=tokenizer.digest)
    model = build()
    checkpoints.save(2, model, None, {})
    with torch.no_grad():
        model.norm.weight.mul_(2.0)  # type: ignore[union-attr]
    checkpoints.save(4, model, None, {})
    return folder


def write_config(folder: Path, model: str, tokenizer: Tokenizer, plan: str = "llama") -> None:
    """What a run leaves in its folder, but for checkpoints."""
    folder.mkdir()
    tree = {
        "run": {"dir": str(folder)},
        "model": {"python": f"cli.test_export_and_generate:{model}"},
        "plan": plan,
        "data": {"corpus": "stdlib", "seq_len": 32},
        "train": {"steps": 2, "global_batch": 2, "micro_batch": 2, "lr": 1e-3},
    }
    text = yaml.safe_dump(tree)
    (folder / "config.yaml").write_text(text)
    mark_as_ours(folder, text)
    tokenizer.save(folder)


def norm_of(folder: Path) -> float:
    return float(load_file(folder / "model.safetensors")["model.norm.weight"].mean())


def test_the_newest_checkpoint_is_exported(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    out = tmp_path / "out"
    assert main(["export", str(run), "-o", str(out)]) == 0
    assert f"exported {run}, step 4 -> {out}" in capsys.readouterr().out
    assert norm_of(out) == 2.0
    tokenizer = AutoTokenizer.from_pretrained(out)
    theirs = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    ids = tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    ours = build()
    with torch.no_grad():
        ours.norm.weight.mul_(2.0)  # type: ignore[union-attr]
        torch.testing.assert_close(theirs(input_ids=ids).logits, ours(ids), rtol=1e-5, atol=1e-5)
    assert theirs.config.eos_token_id == tokenizer.eos_token_id == 0


def test_a_step_a_dtype_and_a_size_may_be_asked_for(run: Path, tmp_path: Path) -> None:
    args = ["export", str(run), "--output", str(tmp_path / "out"), "--step", "2", "--dtype", "bfloat16"]
    assert main(args) == 0
    assert norm_of(tmp_path / "out") == 1.0
    assert load_file(tmp_path / "out" / "model.safetensors")["lm_head.weight"].dtype == torch.bfloat16
    assert main([*args, "--max-shard-gb", "0.00002"]) == 0
    assert len(list(tmp_path.glob("out/*.safetensors"))) > 2


def test_a_run_and_its_export_say_the_same(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", str(run), "-o", str(tmp_path / "out")]) == 0
    capsys.readouterr()
    texts = []
    for source, seed in ((run, "1"), (run, "1"), (tmp_path / "out", "1"), (run, "2")):
        assert main(["generate", str(source), "--prompt", PROMPT, "--tokens", "20", "--seed", seed]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0].startswith(PROMPT)
    assert texts[0] == texts[1] == texts[2] != texts[3]


def test_an_empty_prompt_begins_a_text(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", str(run), "--prompt", "", "--tokens", "5", "--temperature", "0"]) == 0
    assert "<|endoftext|>" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["export", "{none}", "-o", "{out}"], "is neither a run's folder"),
        (["export", "{run}", "-o", "{out}", "--step", "3"], "no checkpoint of step 3"),
        (["export", "{run}", "-o", "{run}"], "holds something else (.made-by, checkpoints, config.yaml"),
        (["generate", "{none}", "--prompt", "a"], "is neither a run's folder"),
        (["generate", "{run}", "--prompt", "a", "--top-k", "0"], "top_k=0"),
    ],
)
def test_bad_input_is_named(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], args: list[str], says: str
) -> None:
    places = {"run": run, "out": tmp_path / "out", "none": tmp_path}
    assert main([arg.format(**places) for arg in args]) == 2
    assert says in capsys.readouterr().err
    assert (run / "config.yaml").exists()


def test_a_run_without_a_checkpoint_or_tokenizer_is_named(
    run: Path, tmp_path: Path, tokenizer: Tokenizer, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("config.yaml", MARK):
        shutil.copy(run / name, tmp_path)
    assert main(["generate", str(tmp_path), "--prompt", "a"]) == 2
    assert "holds no tokenizer.json" in capsys.readouterr().err
    tokenizer.save(tmp_path)
    assert main(["generate", str(tmp_path), "--prompt", "a"]) == 2
    assert "has no complete checkpoint" in capsys.readouterr().err


@pytest.mark.distributed
def test_two_ranks_share_the_work(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], commands: Commands
) -> None:
    assert main(["export", str(run), "-o", str(tmp_path / "one")]) == 0
    assert main(["generate", str(tmp_path / "one"), "--prompt", PROMPT, "--tokens", "9"]) == 0
    text = capsys.readouterr().out.splitlines(keepends=True)[2:]
    printed = torchrun(commands, "export", str(run), "-o", str(tmp_path / "two"))
    assert printed.count("exported") == 1
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[k], two[k]) for k in one)
    assert torchrun(commands, "generate", str(tmp_path / "two"), "--prompt", PROMPT, "--tokens", "9") == "".join(text)


@pytest.mark.distributed
def test_a_derived_model_is_sampled_by_its_own_plan(
    tmp_path: Path, tokenizer: Tokenizer, capsys: pytest.CaptureFixture[str], commands: Commands
) -> None:
    folder = tmp_path / "other"
    write_config(folder, "Other", tokenizer, "derive")
    Checkpoints(folder / "checkpoints", vocabulary=tokenizer.digest).save(1, Other(), None, {})
    arguments = ("generate", str(folder), "--prompt", PROMPT, "--tokens", "9")
    assert main([*arguments]) == 0
    assert torchrun(commands, *arguments) == capsys.readouterr().out


def test_whatever_a_model_returns_beside_its_logits_it_is_sampled(
    tmp_path: Path, tokenizer: Tokenizer, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = {}
    for build in (Other, Pair, Named, Flattened, Pooled):
        folder = tmp_path / build.__name__
        write_config(folder, build.__name__, tokenizer, "derive")
        Checkpoints(folder / "checkpoints", vocabulary=tokenizer.digest).save(1, build(), None, {})
        status = main(["generate", str(folder), "--prompt", PROMPT, "--tokens", "9"])
        texts[build] = (status, *capsys.readouterr())
    assert texts[Other][0] == 0
    assert texts[Pair] == texts[Named] == texts[Flattened] == texts[Other]
    assert texts[Pooled][0] == 2
    assert "which are no logits of each token: only a model of next tokens can be sampled" in texts[Pooled][2]


def torchrun(commands: Commands, *args: str) -> str:
    command = ["torchrun", "--standalone", "--nproc-per-node", "2", "-m", "colrow", *args]
    done = subprocess.run(command, env=commands.environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout

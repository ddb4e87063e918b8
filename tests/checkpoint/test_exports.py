"""What leaves a run: an export is read back before it is called one, and carries over what the project does not own."""

from __future__ import annotations

import fcntl
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from benchmarks.models.tiny import classes, tiny
from colrow.checkpoint import export as export_module
from colrow.checkpoint import read_back, weight_files
from colrow.checkpoint.carried import Carried
from colrow.checkpoint.export import export, require_exportable
from colrow.checkpoint.huggingface import stored_dtype
from colrow.checkpoint.read_back import reader_of
from colrow.checkpoint.stored_files import SINGLE
from colrow.cli import main
from colrow.config_sections import DataSection
from colrow.data.corpus import open_corpus
from colrow.data.tokenizer import load_tokenizer, train_tokenizer
from colrow.errors import CheckpointError, ExportError
from colrow.models.build import Source
from helpers.families import FAMILIES, save_transformers
from helpers.llamas import seeded
from helpers.runs import a_run

transformers = pytest.importorskip("transformers")

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CHAT = [{"role": "user", "content": "def f(x):"}, {"role": "assistant", "content": "return x"}]
KINDS = {"llama": "llama", "qwen3-chat": "qwen3", "experts": "qwen3_moe", "gpt2-tied": "gpt2"}


def save_tokenizer(folder: Path, chat: bool) -> None:
    """A tokenizer of transformers with special tokens of its own, and a chat template where asked for."""
    text = folder / "text.txt"
    text.write_text("def main(argv):\n    return 0\n" * 9)
    train_tokenizer(open_corpus(DataSection(corpus=str(text), seq_len=32)), 257).save(folder)
    text.unlink()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"pad_token": "<|pad|>", "additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    if chat:
        tokenizer.chat_template = TEMPLATE
        tokenizer.eos_token = "<|im_end|>"
    tokenizer.save_pretrained(folder)


def save_model(kind: str, folder: Path) -> None:
    """A folder as people publish it: bf16 weights, tokenizer, generation config, model card, licence."""
    model: Any = tiny(*classes(KINDS[kind]), num_hidden_layers=1, vocab_size=300)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        with torch.no_grad():
            for param in model.parameters():
                param.normal_(std=0.3)
    folder.mkdir()
    save_tokenizer(folder, kind == "qwen3-chat")
    ids = {"bos_token_id": None, "eos_token_id": [259, 0], "pad_token_id": 257}
    for key, value in ids.items():
        setattr(model.config, key, value)
    model.generation_config = transformers.GenerationConfig(**ids, do_sample=True, temperature=0.6, top_k=20)
    model.to(torch.bfloat16).save_pretrained(folder)
    (folder / "README.md").write_text(f"# {kind}\n\nA model card.\n")
    (folder / "LICENSE").write_text("licence\n")
    (folder / "notes.bin").write_bytes(b"not ours to copy")


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    folder = tmp_path_factory.mktemp("published")

    def of(kind: str) -> Path:
        if not (folder / kind).exists():
            save_model(kind, folder / kind)
        return folder / kind

    return of


def logits(folder: Path) -> Tensor:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    assert model.dtype == torch.bfloat16
    ids = torch.arange(24).view(2, 12)
    with torch.no_grad():
        return model(input_ids=ids).logits


@pytest.mark.parametrize("kind", KINDS)
def test_an_export_is_what_transformers_would_load_of_the_source(
    kind: str, published: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = published(kind), tmp_path / "out"
    assert main(["export", str(source), "-o", str(out)]) == 0
    exported, loaded = capsys.readouterr().out.splitlines()
    count = len(load_file(source / SINGLE))
    assert exported.endswith("bfloat16)")
    assert loaded.startswith(f"for transformers: loaded by transformers {transformers.__version__} as ")
    assert loaded.endswith(f": {count} tensors, 0 missing, 0 unexpected")
    assert torch.equal(logits(out), logits(source))
    ours, theirs = (transformers.AutoTokenizer.from_pretrained(folder) for folder in (out, source))
    assert ours.special_tokens_map == theirs.special_tokens_map
    if kind == "qwen3-chat":
        for options in ({"tokenize": False}, {"add_generation_prompt": True}):
            assert ours.apply_chat_template(CHAT, **options) == theirs.apply_chat_template(CHAT, **options)
    generation = [transformers.GenerationConfig.from_pretrained(folder).to_dict() for folder in (out, source)]
    assert generation[0] == generation[1]
    configs = [json.loads((folder / "config.json").read_text()) for folder in (out, source)]
    same = ("architectures", "eos_token_id", "pad_token_id", "use_cache", "dtype", "tie_word_embeddings")
    assert all(configs[0].get(key) == configs[1].get(key) for key in same)
    changed = {"config.json", SINGLE, "notes.bin"}
    for file in source.iterdir():
        assert file.name in changed or (out / file.name).read_bytes() == file.read_bytes(), file.name
    assert not (out / "notes.bin").exists()
    assert main(["export", str(source), "-o", str(out)]) == 0  # its own files do not stand in its way


def test_without_the_template_the_chat_would_be_lost(published: Callable[[str], Path], tmp_path: Path) -> None:
    """The negative control: the project's own tokenizer files alone."""
    source = published("qwen3-chat")
    model = seeded(vocab_size=300)
    export(model, tmp_path / "out", model.config, load_tokenizer(source))
    with pytest.raises(ValueError, match="chat_template"):
        transformers.AutoTokenizer.from_pretrained(tmp_path / "out").apply_chat_template(CHAT)


def test_token_ids_are_those_of_the_tokenizer_that_is_exported(
    published: Callable[[str], Path], tmp_path: Path
) -> None:
    source = published("llama")
    text = tmp_path / "text.txt"
    text.write_text("some other text " * 9)
    tokenizer = train_tokenizer(open_corpus(DataSection(corpus=str(text), seq_len=8)), 258)
    carried = Carried.of(source, source, tokenizer)
    assert carried == Carried(source, None)
    model = seeded(vocab_size=258)
    export(model, tmp_path / "out", model.config, tokenizer, carried=carried)
    tree = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert (tree["eos_token_id"], tree["bos_token_id"], tree["temperature"]) == (0, None, 0.6)
    assert "pad_token_id" not in tree
    assert (tmp_path / "out" / "README.md").exists()
    assert not (tmp_path / "out" / "special_tokens_map.json").exists()


def test_links_lead_to_the_folder_or_to_the_cache(tmp_path: Path) -> None:
    secret, blobs, folder = tmp_path / "secret", tmp_path / "m" / "blobs", tmp_path / "m" / "snapshots" / "1"
    for path in (blobs, folder):
        path.mkdir(parents=True)
    secret.write_text("secret")
    (blobs / "ab12").write_text("# card")
    (folder / "README.md").symlink_to(blobs / "ab12")
    (folder / "LICENSE").symlink_to(secret)
    assert list(Carried(model=folder).files()) == ["README.md"]


def test_the_folder_of_the_source_and_edited_files_are_not_replaced(
    published: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = published("llama"), tmp_path / "out"
    shutil.copytree(source, tmp_path / "in")
    (tmp_path / "in" / "notes.bin").unlink()
    assert main(["export", str(tmp_path / "in"), "-o", str(tmp_path / "in")]) == 2
    assert "is the folder that the model or its tokenizer came from" in capsys.readouterr().err
    assert main(["export", str(source), "-o", str(out)]) == 0
    (out / "README.md").write_text("my own words")
    assert main(["export", str(source), "-o", str(out)]) == 2
    assert "holds something else (README.md)" in capsys.readouterr().err


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_the_dtype_is_the_one_of_most_elements(dtype: torch.dtype, tmp_path: Path) -> None:
    weights = {"a": torch.zeros(9, 9, dtype=dtype), "b": torch.zeros(8, dtype=torch.bfloat16)}
    save_file(weights | {"c": torch.zeros(99, 9, dtype=torch.int64)}, tmp_path / SINGLE)
    assert stored_dtype(tmp_path) == dtype
    assert Carried(model=tmp_path).dtype(None) == (torch.float32 if dtype == torch.float64 else dtype)
    assert Carried(model=tmp_path).dtype("bfloat16") == torch.bfloat16
    assert Carried().dtype(None) == torch.float32


@pytest.mark.parametrize("name", FAMILIES)
def test_the_own_reader_wants_what_transformers_wants(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_transformers(name, tmp_path)
    theirs = reader_of(tmp_path, imports=True)
    stored = export_module._stored(tmp_path)
    missing = {name: tensor for name, tensor in stored.items() if "layers.1" not in name}
    want = theirs.compare(missing, torch.float32)
    assert theirs.library is not None
    assert len(want.missing) > 5
    monkeypatch.setattr(read_back, "is_installed", lambda: False)
    ours = reader_of(tmp_path)
    assert ours.library is None
    assert sorted(ours.compare(missing, torch.float32).missing) == sorted(want.missing)
    for reader in (ours, theirs):
        found = reader.compare(stored | {"model.x": stored["model.norm.weight"]}, torch.float32)
        assert (found.missing, found.unexpected, found.different) == ([], ["model.x"], [])


def test_an_export_that_reads_back_as_another_model_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, out = seeded(), tmp_path / "out"
    export(model, out, model.config)
    before = (out / SINGLE).read_bytes()
    write = weight_files.write_tensors

    def write_one_less(path: Path, entries: list[Any], metadata: dict[str, str]) -> Any:
        result = write(path, entries, metadata)
        tensors = load_file(path)
        del tensors["model.norm.weight"]
        save_file(tensors, path)
        return result

    monkeypatch.setattr(weight_files, "write_tensors", write_one_less)
    with pytest.raises(CheckpointError, match=r"tensors are 1 missing \(model\.norm\.weight\): read"):
        export(model, out, model.config)
    assert (out / SINGLE).read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_config_of_other_sizes_is_refused_before_weights_are_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model: Any = tiny(*classes("llama"), num_hidden_layers=1)
    monkeypatch.setattr(export_module, "write_share", lambda *args: pytest.fail("weights are written"))
    for change, says in (
        ({"intermediate_size": 96}, r"3 of another shape or dtype \(.*mlp.*\[128, 64\], not .*\[96, 64\]"),
        ({"num_hidden_layers": 2}, r"9 missing \(model\.layers\.1"),
        ({"model_type": "nothing"}, "transformers cannot build what the export's config.json describes"),
    ):
        with pytest.raises(ExportError, match=says):
            export(model, tmp_path / "out", model.config.to_dict() | change)
    assert list(tmp_path.iterdir()) == []


def test_two_exports_of_one_name_are_kept_apart(tmp_path: Path) -> None:
    """Both would write, and remove, one unfinished folder."""
    model: Any = tiny(*classes("llama"), num_hidden_layers=1)
    arguments = (model, tmp_path / "out", model.config.to_dict())
    with (tmp_path / ".out.lock").open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        (tmp_path / ".out.unfinished").mkdir()
        with pytest.raises(CheckpointError, match=r"another export writes .*out: wait for it, or give another folder"):
            export(*arguments)
        assert (tmp_path / ".out.unfinished").is_dir()
    export(*arguments)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


class LowRank(nn.Module):
    """A frozen product with an adapter beside it, under the names that PEFT gives them."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base_layer = base.requires_grad_(False)
        self.lora_A = nn.ModuleDict({"default": nn.Linear(base.in_features, 2, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(2, base.out_features, bias=False)})


class Adapted(nn.Module):
    """A wrapper as PEFT's: the model is inside, and its config is an attribute here."""

    def __init__(self) -> None:
        super().__init__()
        inner: Any = tiny(*classes("llama"), num_hidden_layers=1)
        self.config, self.peft_config = inner.config, {"default": SimpleNamespace(peft_type="LORA")}
        inner.model.layers[0].self_attn.q_proj = LowRank(inner.model.layers[0].self_attn.q_proj)
        self.base_model = nn.ModuleDict({"model": inner})


def test_a_model_in_a_wrapper_is_refused_and_named_before_the_first_step(tmp_path: Path) -> None:
    from colrow.run.outputs import export_warning, will_export
    from colrow.run.rank import finished_line

    model = Adapted()
    says = r"hold this Adapted.*LlamaForCausalLM.*12 missing \(.*14 unexpected \(base_model.*merge_and_unload"
    with pytest.raises(ExportError, match=says):
        export(model, tmp_path / "out", model.config.to_dict())
    assert list(tmp_path.iterdir()) == []
    config = a_run(tmp_path, "run")
    (line,) = export_warning(config, Source(model, "adapted", None, "built"))
    says = "warning there will be no export: the Hugging Face format cannot hold this Adapted"
    assert " ".join(line.split()).startswith(says)
    assert max(map(len, line.splitlines())) <= 80
    inner = model.base_model["model"]
    inner.model.layers[0].self_attn.q_proj = inner.model.layers[0].self_attn.q_proj.base_layer
    good = Source(inner, "inner", None, "built")  # type: ignore[arg-type]
    assert export_warning(config, good) == []
    no_export = a_run(tmp_path, "run", checkpoint={"export": False})
    adapted = Source(model, "adapted", None, "built")
    for runs, source, exports in ((config, good, True), (config, adapted, False), (no_export, good, False)):
        assert will_export(runs, source) is exports
        assert ("colrow export" in finished_line(runs, 6, will_export(runs, source))) is exports


def test_without_transformers_the_line_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = seeded()
    found = export(model, tmp_path / "out", model.config, imports=True)
    assert found is not None
    assert found.is_for_transformers
    monkeypatch.setattr(read_back, "is_installed", lambda: False)
    found = export(model, tmp_path / "out", model.config, imports=True)
    assert found is not None
    assert not found.is_for_transformers
    assert str(found) == (
        f"read back as LlamaForCausalLM: {len(list(model.parameters()))} tensors, 0 missing, 0 unexpected; "
        "not by transformers, which is not installed"
    )
    other: Any = tiny(*classes("gpt2"), num_hidden_layers=1)
    found = export(other, tmp_path / "other", other.config.to_dict())
    assert str(found) == "not read back: transformers is not installed"


CODE = """
from transformers import LlamaConfig, LlamaForCausalLM

class Config(LlamaConfig):
    model_type = "foreign"

class Model(LlamaForCausalLM):
    config_class = Config
"""


def test_code_that_the_config_names_goes_with_it(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    model: Any = tiny(*classes("llama"), num_hidden_layers=1)
    tree = model.config.to_dict() | {"model_type": "foreign", "architectures": ["Model"]}
    tree["auto_map"] = {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}
    folder.mkdir()
    (folder / "code.py").write_text(CODE)
    with pytest.raises(ExportError, match="cannot build"):
        require_exportable(model, tree)
    require_exportable(model, tree, folder)
    export(model, tmp_path / "out", tree, carried=Carried(model=folder, code=True))
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True)
    assert type(again).__name__ == "Model"
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), model.parameters(), strict=True))

"""Weights in and out of Hugging Face folders, in one process and by all ranks of a mesh."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from colrow.checkpoint import weight_files
from colrow.checkpoint.export import export
from colrow.checkpoint.huggingface import load_weights, require_weights
from colrow.checkpoint.stored_files import INDEX, SINGLE
from colrow.errors import CheckpointError
from colrow.models.huggingface import read_config
from colrow.models.llama import Llama
from colrow.parallel.initialize import materialize
from helpers.families import FAMILIES, read_folder, save_transformers, token_ids
from helpers.llamas import meta, seeded


class Letters:
    """A tokenizer of single letters that saves itself as the data room's does."""

    eos_id = 0
    prefix: list[int] = []  # noqa: RUF012

    def save(self, path: Path) -> None:
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers

        letters = pre_tokenizers.ByteLevel.alphabet()
        vocab = {"<|endoftext|>": 0} | {letter: i + 1 for i, letter in enumerate(sorted(letters))}
        backend = Tokenizer(models.BPE(vocab=vocab, merges=[]))
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        backend.add_special_tokens(["<|endoftext|>"])
        backend.save(str(path / "tokenizer.json"))
        settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>"}
        (path / "tokenizer_config.json").write_text(json.dumps(settings))


def from_folder(folder: Path) -> Llama:
    with torch.device("meta"):
        model = Llama(read_config(folder))
    materialize(model, "cpu")
    load_weights(model, folder)
    return model


@pytest.mark.parametrize("name", FAMILIES)
def test_a_transformers_folder_comes_in_and_goes_out(name: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    theirs = save_transformers(name, tmp_path / "in", max_shard_size="20KB")
    assert (tmp_path / "in" / INDEX).exists()
    model, ids = from_folder(tmp_path / "in"), token_ids()
    with torch.no_grad():
        torch.testing.assert_close(model(ids), theirs(input_ids=ids).logits, rtol=1e-5, atol=1e-5)
    export(model, tmp_path / "out", model.config)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    with torch.no_grad():
        torch.testing.assert_close(again(input_ids=ids).logits, model(ids), rtol=1e-5, atol=1e-5)
    written, read = read_folder(tmp_path / "out"), read_folder(tmp_path / "in")
    assert written.keys() == read.keys()
    assert all(torch.equal(written[k], read[k]) for k in read)
    for ours, back in zip(model.parameters(), from_folder(tmp_path / "out").parameters(), strict=True):
        assert torch.equal(ours, back)


def test_transformers_loads_an_export_with_its_tokenizer(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    model = seeded(vocab_size=257)
    export(model, tmp_path / "out", model.config, Letters(), dtype=torch.bfloat16)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    text = "def f(x):\n    return  x + 1  # ünïcode"
    ids = tokenizer(text)["input_ids"]
    assert len(ids) == len(text.encode())
    assert tokenizer.decode(ids) == text
    assert tokenizer.eos_token == "<|endoftext|>"
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert again.dtype == torch.bfloat16
    assert (again.config.eos_token_id, again.config.bos_token_id) == (0, None)
    assert GenerationConfig.from_pretrained(tmp_path / "out").eos_token_id == 0
    assert again.generate(torch.tensor([ids]), max_new_tokens=2, do_sample=False).shape == (1, len(ids) + 2)


def test_a_model_of_transformers_takes_and_gives_weights_too(tmp_path: Path) -> None:
    from helpers.families import transformers_model

    theirs = save_transformers("llama-tied", tmp_path / "in")
    other = transformers_model("llama-tied")
    with torch.no_grad():
        for param in other.parameters():
            param.zero_()
    load_weights(other, tmp_path / "in")
    export(other, tmp_path / "out", other.config.to_dict())
    assert all(torch.equal(a, b) for a, b in zip(other.parameters(), theirs.parameters(), strict=True))
    assert read_config(tmp_path / "out") == read_config(tmp_path / "in")
    assert read_folder(tmp_path / "out").keys() == read_folder(tmp_path / "in").keys()


def test_weights_are_cast_to_the_parameters_dtype(tmp_path: Path) -> None:
    model = seeded()
    export(model, tmp_path / "out", model.config, dtype=torch.bfloat16)
    back = from_folder(tmp_path / "out")
    for ours, theirs in zip(model.parameters(), back.parameters(), strict=True):
        assert theirs.dtype == torch.float32
        assert torch.equal(theirs, ours.bfloat16().float())


def test_files_hold_at_most_what_was_asked(tmp_path: Path) -> None:
    model = seeded()
    export(model, tmp_path / "out", model.config, max_shard_bytes=9000)
    names = sorted(path.name for path in tmp_path.glob("out/*.safetensors"))
    assert names == [f"model-{i + 1:05}-of-{len(names):05}.safetensors" for i in range(len(names))]
    index = json.loads((tmp_path / "out" / INDEX).read_text())
    assert index["metadata"]["total_size"] == sum(p.numel() * 4 for p in model.parameters())
    for name in names:
        tensors = load_file(tmp_path / "out" / name)
        assert sum(t.numel() * 4 for t in tensors.values()) <= 9000
        assert {k for k, file in index["weight_map"].items() if file == name} == set(tensors)
    with pytest.raises(CheckpointError, match="max_shard_bytes=0"):
        export(model, tmp_path / "out", model.config, max_shard_bytes=0)


def test_a_former_export_is_replaced_and_anything_else_kept(tmp_path: Path) -> None:
    model = seeded()
    export(model, tmp_path / "out", model.config, max_shard_bytes=9000)
    export(model, tmp_path / "out", model.config)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
    ]
    (tmp_path / "out" / "thesis.tex").write_text("x")
    with pytest.raises(CheckpointError, match=r"holds something else \(thesis.tex\)"):
        export(model, tmp_path / "out", model.config)
    with pytest.raises(CheckpointError, match="is a file"):
        export(model, tmp_path / "out" / "thesis.tex", model.config)
    assert (tmp_path / "out" / SINGLE).exists()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_full_disk_leaves_the_previous_export(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = seeded()
    export(model, tmp_path / "out", model.config)
    before = read_folder(tmp_path / "out")

    def full(*args: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(weight_files, "write_tensors", full)
    with torch.no_grad():
        model.norm.weight.zero_()  # type: ignore[union-attr]
    with pytest.raises(CheckpointError, match="No space left on device"):
        export(model, tmp_path / "out", model.config)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert all(torch.equal(v, before[k]) for k, v in read_folder(tmp_path / "out").items())


def without(name: str) -> Callable[[dict[str, Tensor]], None]:
    return lambda tensors: tensors.__delitem__(name) if name in tensors else None


UP = "model.layers.1.mlp.up_proj.weight"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (without(UP), f"missing {UP}: is its config.json the model's"),
        (without("lm_head.weight"), "missing lm_head.weight: set tie_word_embeddings"),
        (lambda t: t.update({"model.layers.9.x": t[UP].clone()}), "unexpected model.layers.9.x"),
        (lambda t: t.update({UP: t[UP].T.contiguous()}), rf"{UP} is \[24, 36\], the model's \[36, 24\]"),
    ],
)
def test_a_folder_of_another_model_changes_nothing(tmp_path: Path, change: Any, says: str) -> None:
    model = seeded()
    export(model, tmp_path, model.config)
    tensors = load_file(tmp_path / SINGLE)
    change(tensors)
    save_file(tensors, tmp_path / SINGLE)
    other = materialize(meta(), "cpu")
    with torch.no_grad():
        for param in other.parameters():
            param.fill_(7.0)
    with pytest.raises(CheckpointError, match=says):
        load_weights(other, tmp_path)
    assert all(param.eq(7.0).all() for param in other.parameters())


_NORM, _UP = "model.layers.1.input_layernorm.weight", "model.layers.0.mlp.up_proj.weight"


def with_value(name: str, value: float, dtype: torch.dtype = torch.float32) -> Callable[[dict[str, Tensor]], None]:
    """Put one value into a stored tensor."""

    def change(tensors: dict[str, Tensor]) -> None:
        tensors[name] = tensors[name].to(dtype)
        tensors[name].view(-1)[-1] = value

    return change


def cast(name: str, dtype: torch.dtype) -> Callable[[dict[str, Tensor]], None]:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors[name] = tensors[name].to(dtype)

    return change


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (cast(_UP, torch.int8), f"types that are not read as they are: {_UP} is I8: .*dequantize"),
        (cast(_NORM, torch.int64), f"{_NORM} is I64"),
        (cast(_NORM, torch.bool), f"{_NORM} is BOOL"),
        (cast(_UP, torch.float8_e4m3fn), f"{_UP} is F8_E4M3"),
        (with_value(_UP, float("nan")), f"1 values in {_UP} that are NaN or infinite in torch.float32"),
        (with_value(_NORM, float("inf")), f"1 values in {_NORM} that are NaN or infinite"),
        (with_value(_UP, 1e300, torch.float64), f"1 values in {_UP} that are NaN or infinite in torch.float32"),
        (with_value(_UP, float("-inf"), torch.bfloat16), f"1 values in {_UP} that are NaN or infinite"),
    ],
)
def test_weights_that_are_no_finite_floats_are_refused_by_name(
    tmp_path: Path, change: Callable[[dict[str, Tensor]], None], says: str
) -> None:
    model = seeded()
    export(model, tmp_path, model.config)
    tensors = load_file(tmp_path / SINGLE)
    change(tensors)
    save_file(tensors, tmp_path / SINGLE)
    with pytest.raises(CheckpointError, match=says):
        load_weights(materialize(meta(), "cpu"), tmp_path)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_floats_of_other_precision_are_read(tmp_path: Path, dtype: torch.dtype) -> None:
    model = seeded()
    export(model, tmp_path, model.config)
    tensors = {name: tensor.to(dtype) for name, tensor in load_file(tmp_path / SINGLE).items()}
    save_file(tensors, tmp_path / SINGLE)
    read = dict(from_folder(tmp_path).named_parameters())
    assert torch.equal(read["layers.0.mlp.up_proj.weight"], tensors[_UP].float())


def test_what_a_model_computes_itself_may_be_stored(tmp_path: Path) -> None:
    model = seeded(tie_word_embeddings=True)
    export(model, tmp_path, model.config)
    tensors = load_file(tmp_path / SINGLE)
    assert "lm_head.weight" not in tensors
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(3)
    save_file(tensors, tmp_path / SINGLE)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), from_folder(tmp_path).parameters(), strict=True))


def test_unusable_folders_are_named(tmp_path: Path) -> None:
    model = seeded()
    with pytest.raises(CheckpointError, match=r"holds neither model\.safetensors nor"):
        load_weights(model, tmp_path)
    for name, says in (
        ("adapter_model.safetensors", "it holds an adapter alone: merge it"),
        ("model.gguf", "its weights are GGUF"),
        ("consolidated.safetensors", "rename a single one to model.safetensors"),
        ("pytorch_model.bin", "pickled, which could run code"),
    ):
        (tmp_path / name).write_bytes(b"x")
        with pytest.raises(CheckpointError, match=says):
            load_weights(model, tmp_path)
        (tmp_path / name).unlink()
    for content, says in (
        (b"nothing of the kind", "is not a safetensors file: .*fetch it again"),
        (b"version https://git-lfs.github.com/spec/v1\n", "a pointer of Git LFS: run `git lfs pull`"),
        (b"PK\x03\x04archive/data.pkl", "it is pickled, which could run code"),
    ):
        (tmp_path / SINGLE).write_bytes(content)
        with pytest.raises(CheckpointError, match=says):
            load_weights(model, tmp_path)
    (tmp_path / SINGLE).unlink()
    (tmp_path / SINGLE).mkdir()
    with pytest.raises(CheckpointError, match="it is a folder: fetch it again"):
        load_weights(model, tmp_path)
    (tmp_path / SINGLE).rmdir()
    (tmp_path / SINGLE).symlink_to(tmp_path / SINGLE)
    with pytest.raises(CheckpointError, match="a link that leads nowhere: fetch the folder again"):
        load_weights(model, tmp_path)
    (tmp_path / SINGLE).unlink()
    outside = tmp_path.parent / "other.safetensors"
    outside.write_bytes(b"x")
    (tmp_path / SINGLE).symlink_to(outside)
    with pytest.raises(CheckpointError, match="is a link out of its folder, to "):
        load_weights(model, tmp_path)
    (tmp_path / SINGLE).unlink()
    (tmp_path / "part").symlink_to(outside)
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"a": "part"}}))
    with pytest.raises(CheckpointError, match="part is a link out of its folder, to "):
        load_weights(model, tmp_path)
    (tmp_path / "part").unlink()
    (tmp_path / INDEX).write_text("{}")
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_weights(model, tmp_path)
    for path in ("../other.safetensors", "/etc/passwd", "..\\other", "C:other", "a/../../b", ""):
        (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"a": path}}))
        with pytest.raises(CheckpointError, match="outside its folder: fetch the folder again"):
            load_weights(model, tmp_path)
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"a": "model-00001-of-00002.safetensors"}}))
    with pytest.raises(CheckpointError, match=r"lacks model-00001-of-00002\.safetensors"):
        load_weights(model, tmp_path)


def in_two_files(folder: Path) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, str]]:
    """Split a folder's single file into two, the second with two tensors. What each holds, and the index's map."""
    first = load_file(folder / SINGLE)
    (folder / SINGLE).unlink()
    second = {name: first.pop(name) for name in (_UP, _NORM)}
    where = dict.fromkeys(first, "model-00001-of-00002.safetensors")
    return first, second, where | dict.fromkeys(second, "model-00002-of-00002.safetensors")


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        ("", ""),
        ("in both", rf"00002-of-00002.safetensors and model-00001-of-00002.safetensors in .* both hold {_UP}"),
        ("elsewhere", f"lacks {_UP}, which the index says it holds"),
        ("not named", f"missing {_UP}"),
        (
            "a third file",
            "holds model-00003-of-00003.safetensors beside the files that .* names: remove what is not meant",
        ),
        ("a single file", "holds model.safetensors beside the files that .* names: remove what is not meant"),
    ],
)
def test_an_index_says_which_file_holds_a_tensor_and_no_other_does(tmp_path: Path, fault: str, says: str) -> None:
    """transformers takes the single file before an index, and the last of two files with one tensor."""
    model = seeded()
    export(model, tmp_path, model.config)
    single = (tmp_path / SINGLE).read_bytes()
    first, second, where = in_two_files(tmp_path)
    if fault == "in both":
        first[_UP] = second[_UP] + 1
    if fault == "elsewhere":
        where[_UP] = "model-00001-of-00002.safetensors"
    if fault == "not named":
        del where[_UP]
    if fault == "a third file":
        save_file({_UP: second[_UP]}, tmp_path / "model-00003-of-00003.safetensors")
    if fault == "a single file":
        (tmp_path / SINGLE).write_bytes(single)
    save_file(first, tmp_path / "model-00001-of-00002.safetensors")
    save_file(second, tmp_path / "model-00002-of-00002.safetensors")
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": where}))
    if fault:
        with pytest.raises(CheckpointError, match=says):
            require_weights(meta(), tmp_path)
    else:
        read = from_folder(tmp_path)
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), read.parameters(), strict=True))


def test_a_head_that_is_tied_and_stored_is_the_embedding(tmp_path: Path) -> None:
    model = seeded(tie_word_embeddings=True)
    export(model, tmp_path, model.config)
    tensors = load_file(tmp_path / SINGLE)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    tensors["lm_head.weight"][-1, -1] += 1
    save_file(tensors, tmp_path / SINGLE)
    with pytest.raises(CheckpointError, match=r"lm_head\.weight with other values than model\.embed_tok"):
        from_folder(tmp_path)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        (UP.replace("weight", "qweight"), "its weights are quantized"),
        (f"{UP}_scale_inv", "its weights are quantized"),
        (f"base_model.model.{UP}", "its names are those of peft"),
    ],
)
def test_names_that_tell_what_a_folder_is(tmp_path: Path, name: str, says: str) -> None:
    model = seeded()
    export(model, tmp_path, model.config)
    tensors = load_file(tmp_path / SINGLE)
    tensors[name] = tensors.pop(UP)
    save_file(tensors, tmp_path / SINGLE)
    with pytest.raises(CheckpointError, match=says):
        require_weights(meta(), tmp_path)

"""Token shards are the same bytes however they were made, split by document, and whole or not there."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import pickle
import random
import signal
import tracemalloc

import numpy as np
import pytest
import tokenizers
from tokenizers import models, pre_tokenizers

from colrow.data.documents import Corpus
from colrow.data.progress import PreparationProgress
from colrow.data.shards import TokenArray, build_shards, dtype_for, partial_folders, read_meta
from colrow.data.tokenizer import Tokenizer
from colrow.errors import DataError


class Texts(Corpus):
    """Documents from a list, or from a function that makes them."""

    def __init__(self, texts):
        self._texts = texts

    def describe(self):
        return "texts"

    def fingerprint(self):
        return "fingerprint"

    def _read(self):
        yield from self._texts() if callable(self._texts) else self._texts


def words_tokenizer(vocab_size: int) -> Tokenizer:
    """Word wN is id N; the last id ends a document."""
    backend = tokenizers.Tokenizer(models.WordLevel({f"w{i}": i for i in range(vocab_size)}, unk_token="w0"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return Tokenizer(backend, vocab_size - 1, {})


def some_texts(n: int, seed: int = 0) -> list[str]:
    rng = random.Random(seed)
    return [" ".join(f"w{rng.randrange(50)}" for _ in range(rng.randint(1, 400))) for _ in range(n)]


def build(folder, corpus, tokenizer=None, **more):
    options = {
        "fingerprint": "fingerprint",
        "validation_fraction": 0.2,
        "workers": 1,
        "progress": PreparationProgress(False),
    }
    return build_shards(corpus, tokenizer or words_tokenizer(100), folder, **options | more)


def split_documents(folder, split):
    """The documents of a split as texts, in their order."""
    meta = read_meta(folder)
    ids = meta.open(folder, split).ids
    ends = np.flatnonzero(ids == meta.eos_id)
    pieces = np.split(ids, ends + 1)[:-1]
    return [" ".join(f"w{i}" for i in piece[:-1]) for piece in pieces]


def test_shards_hold_every_document_once_and_in_order(tmp_path):
    texts = some_texts(200)
    meta = build(tmp_path / "a", Texts(texts))
    train, validation = split_documents(tmp_path / "a", "train"), split_documents(tmp_path / "a", "validation")
    assert sorted(train + validation) == sorted(texts)
    assert train == [text for text in texts if text in set(train)]
    assert not set(train) & set(validation)
    assert 20 <= len(validation) <= 60
    assert meta.documents == {"train": len(train), "validation": len(validation)}
    assert sum(meta.tokens.values()) == sum(len(text.split()) + 1 for text in texts)
    assert sum(meta.text_bytes.values()) == sum(map(len, texts))
    assert read_meta(tmp_path / "a") == meta


def test_the_split_depends_on_a_documents_text_alone(tmp_path):
    texts = some_texts(150)
    build(tmp_path / "a", Texts(texts))
    shuffled = random.Random(1).sample(texts * 2 + some_texts(50, seed=9), 350)
    build(tmp_path / "b", Texts(shuffled))
    for split in ("train", "validation"):
        before, after = split_documents(tmp_path / "a", split), split_documents(tmp_path / "b", split)
        assert sorted(before * 2) == sorted(text for text in after if text in set(texts))


def test_a_greater_fraction_holds_out_the_same_documents_and_more(tmp_path):
    texts = some_texts(300)
    held_out = []
    for fraction in (0.05, 0.3, 0.9):
        build(tmp_path / str(fraction), Texts(texts), validation_fraction=fraction)
        held_out.append(set(split_documents(tmp_path / str(fraction), "validation")))
    assert held_out[0] < held_out[1] < held_out[2]
    assert [len(some) / 300 for some in held_out] == pytest.approx([0.05, 0.3, 0.9], abs=0.08)


def test_shards_are_the_same_bytes_with_one_worker_or_three(tmp_path, monkeypatch):
    monkeypatch.setattr("colrow.data.shards._CHUNK_CHARS", 5_000)  # 40 chunks or so
    texts = some_texts(300)
    for workers in (1, 3):
        build(tmp_path / str(workers), Texts(texts), workers=workers)
    for name in sorted(os.listdir(tmp_path / "1")):
        assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "3" / name).read_bytes(), name
    assert sorted(os.listdir(tmp_path / "1")) == sorted(os.listdir(tmp_path / "3"))
    build(tmp_path / "other", Texts(texts[1:]))
    assert (tmp_path / "1" / "train.bin").read_bytes() != (tmp_path / "other" / "train.bin").read_bytes()


@pytest.mark.parametrize(("vocab_size", "dtype"), [(65_536, "<u2"), (65_537, "<u4")])
def test_ids_take_two_bytes_where_they_fit(tmp_path, vocab_size, dtype):
    assert dtype_for(vocab_size) == dtype
    text = f"w0 w1 w{vocab_size - 2}"
    meta = build(tmp_path / "a", Texts([text]), words_tokenizer(vocab_size), validation_fraction=1e-9)
    assert meta.dtype == dtype
    assert meta.open(tmp_path / "a", "train").ids.tolist() == [0, 1, vocab_size - 2, vocab_size - 1]


def test_a_token_array_maps_again_after_pickling(tmp_path):
    np.arange(100, dtype="<u2").tofile(tmp_path / "a.bin")
    tokens = TokenArray(tmp_path / "a.bin", "<u2", 100)
    assert tokens.read(np.array([3, 0]), 4).tolist() == [[12, 13, 14, 15, 16], [0, 1, 2, 3, 4]]
    sent = pickle.dumps(tokens)
    assert len(sent) < 1000
    assert pickle.loads(sent).ids.tolist() == list(range(100))


def test_memory_does_not_grow_with_the_corpus(tmp_path, monkeypatch):
    monkeypatch.setattr("colrow.data.shards._CHUNK_CHARS", 20_000)
    line = " ".join(f"w{i % 50}" for i in range(100))

    def peak(documents: int, name: str) -> int:
        tracemalloc.start()
        build(tmp_path / name, Texts(lambda: (line for _ in range(documents))))
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return most

    build(tmp_path / "warm", Texts([line]))
    small = peak(400, "small")
    assert peak(8_000, "large") < 1.2 * small
    assert (tmp_path / "large" / "train.bin").stat().st_size + (
        tmp_path / "large" / "validation.bin"
    ).stat().st_size == 2 * 101 * 8_000


def test_an_error_in_the_corpus_leaves_nothing_behind(tmp_path, monkeypatch):
    monkeypatch.setattr("colrow.data.shards._CHUNK_CHARS", 2_000)

    def broken():
        yield from some_texts(50)
        assert len(partial_folders(tmp_path / "a")) == 1
        raise DataError("line 51 is not JSON")

    with pytest.raises(DataError, match="line 51"):
        build(tmp_path / "a", Texts(broken))
    assert os.listdir(tmp_path) == []


def test_a_corpus_that_changes_meanwhile_is_refused(tmp_path):
    with pytest.raises(DataError, match="has changed while it was read: start again"):
        build(tmp_path / "a", Texts(some_texts(3)), fingerprint="of an earlier state")
    assert os.listdir(tmp_path) == []


def test_an_empty_corpus_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"corpus texts is empty \(it holds no text\)"):
        build(tmp_path / "a", Texts([]))
    assert os.listdir(tmp_path) == []


def test_a_full_disk_is_named_and_leaves_nothing_behind(tmp_path, monkeypatch):
    def full(fd):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DataError, match=r"No space left on device: free some space there, or set data\.cache"):
        build(tmp_path / "a", Texts(some_texts(3)))
    assert os.listdir(tmp_path) == []


def test_a_worker_that_dies_is_an_error_not_a_wait(tmp_path, monkeypatch):
    monkeypatch.setattr("colrow.data.shards._CHUNK_CHARS", 1_000)
    others = {child.pid for child in multiprocessing.active_children()}  # ranks that other tests will use

    def deadly():
        for i, text in enumerate(some_texts(400)):
            if i == 200:
                for child in multiprocessing.active_children():
                    if child.pid not in others:
                        os.kill(child.pid, signal.SIGKILL)
            yield text

    with pytest.raises(DataError, match=r"one of 2 tokenizing processes died .*set data\.workers to a smaller number"):
        build(tmp_path / "a", Texts(deadly), workers=2)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("name", "damage", "reported"),
    [
        ("train.bin", lambda data: data[:-2], r"are damaged: train\.bin has [\d,]+ bytes, not"),
        ("validation.bin", None, r"cannot be read: .*validation\.bin"),
        ("meta.json", None, r"cannot be read: .*meta\.json"),
        ("meta.json", lambda data: data[:40], r"are damaged: meta\.json"),
        ("meta.json", lambda data: b"[" * 100_000, r"are damaged: meta\.json"),
        ("meta.json", lambda data: b'{"format": 0}', r"have format 0, not 1"),
        ("meta.json", lambda data: data.replace(b'"tokens"', b'"tokenz"'), r"are damaged: meta\.json"),
    ],
)
def test_damage_is_named(tmp_path, name, damage, reported):
    build(tmp_path / "a", Texts(some_texts(30)))
    file = tmp_path / "a" / name
    data = file.read_bytes()
    file.unlink()
    if damage is not None:
        file.write_bytes(damage(data))
    with pytest.raises(DataError, match=reported):
        read_meta(tmp_path / "a")


@pytest.mark.parametrize(
    "edit",
    [
        {"dtype": "<u4"},
        {"vocab_size": 10**9},
        {"tokens": {"train": 1, "validation": 1}},
        {"documents": {}},
        {"text_bytes": 0},
        {"digests": None},
        {"eos_id": 7},
        {"corpus": "x"},
        {"new": 1},
    ],
)
def test_an_edited_meta_is_found(tmp_path, edit):
    build(tmp_path / "a", Texts(some_texts(30)))
    file = tmp_path / "a" / "meta.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | edit))
    with pytest.raises(DataError, match=r"meta\.json is not what was written"):
        read_meta(tmp_path / "a")


def test_ids_of_another_width_than_the_vocabularys_are_found_without_a_digest(tmp_path):
    build(tmp_path / "a", Texts(some_texts(30)))
    file = tmp_path / "a" / "meta.json"
    tree = json.loads(file.read_text())
    del tree["digest"]
    tokens = {split: count // 2 for split, count in tree["tokens"].items()}
    file.write_text(json.dumps(tree | {"dtype": "<u4", "tokens": tokens}))
    with pytest.raises(DataError, match=r"are no <u4"):
        read_meta(tmp_path / "a")


@pytest.mark.parametrize("value", [None, "x", [], {}, {"train": None, "validation": 1}, True, {"a": 1}, 2.5])
def test_a_meta_without_a_digest_is_refused_for_any_key_of_another_type(tmp_path, value):
    meta = build(tmp_path / "a", Texts(some_texts(30)))
    file = tmp_path / "a" / "meta.json"
    tree = json.loads(file.read_text())
    del tree["digest"]
    for key in tree:
        if type(value) is type(tree[key]) and not isinstance(value, dict):
            continue
        file.write_text(json.dumps(tree | {key: value}))
        with pytest.raises(DataError, match=r"token shards .*") as error:
            read_meta(tmp_path / "a")
        assert "\n" not in str(error.value)
        file.write_text(json.dumps({k: v for k, v in tree.items() if k != key}))
        if key == "special":  # older versions have not counted them
            assert read_meta(tmp_path / "a") == meta
        else:
            with pytest.raises(DataError):
                read_meta(tmp_path / "a")


def test_meta_of_an_older_version_is_read(tmp_path):
    meta = build(tmp_path / "a", Texts(some_texts(30)))
    file = tmp_path / "a" / "meta.json"
    tree = json.loads(file.read_text())
    del tree["digest"]
    file.write_text(json.dumps(tree | {"first_held_out": [[0.01, 120], [0.03, 96]]}))
    assert read_meta(tmp_path / "a") == meta

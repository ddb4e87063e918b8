"""Preparing happens once, whoever asks and however often, survives being killed, and says what is wrong."""

from __future__ import annotations

import errno
import io
import json
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from colrow.data import digests
from colrow.data.prepare import prepare
from colrow.data.progress import PreparationProgress
from colrow.data.shards import read_meta, verify_shards
from colrow.data.tokenizer import load_tokenizer
from colrow.errors import DataError

VOCAB = 300


def test_the_second_call_finds_what_the_first_made(section, texts):
    first = prepare(section(f"{texts}/*.txt"), VOCAB, False)
    second = prepare(section(f"{texts}/*.txt"), VOCAB, False)
    assert (first.built, second.built) == (True, False)
    assert first.folder == second.folder
    assert first.counts == second.counts == read_meta(first.folder)
    assert first.fingerprint == second.fingerprint
    assert first.tokenizer.digest == second.tokenizer.digest
    assert first.train.ids.tolist() == second.train.ids.tolist()
    assert sum(first.counts.documents.values()) == 40
    assert first.counts.documents["validation"] > 0
    assert str(first.folder) in first.describe()
    assert first.folder.parent == section("x").cache


def test_shards_decode_to_the_documents(section, texts):
    data = prepare(section(f"{texts}/*.txt"), VOCAB, False)
    written = {path.read_text() for path in texts.iterdir()}
    decoded = set()
    for tokens in (data.train, data.validation):
        ends = np.flatnonzero(tokens.ids == data.tokenizer.eos_id)
        decoded |= {data.tokenizer.decode(piece[:-1]) for piece in np.split(tokens.ids[:], ends + 1)[:-1]}
    assert decoded == written


def test_content_decides_whether_shards_are_made_again(section, texts, tmp_path):
    assert prepare(section(f"{texts}/*.txt"), VOCAB, False).built
    os.utime(texts / "00.txt")
    assert not prepare(section(f"{texts}/*.txt"), VOCAB, False).built
    shutil.move(texts, tmp_path / "moved")
    assert not prepare(section(f"{tmp_path}/moved/*.txt"), VOCAB, False).built
    assert not prepare(section(f"{tmp_path}/moved/*.txt", seq_len=64, workers=2), VOCAB, False).built
    one = tmp_path / "moved" / "00.txt"
    one.write_text(one.read_text().replace("a", "e", 1))
    assert prepare(section(f"{tmp_path}/moved/*.txt"), VOCAB, False).built
    assert prepare(section(f"{tmp_path}/moved/*.txt", tokenizer={"vocab_size": 280}), VOCAB, False).built


def test_another_validation_fraction_needs_no_other_tokenizer(section, texts, monkeypatch):
    assert prepare(section(f"{texts}/*.txt"), VOCAB, False).built
    monkeypatch.setattr("colrow.data.prepare.train_tokenizer", None)
    assert prepare(section(f"{texts}/*.txt", validation_fraction=0.3), VOCAB, False).built


def test_a_given_tokenizer_is_used(section, texts, tmp_path):
    trained = prepare(section(f"{texts}/*.txt"), VOCAB, False)
    trained.tokenizer.save(tmp_path / "tokenizer.json")
    given = prepare(section(f"{texts}/*.txt", tokenizer={"path": tmp_path / "tokenizer.json"}), VOCAB, False)
    assert given.built
    assert given.tokenizer.digest == trained.tokenizer.digest
    assert given.train.ids.tolist() == trained.train.ids.tolist()
    assert load_tokenizer(given.folder).digest == trained.tokenizer.digest


def test_one_book_alone_can_be_trained_on(section, tmp_path, text_of):
    (tmp_path / "book.txt").write_text(text_of(0, 60_000))
    data = prepare(section(f"{tmp_path}/book.txt", seq_len=256, validation_fraction=0.02), VOCAB, False)
    assert data.validation.windows(256) > 0
    assert data.train.windows(256) > 100


def test_damaged_shards_are_made_again(section, texts):
    first = prepare(section(f"{texts}/*.txt"), VOCAB, False)
    before = (first.folder / "train.bin").read_bytes()
    (first.folder / "train.bin").write_bytes(before[:-2])
    second = prepare(section(f"{texts}/*.txt"), VOCAB, False)
    assert second.built
    assert (first.folder / "train.bin").read_bytes() == before


def flip(path, at=100):
    """Change one bit, and nothing that a listing of the folder shows but the time."""
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("split", ["train", "validation"])
def test_shards_with_one_bit_changed_are_reported_and_made_again(section, texts, split, capsys):
    first = prepare(section(f"{texts}/*.txt"), VOCAB, False)
    before = (first.folder / f"{split}.bin").read_bytes()
    flip(first.folder / f"{split}.bin")
    second = prepare(section(f"{texts}/*.txt"), VOCAB, True)
    assert second.built
    shown = " ".join(capsys.readouterr().err.split())
    assert shown.count(f"{split}.bin is not what was written; they are made again") == 1
    assert (first.folder / f"{split}.bin").read_bytes() == before


def test_another_tokenizer_beside_the_shards_is_replaced(section, texts, tmp_path):
    first = prepare(section(f"{texts}/*.txt"), VOCAB, False)
    other = prepare(section(f"{texts}/*.txt", tokenizer={"vocab_size": 280}), VOCAB, False)
    shutil.copy(other.folder / "tokenizer.json", first.folder)
    again = prepare(section(f"{texts}/*.txt"), VOCAB, False)
    assert again.built
    assert again.tokenizer.digest == first.tokenizer.digest == load_tokenizer(again.folder).digest


@pytest.mark.parametrize("way", ["in place", "another file"])
def test_a_bit_changed_behind_the_clock_is_found(section, texts, way, monkeypatch):
    """Size and time of the file as they were: its status change time and its inode are compared, too."""
    monkeypatch.setattr("colrow.data.digests._SETTLED_SECONDS", -1.0)
    file = prepare(section(f"{texts}/*.txt"), VOCAB, False).folder / "train.bin"
    before, stat = file.read_bytes(), file.stat()
    other = file if way == "in place" else file.with_name("other")
    other.write_bytes(before)
    flip(other)
    os.utime(other, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    other.rename(file)
    assert prepare(section(f"{texts}/*.txt"), VOCAB, False).built
    assert file.read_bytes() == before


@pytest.mark.parametrize("what", ["train.bin", "validation.bin", "meta.json", "tokenizer.json"])
def test_what_is_no_file_in_a_shards_folder_is_replaced(section, texts, what):
    file = prepare(section(f"{texts}/*.txt"), VOCAB, False).folder / what
    for make in (os.mkfifo, os.mkdir, lambda path: os.symlink(path, path), lambda path: path.touch()):
        file.unlink()
        make(file)
        assert prepare(section(f"{texts}/*.txt"), VOCAB, False).built


@pytest.mark.parametrize("content", [b"[1]", b'{"%s": 5}', b"[" * 100_000, b"\xff\xfe"])
def test_a_list_of_verified_shards_that_is_damaged_is_not_used(section, texts, content):
    data = prepare(section(f"{texts}/*.txt"), VOCAB, False)
    name = os.fsencode(os.path.abspath(data.folder / "train.bin"))
    data.folder.with_suffix(".verified").write_bytes(content.replace(b"%s", name))
    assert not prepare(section(f"{texts}/*.txt"), VOCAB, False).built
    flip(data.folder / "train.bin")
    assert prepare(section(f"{texts}/*.txt"), VOCAB, False).built


def test_shards_are_read_once_and_compared_by_size_and_time_after(section, texts, monkeypatch):
    monkeypatch.setattr("colrow.data.digests._SETTLED_SECONDS", -1.0)
    read = []
    plain = digests._read
    monkeypatch.setattr(
        "colrow.data.digests._read", lambda path, stopped: read.append(path.name) or plain(path, stopped)
    )
    folder = prepare(section(f"{texts}/*.txt"), VOCAB, False).folder
    assert sorted(name for name in read if name.endswith(".bin")) == ["train.bin", "validation.bin"]
    read.clear()
    assert not prepare(section(f"{texts}/*.txt"), VOCAB, False).built
    assert read == []
    os.utime(folder / "train.bin")
    assert not prepare(section(f"{texts}/*.txt"), VOCAB, False).built
    assert read == ["train.bin"]
    flip(folder / "validation.bin")
    assert prepare(section(f"{texts}/*.txt"), VOCAB, False).built


def test_an_id_that_the_vocabulary_lacks_is_named(section, texts, tmp_path):
    """Of shards whose digests are right: they were written by other means."""
    data = prepare(section(f"{texts}/*.txt"), VOCAB, False)
    ids = data.train.ids.copy()
    ids[7] = data.counts.vocab_size
    ids.tofile(data.folder / "train.bin")
    (digest,) = digests.digest_files([data.folder / "train.bin"])
    meta = replace(data.counts, digests=data.counts.digests | {"train": digest})
    with pytest.raises(DataError, match=rf"train.bin holds the id {VOCAB} at 7, and the vocabulary has {VOCAB} tokens"):
        verify_shards(data.folder, meta, tmp_path / "verified")
    verify_shards(data.folder, replace(meta, vocab_size=VOCAB + 1), tmp_path / "verified")


def test_a_finished_cache_may_be_read_only_and_damage_in_it_is_named(section, texts, monkeypatch):
    folder = prepare(section(f"{texts}/*.txt"), VOCAB, False).folder
    monkeypatch.setattr("os.access", lambda path, mode: mode != os.W_OK)
    monkeypatch.setattr("colrow.data.prepare.locked", None)
    monkeypatch.setattr("colrow.data.digests.atomic_write", read_only)
    monkeypatch.setattr("colrow.data.digests._SETTLED_SECONDS", -1.0)
    before = sorted(os.listdir(section("x").cache))
    assert not prepare(section(f"{texts}/*.txt"), VOCAB, False).built
    assert sorted(os.listdir(section("x").cache)) == before
    flip(folder / "train.bin")
    with pytest.raises(DataError, match=r"train.bin is not what was written; they cannot be made again in .*read-only"):
        prepare(section(f"{texts}/*.txt"), VOCAB, False)


def read_only(path, text):
    raise OSError(errno.EROFS, os.strerror(errno.EROFS))


# --- several processes; these import no torch

PREPARE = """
import os, sys, time
from pathlib import Path
from types import SimpleNamespace
from colrow.data import prepare as room
from colrow.data import shards
from colrow.data.corpus import FileCorpus

class Slow(FileCorpus):
    def _read(self):
        while os.path.exists(sys.argv[1] + ".wait"):
            time.sleep(0.01)
        for i, text in enumerate(super()._read()):
            time.sleep(PAUSE)
            yield text

if __name__ == "__main__":
    room.open_corpus = lambda section, _: Slow(section.corpus, sorted(Path(section.corpus).iterdir()), "text")
    shards._CHUNK_CHARS = 3000
    section = SimpleNamespace(
        corpus=sys.argv[1], cache=Path(sys.argv[2]), seq_len=32, validation_fraction=0.2, text_key="text",
        special_tokens="text",
        workers=WORKERS, tokenizer=SimpleNamespace(path=None, vocab_size=None))
    data = room.prepare(section, 300, True)
    print("built" if data.built else "found", data.counts.digests)
"""


def start(tmp_path, texts, pause=0.0, workers=1, stderr=subprocess.PIPE):
    script = tmp_path / f"prepare_{pause}_{workers}.py"
    if not script.exists():  # a process that starts may be about to read it: an empty file runs, and ends with 0
        script.write_text(PREPARE.replace("PAUSE", str(pause)).replace("WORKERS", str(workers)))
    return subprocess.Popen(
        [sys.executable, str(script), str(texts), str(tmp_path / "cache")],
        stdout=subprocess.PIPE,
        stderr=stderr,
        text=True,
        env={"PYTHONPATH": os.pathsep.join(sys.path)},
    )


def test_of_several_processes_one_makes_the_data_and_the_others_wait(tmp_path, texts):
    gate, logs = Path(f"{texts}.wait"), [tmp_path / f"{i}.log" for i in range(3)]
    gate.touch()  # the one that makes them reads nothing until both others wait, however late they start
    processes = []
    for log in logs:
        with log.open("w") as file:
            processes.append(start(tmp_path, texts, stderr=file))

    def seen():
        return [(process.poll(), log.read_text()) for process, log in zip(processes, logs, strict=True)]

    try:
        wait_for(lambda: sum("waiting for another process" in text for _, text in seen()) == 2, 120, processes, seen)
    finally:
        gate.unlink()  # after a failure too: they end
    reported = [process.communicate(timeout=180)[0] for process in processes]
    assert [code for code, _ in seen()] == [0, 0, 0], seen()
    assert sorted(out.split()[0] for out in reported) == ["built", "found", "found"]
    assert len({out.partition(" ")[2] for out in reported}) == 1
    assert not list((tmp_path / "cache").glob("*.partial-*"))


@pytest.mark.skipif(not os.path.exists("/proc"), reason="looks for the orphans of a killed process in /proc")
@pytest.mark.parametrize("workers", [1, 2])
def test_a_build_that_is_killed_leaves_nothing_that_is_taken_for_whole(tmp_path, texts, workers):
    process = start(tmp_path, texts, pause=0.03, workers=workers)
    cache = tmp_path / "cache"
    wait_for(lambda: any(file.stat().st_size for file in cache.glob("tokens-*.partial-*/train.bin")))
    children = children_of(process.pid)
    assert len(children) >= (workers if workers > 1 else 0)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=180)
    assert len(list(cache.glob("tokens-*.partial-*"))) == 1
    wait_for(lambda: not any(alive(child) for child in children))  # orphans end by themselves
    out, err = start(tmp_path, texts).communicate(timeout=180)
    assert out.startswith("built"), err
    assert not list(cache.glob("*.partial-*"))
    (folder,) = (path for path in cache.glob("tokens-*") if path.is_dir())
    assert json.loads((folder / "meta.json").read_text())["documents"]["train"] > 0


def wait_for(condition, seconds=30.0, processes=(), seen=lambda: None):
    """Until `condition()`; fails with what `seen()` says when the time is over, or one of `processes` ended before."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"not within {seconds} s: {seen()}"
        assert all(process.poll() is None for process in processes), f"a process has ended: {seen()}"
        time.sleep(0.02)


def children_of(pid):
    return [int(child) for child in open(f"/proc/{pid}/task/{pid}/children").read().split()]


def alive(pid):
    try:
        return open(f"/proc/{pid}/stat").read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_script_without_a_main_guard_is_told_so(section, texts, monkeypatch):
    monkeypatch.setattr(multiprocessing.current_process(), "_inheriting", True, raising=False)
    with pytest.raises(DataError, match='under `if __name__ == "__main__":`'):
        prepare(section(f"{texts}/*.txt"), VOCAB, False)


# --- errors


def test_too_short_a_corpus_names_the_numbers_and_the_fix(section, texts):
    with pytest.raises(DataError) as error:
        prepare(section(f"{texts}/*.txt", seq_len=100_000), VOCAB, False)
    reported = re.search(
        r"has ([\d,]+) tokens to train on in \d+ documents, fewer than one sequence "
        r"\(data\.seq_len=100000 needs 100,001\): use more text, or data\.seq_len of ([\d,]+) or less",
        str(error.value),
    )
    assert reported, error.value
    most = int(reported[2].replace(",", ""))
    assert most == int(reported[1].replace(",", "")) - 1
    with pytest.raises(DataError, match="held out for validation"):  # train is long enough now
        prepare(section(f"{texts}/*.txt", seq_len=most), VOCAB, False)


def test_too_small_a_validation_split_names_the_fraction_that_is_enough(section, texts):
    with pytest.raises(DataError, match=r"0 tokens held out for validation, in 0 of its 40 documents") as error:
        prepare(section(f"{texts}/*.txt", validation_fraction=1e-9), VOCAB, False)
    reported = re.search(r"set data\.validation_fraction to ([\d.]+) or more, or use more text$", str(error.value))
    assert reported, error.value
    data = prepare(section(f"{texts}/*.txt", validation_fraction=float(reported[1])), VOCAB, False)
    assert data.counts.tokens["validation"] > 32


def test_too_great_a_validation_split_is_named(section, texts):
    with pytest.raises(DataError, match=r"0 tokens to train on .* or a data\.validation_fraction of ") as error:
        prepare(section(f"{texts}/*.txt", validation_fraction=0.999999), VOCAB, False)
    reported = re.search(r"validation_fraction of ([\d.]+) or less", str(error.value))
    assert reported
    data = prepare(section(f"{texts}/*.txt", validation_fraction=float(reported[1])), VOCAB, False)
    assert data.counts.tokens["train"] > 32


def test_one_short_document_cannot_be_split(section, tmp_path):
    (tmp_path / "a.txt").write_text("short text " * 100)
    with pytest.raises(DataError, match=r"33\): use more text; a document is held out as a unit"):
        prepare(section(f"{tmp_path}/a.txt", validation_fraction=1e-9), VOCAB, False)


def test_a_cache_that_cannot_be_written_is_named(section, texts, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(
        DataError, match=r"cannot write to the cache folder .*file/cache: Not a directory: set data\.cache"
    ):
        prepare(section(f"{texts}/*.txt", cache=tmp_path / "file" / "cache"), VOCAB, False)


def test_a_file_system_without_locks_is_named(section, texts, monkeypatch):
    def none(fd, how):
        raise OSError(37, "No locks available")

    monkeypatch.setattr("fcntl.flock", none)
    with pytest.raises(DataError, match=r"has no file locks \(No locks available\): set data\.cache to a local disk"):
        prepare(section(f"{texts}/*.txt"), VOCAB, False)


@pytest.mark.parametrize(
    ("tokenizer", "reported"),
    [
        ({"vocab_size": 301}, r"vocab_size=301 is more than the model's vocabulary of 300: leave it out to train 300"),
        ({"vocab_size": 100}, r"vocab_size=100 is too small"),
        ({"path": "{tmp}/none"}, r"there is no tokenizer .*none"),
        ({"path": "{tmp}", "vocab_size": 300}, r"has both path=.* and vocab_size=300: leave out path"),
        (
            {"path": "{tmp}"},
            r"tokenizer .* has 290 tokens, but the model's vocabulary is 280: choose a model with at least 290",
        ),
    ],
)
def test_a_tokenizer_that_does_not_fit_is_refused(section, texts, tmp_path, tokenizer, reported):
    if "path" in tokenizer:
        made = prepare(section(f"{texts}/*.txt", tokenizer={"vocab_size": 290}), VOCAB, False)
        made.tokenizer.save(tmp_path)
        tokenizer = tokenizer | {"path": tokenizer["path"].format(tmp=tmp_path)}
    model_vocab = 280 if "280" in reported else VOCAB
    with pytest.raises(DataError, match=reported):
        prepare(section(f"{texts}/*.txt", tokenizer=tokenizer), model_vocab, False)


def test_what_is_wrong_in_a_file_is_reported(section, tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n{"txt": "two"}\n')
    for workers in (1, 2):
        with pytest.raises(DataError, match=r"a\.jsonl line 2 has no key 'text'"):
            prepare(section(f"{tmp_path}/a.jsonl", workers=workers), VOCAB, False)


# --- what is shown


def test_progress_shows_lines_away_from_a_terminal(capfd, section, texts, monkeypatch):
    prepare(section(f"{texts}/*.txt"), VOCAB, False)
    out, err = capfd.readouterr()
    assert (out, err) == ("", "")
    shutil.rmtree(section("x").cache)
    monkeypatch.setattr("colrow.data.progress._LINE_SECONDS", -1.0)
    data = prepare(section(f"{texts}/*.txt"), VOCAB, True)
    out, err = capfd.readouterr()
    assert out == ""
    assert "data: training a tokenizer of 300 tokens ...\n" in err
    assert re.search(r"data: tokenizing: 100%, 0 MB, 0\.\dM tokens\n", err)
    assert data.describe() in err
    assert "(made in " in err
    prepare(section(f"{texts}/*.txt"), VOCAB, True)
    assert capfd.readouterr().err == f"{data.describe()} (found)\n"


def test_progress_shows_a_bar_on_a_terminal():
    screen = io.StringIO()
    with PreparationProgress(True, Console(file=screen, force_terminal=True, width=100)) as progress:
        progress.stage("tokenizing [all]", 10)
        progress.advance(5, "1.0M tokens")
        progress.say("beside [it]")
    assert "tokenizing [all]" in screen.getvalue()
    assert "50%" in screen.getvalue()
    assert "1.0M tokens" in screen.getvalue()
    assert "beside [it]" in screen.getvalue()

"""Each kind of corpus yields its documents in a fixed order, is known by its content, and says what is wrong."""

from __future__ import annotations

import builtins
import glob
import gzip
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from colrow.data.corpus import FileCorpus, StdlibCorpus, open_corpus
from colrow.errors import DataError

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")


def documents(section):
    return list(open_corpus(section))


def test_a_text_file_is_a_document_in_the_order_of_paths(section, tmp_path):
    for name in ("b.txt", "a.md", "deep/c.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(f"text of {name}", encoding="utf-8")
    found = documents(section(f"{tmp_path}/**/*.*"))
    assert found == ["text of a.md", "text of b.txt", "text of deep/c.py"]


def test_a_byte_order_mark_and_blank_documents_are_left_out(section, tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\r\ntwo")
    (tmp_path / "b.txt").write_text(" \n\n")
    assert documents(section(f"{tmp_path}/*.txt")) == ["one\ntwo"]


def test_one_long_text_is_cut_into_documents_and_nothing_is_lost(section, tmp_path):
    text = "".join(f"paragraph {i}, line one\nline two\n\n" for i in range(3000))
    (tmp_path / "book.txt").write_text(text)
    found = documents(section(f"{tmp_path}/book.txt"))
    assert "".join(found) == text
    assert 20 <= len(found) <= 60
    assert all(piece.endswith("\n\n") and len(piece) <= 4096 for piece in found)


@pytest.mark.parametrize(("text", "ends"), [("word\n" * 5000, "\n"), ("word " * 5000, "")])
def test_a_long_text_without_blank_lines_is_cut_at_lines_or_anywhere(section, tmp_path, text, ends):
    (tmp_path / "flat.txt").write_text(text)
    found = documents(section(f"{tmp_path}/flat.txt"))
    assert "".join(found) == text
    assert len(found) > 5
    assert all(piece.endswith(ends) for piece in found)


def test_jsonl_rows_come_by_their_key_and_nulls_are_left_out(section, tmp_path):
    rows = [{"body": "one", "n": 1}, {"body": None}, {"body": "zwei ü"}]
    (tmp_path / "a.jsonl").write_text("\n\n".join(json.dumps(row) for row in rows))
    with gzip.open(tmp_path / "b.jsonl.gz", "wt", encoding="utf-8") as file:
        file.write(json.dumps({"body": "three"}) + "\n")
    assert documents(section(f"{tmp_path}/*.jsonl*", text_key="body")) == ["one", "zwei ü", "three"]


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())], ids=str)
def test_parquet_rows_come_over_row_groups(section, tmp_path, kind):
    texts = [f"row {i}" for i in range(100)] + [None]
    column = pa.array(texts, pa.string()).cast(kind)
    pq.write_table(pa.table({"n": range(101), "text": column}), tmp_path / "a.parquet", row_group_size=7)
    assert documents(section(f"{tmp_path}/*.parquet")) == texts[:-1]


def test_the_standard_library_comes_without_its_tests_and_with_its_help_texts():
    corpus = StdlibCorpus()
    names = [path.as_posix() for path in corpus._paths]
    assert any(name.endswith("/argparse.py") for name in names)
    assert not [name for name in names if "/test/" in name or "idlelib" in name or "site-packages" in name]
    assert len(corpus._topics) > 50
    found = list(corpus)
    assert len(found) > 500
    assert found == list(corpus)
    assert len("".join(found).encode()) == pytest.approx(corpus.size(), rel=1e-3)
    assert "Python 3." in corpus.describe()
    assert corpus.fingerprint() == StdlibCorpus().fingerprint()


# --- fingerprint


def test_a_fingerprint_is_of_the_content_wherever_it_lies(section, texts, tmp_path):
    before = open_corpus(section(f"{texts}/*.txt")).fingerprint()
    shutil.copytree(texts, tmp_path / "elsewhere")
    assert open_corpus(section(f"{tmp_path}/elsewhere/*.txt")).fingerprint() == before
    one = tmp_path / "elsewhere" / "07.txt"
    one.write_text(one.read_text().replace("a", "e", 1))  # as long as before
    assert open_corpus(section(f"{tmp_path}/elsewhere/*.txt")).fingerprint() != before
    assert open_corpus(section(f"{texts}/0*.txt")).fingerprint() != before


def test_a_fingerprint_tells_the_key_apart_where_there_is_one(section, tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "one", "body": "two"}')
    (tmp_path / "a.txt").write_text("one")
    rows, text = f"{tmp_path}/a.jsonl", f"{tmp_path}/a.txt"
    assert open_corpus(section(rows)).fingerprint() != open_corpus(section(rows, text_key="body")).fingerprint()
    assert open_corpus(section(text)).fingerprint() == open_corpus(section(text, text_key="body")).fingerprint()


def test_cached_digests_are_used_until_a_file_changes(section, texts, tmp_path, monkeypatch):
    monkeypatch.setattr("colrow.data.digests._SETTLED_SECONDS", -1.0)  # the files were written just now
    corpus = open_corpus(section(f"{texts}/*.txt"), tmp_path / "digests.json")
    before = corpus.fingerprint()
    read = []
    real = "colrow.data.digests._read"
    from colrow.data.digests import _read

    monkeypatch.setattr(real, lambda path, stopped: read.append(path.name) or _read(path, stopped))
    assert corpus.fingerprint() == before
    assert read == []
    (texts / "03.txt").write_text((texts / "03.txt").read_text().swapcase())
    assert corpus.fingerprint() != before
    assert read == ["03.txt"]


def test_a_file_that_changed_a_moment_ago_is_read_again(section, texts, tmp_path):
    cache = tmp_path / "digests.json"
    open_corpus(section(f"{texts}/*.txt"), cache).fingerprint()
    assert json.loads(cache.read_text()) == {}


def test_a_damaged_cache_is_not_trusted(section, texts, tmp_path):
    cache = tmp_path / "digests.json"
    cache.write_text('{"half')
    files = section(f"{texts}/*.txt")
    assert open_corpus(files, cache).fingerprint() == open_corpus(files).fingerprint()


# --- sample


def test_a_sample_of_a_large_corpus_comes_from_all_over_it(texts, monkeypatch):
    monkeypatch.setattr("colrow.data.corpus._MIN_SAMPLE_CHARS", 1)
    corpus = FileCorpus("*", sorted(texts.iterdir()), "text")
    some = list(corpus.sample(15_000))
    assert some == list(corpus.sample(15_000))
    assert 15_000 <= sum(map(len, some)) < 20_000
    everything = list(corpus)
    places = sorted(everything.index(text) for text in some)
    assert places[0] < 10
    assert places[-1] >= 30
    assert list(corpus.sample(10**9)) == everything


# --- errors


@pytest.mark.parametrize(
    ("name", "content", "reported"),
    [
        ("a.txt", b"caf\xe9 au lait", r"a\.txt is not UTF-8 text \(at byte 3\): convert it"),
        ("a.txt", b"x" * 70_000 + b"\xff", r"at byte 70000"),
        ("a.txt", b" \n", r"is empty \(all 1 of its texts are blank\): name files with text in data\.corpus"),
        ("a.txt", "text".encode("utf-16"), r"not UTF-8 text \(at byte 0\): convert it \(iconv -f utf-16 -t utf-8\)"),
        ("a.txt", "text".encode("utf-32"), r"\(at byte 0\): convert it \(iconv -f utf-32 -t utf-8\)"),
        ("a.txt", b"\xfd7zXZ\x00", r"it is no text: leave it out of data\.corpus"),
        ("a.txt", b"", r"\(1 file, 0 bytes\) is empty"),
        ("a.jsonl", b"", r"\(1 file, 0 bytes\) is empty"),
        ("a.txt.zst", b"\x28\xb5\x2f\xfd\xff", r"of compressed files \.gz alone is read: decompress it"),
        ("a.txt.gz", b"no gzip", r"cannot read .*a\.txt\.gz: .*: fetch it again, or leave it out"),
        ("a.jsonl", b"[" * 1_000_000, r"line 1 is not JSON: .*recursion.*: correct it, or leave it out"),
        ("a.txt.gz", gzip.compress(b"text" * 100, mtime=0)[:-12], r"cannot read .*a\.txt\.gz: .*end-of-stream"),
        ("a.jsonl", b'{"text": "one"}\n{"text": ', r"a\.jsonl line 2 is not JSON"),
        ("a.jsonl", b'{\n"text": "one"}\n', r"line 1 is not JSON: .*one complete JSON object on each line"),
        ("a.jsonl", b'["text"]\n', r'line 1 holds a list, not an object such as \{"text": \.\.\.\}'),
        ("a.jsonl", b'{"txt": "x", "id": 1}', r"line 1 has no key 'text', its keys are id, txt: set data\.text_key"),
        ("a.jsonl", b'{"text": 3}', r"line 1, key 'text', holds a number, not a string"),
        ("a.jsonl", b'{"text": "\\ud800"}', r"line 1, key 'text', holds half of a surrogate pair \(character 0\)"),
        ("a.jsonl", b"\xff\xfe{}", r"line 1 is not JSON"),
        ("a.jsonl", b'{"text": "caf\xe9"}', r"line 1 is not UTF-8 text: convert it \(iconv -f latin1 -t utf-8\)"),
        ("a.parquet", b"PAR1 and no more", r"a\.parquet is not a complete Parquet file"),
        ("a.json", b"[]", r"a \.json file is no stream of documents.*\.jsonl"),
    ],
)
def test_an_unusable_file_is_named_with_the_place_and_the_fix(section, tmp_path, name, content, reported):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=reported):
        documents(section(f"{tmp_path}/a.*"))


@pytest.mark.parametrize(
    ("columns", "reported"),
    [
        ({"content": ["x"], "n": [1]}, r"a\.parquet has no key 'text', its keys are content, n: set data\.text_key"),
        ({"text": [1, 2]}, r"column 'text' is int64, not string"),
        ({"text": [["x"]]}, r"column 'text' is list"),
    ],
)
def test_a_parquet_file_without_texts_is_named(section, tmp_path, columns, reported):
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=reported):
        documents(section(f"{tmp_path}/a.parquet"))


@pytest.mark.parametrize(
    ("corpus", "reported"),
    [
        ("{tmp}/*.text", r"matches no file .*; .*/ holds 00\.txt, 01\.txt, .*\.\.\.\): give a glob"),
        ("{tmp}/none/**/*.txt", r"matches no file .*holds 00\.txt"),
        ("stdlbi", r"corpus 'stdlbi' matches no file .*`stdlib`, or `hf:NAME`"),
        ("{tmp}", r"is a folder: name its files by a glob, such as .*/\*\*/\*\.txt"),
        ("hf:", r"names no dataset: write hf:NAME"),
        ("hf:./none", r"there is no folder \./none"),
        ("hf:a:b:c:d", r"names no dataset"),
    ],
)
def test_a_corpus_that_is_not_there_says_what_is(section, texts, corpus, reported):
    with pytest.raises(DataError, match=reported):
        open_corpus(section(corpus.format(tmp=texts)))


def test_advice_holds_for_names_that_a_shell_or_a_glob_reads_otherwise(section, tmp_path, monkeypatch):
    folder = tmp_path / "it's [1]"
    folder.mkdir()
    (folder / "a[1].txt").write_text("one")
    advice = r"such as (.*)$"
    with pytest.raises(DataError, match=advice) as error:
        open_corpus(section(str(folder)))
    assert documents(section(re.search(advice, str(error.value))[1])) == ["one"]
    monkeypatch.chdir(folder)
    assert documents(section("a[1].txt")) == ["one"]
    for file in (folder / "b c.json", folder / "d.json.gz"):
        with (gzip.open if file.suffix == ".gz" else open)(file, "wt") as lines:
            lines.write('[{"text": "two"}, {"text": "three"}]')
        with pytest.raises(DataError, match=r"into a \.jsonl file \((.*)\)$") as error:
            open_corpus(section(glob.escape(str(file))))
        command = re.search(r"\((.*)\)$", str(error.value))[1]
        subprocess.run(command.replace("jq -c '.[]'", "cat"), shell=True, check=True)  # jq is not on every machine
        assert file.with_name(file.name.partition(".")[0] + ".jsonl").read_text().startswith('[{"text": "two"}')


@pytest.mark.parametrize("links", [{"self": "."}, {"a/up": "../.."}, {"a/one": ".", "a/two": "."}])
def test_a_link_to_a_folder_above_is_refused(section, texts, links):
    (texts / "a").mkdir()
    (texts / "b").symlink_to("a")  # a link to a folder beside it is followed
    (texts / "a" / "b.txt").write_text("once, and by a link once more")
    assert len(open_corpus(section(f"{texts}/**/*.txt")).paths) == len(list(texts.glob("*.txt"))) + 2
    for name, target in links.items():
        (texts / name).symlink_to(target)
    with pytest.raises(DataError, match=r"a link to a folder above it: remove the link"):
        open_corpus(section(f"{texts}/**/*.txt"))


def test_a_file_that_vanishes_is_named(section, texts):
    corpus = open_corpus(section(f"{texts}/*.txt"))
    (texts / "11.txt").unlink()
    with pytest.raises(DataError, match=r"cannot read .*11\.txt: No such file"):
        list(corpus)
    with pytest.raises(DataError, match=r"cannot read .*11\.txt: No such file"):
        corpus.fingerprint()


@pytest.mark.parametrize(
    ("corpus", "module", "extra"), [("hf:name", "datasets", "datasets"), ("{tmp}/a.parquet", "pyarrow", "parquet")]
)
def test_a_missing_extra_is_named_before_anything_is_read(section, tmp_path, monkeypatch, corpus, module, extra):
    (tmp_path / "a.parquet").write_bytes(b"")
    real = builtins.__import__

    def absent(name, *args, **kwargs):
        if name.partition(".")[0] == module:
            raise ImportError(f"No module named {module!r}", name=module)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", absent)
    with pytest.raises(DataError, match=rf"pip install 'colrow\[{extra}\]'"):
        open_corpus(section(corpus.format(tmp=tmp_path)))


# --- datasets


@pytest.fixture
def dataset(tmp_path) -> Path:
    """A folder as the Hub serves them: two splits of JSON lines."""
    folder = tmp_path / "data:set"  # before the colons of split and config
    folder.mkdir()
    for split in ("train", "test"):
        rows = [json.dumps({"text": f"{split} {i}", "n": i}) for i in range(5)]
        (folder / f"{split}.jsonl").write_text("\n".join(rows))
    return folder


def test_a_dataset_folder_is_streamed_by_split(section, dataset):
    assert documents(section(f"hf:{dataset}")) == [f"train {i}" for i in range(5)]
    assert documents(section(f"hf:{dataset}::test")) == [f"test {i}" for i in range(5)]
    with pytest.raises(DataError, match=r"has no split 'dev', but test, train: write corpus: hf:.*data:set::test"):
        documents(section(f"hf:{dataset}::dev"))
    with pytest.raises(DataError, match=r"has no key 'body'.*n, text: set data\.text_key"):
        documents(section(f"hf:{dataset}", text_key="body"))
    with pytest.raises(DataError, match=r"row 1, key 'n', holds a number, not a string"):
        documents(section(f"hf:{dataset}", text_key="n"))


@pytest.mark.parametrize("with_splits", [True, False])
def test_a_dataset_saved_to_disk_is_read(section, tmp_path, with_splits):
    import datasets

    saved = datasets.Dataset.from_dict({"text": ["one", "two", ""]})
    (datasets.DatasetDict({"train": saved}) if with_splits else saved).save_to_disk(str(tmp_path / "saved"))
    assert documents(section(f"hf:{tmp_path}/saved")) == ["one", "two"]


def test_a_dataset_is_known_by_its_files_and_what_is_read_of_them(section, dataset, tmp_path):
    def fingerprint(corpus, **more):
        return open_corpus(section(corpus, **more)).fingerprint()

    before = fingerprint(f"hf:{dataset}")
    shutil.copytree(dataset, tmp_path / "copy")
    assert fingerprint(f"hf:{tmp_path}/copy") == before
    assert fingerprint(f"hf:{dataset}::test") != before
    assert fingerprint(f"hf:{dataset}", text_key="n") != before
    (tmp_path / "copy" / "train.jsonl").write_text('{"text": "other"}')
    assert fingerprint(f"hf:{tmp_path}/copy") != before


def test_a_dataset_on_the_hub_is_known_by_its_commit_also_without_a_network(section, tmp_path, monkeypatch, caplog):
    cache = tmp_path / "digests.json"
    monkeypatch.setattr("colrow.data.hub._head_commit", lambda name: f"commit-of-{name}")
    before = open_corpus(section("hf:some/name"), cache).fingerprint()
    monkeypatch.setattr("colrow.data.hub._head_commit", unreachable)
    assert open_corpus(section("hf:some/name"), cache).fingerprint() == before
    assert "out of reach" in caplog.text
    with pytest.raises(DataError, match=r"cannot reach dataset 'some/other'.*ConnectionError: no route.*hf:FOLDER"):
        open_corpus(section("hf:some/other"), tmp_path / "none.json").fingerprint()


def unreachable(name):
    raise ConnectionError("no route")


def test_worker_processes_do_without_torch():
    """They import this module; torch would cost each of them seconds and hundreds of megabytes."""
    code = "import sys, colrow.data.encode, colrow.data.prepare; sys.exit('torch' in sys.modules)"
    assert (
        subprocess.run([sys.executable, "-c", code], env={"PYTHONPATH": ":".join(sys.path)}, check=False).returncode
        == 0
    )

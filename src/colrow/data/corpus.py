"""The corpora that `data.corpus` may name: `stdlib`, a glob of files, or `hf:NAME` (in hub.py)."""

from __future__ import annotations

import glob
import hashlib
import os
import platform
import re
import shlex
import sysconfig
import time
import tokenize
from collections import Counter
from collections.abc import Iterator
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING

from colrow.data.digests import digest_files, digest_of
from colrow.data.documents import Corpus, counted, up_to
from colrow.data.files import format_of, import_parquet, read_file, suffix_of
from colrow.data.hub import open_dataset
from colrow.errors import DataError
from colrow.yaml_text import endless

if TYPE_CHECKING:  # config imports torch, which worker processes do without
    from colrow.config_sections import DataSection

_READER = "1"
"""To be raised when the same files are read as other documents: caches of the old ones are then not used."""
_COMMON_SUFFIXES = {".txt", ".md", ".rst", ".py", ".jsonl", ".ndjson", ".parquet"}
_LOOKS_SECONDS = 0.3
"""How long a folder is searched for the suffix that an advice names."""
_MIN_SECTION_CHARS = 1 << 12
_MAX_SECTION_CHARS = 1 << 20
_SECTIONS = 256
_MIN_SAMPLE_CHARS = 1 << 20


class FileCorpus(Corpus):
    """The files that a glob matches, sorted by path.

    A text file is one document, unless it holds more than 1/256 of the corpus (and 4 KiB): then it is split,
    after a blank line where there is one, so that a corpus of one book has documents to hold out, and so that memory
    stays constant. Each line of a JSONL file and each row of a Parquet file is a document.
    """

    def __init__(self, pattern: str, paths: list[Path], text_key: str, digest_cache: Path | None = None) -> None:
        super().__init__(digest_cache)
        self.pattern = pattern
        self.paths = paths
        self.text_key = text_key
        try:
            self._bytes = sum(path.stat().st_size for path in paths)
        except OSError as error:
            raise DataError(f"cannot read {error.filename}: {error.strerror}") from error
        self._section_chars = min(max(self._bytes // _SECTIONS, _MIN_SECTION_CHARS), _MAX_SECTION_CHARS)

    def describe(self) -> str:
        return f"{self.pattern} ({counted(len(self.paths), 'file')}, {_megabytes(self._bytes)})"

    def fingerprint(self) -> str:
        digests = digest_files(self.paths, self.digest_cache)
        formats = [format_of(path) for path in self.paths]
        text_key = "" if set(formats) == {"text"} else self.text_key  # text files have no keys
        return digest_of("files", _READER, text_key, *formats, *digests)

    def size(self) -> int | None:
        # compressed columns do not tell how much text they hold
        return None if any(format_of(path) == "parquet" for path in self.paths) else self._bytes

    def _read(self) -> Iterator[str]:
        for path in self.paths:
            yield from read_file(path, self.text_key, self._section_chars)

    def sample(self, limit: int) -> Iterator[str]:
        """From a corpus of more than `limit` bytes: the beginnings of files from all over it, not its first files."""
        if self._bytes <= limit:
            yield from self
            return
        share = max(limit // len(self.paths), _MIN_SAMPLE_CHARS)
        taken = 0
        # Sorted by a hash of the place: a random order that is the same on every machine and needs no seed.
        order = sorted(range(len(self.paths)), key=lambda i: hashlib.blake2b(b"%d" % i, digest_size=8).digest())
        for i in order:
            for text in up_to(share, read_file(self.paths[i], self.text_key, self._section_chars)):
                taken += len(text)
                yield text
            if taken >= limit:
                return


class StdlibCorpus(Corpus):
    """The sources of the running Python's standard library, without tests and IDLE, and the help texts of pydoc."""

    # pydoc_data holds the help texts as source: they are read as texts
    _LEFT_OUT = frozenset(
        {"test", "tests", "idle_test", "idlelib", "site-packages", "dist-packages", "__pycache__", "pydoc_data"}
    )

    def __init__(self) -> None:
        super().__init__()
        self._root = Path(sysconfig.get_path("stdlib"))
        paths: list[Path] = []
        for folder, folders, names in os.walk(self._root):
            folders[:] = [name for name in folders if name not in self._LEFT_OUT]
            paths += [Path(folder, name) for name in names if name.endswith(".py")]
        self._paths = sorted(paths, key=lambda path: path.relative_to(self._root).as_posix())
        if not self._paths:
            raise DataError(
                f"corpus 'stdlib' finds no sources in {self._root}: this Python came without them; "
                f"name files of your own in data.corpus"
            )
        self._topics = _pydoc_topics()

    def describe(self) -> str:
        return (
            f"stdlib (Python {platform.python_version()}: {counted(len(self._paths), 'source')}, "
            f"{counted(len(self._topics), 'help text')}, {_megabytes(self.size())})"
        )

    def fingerprint(self) -> str:
        return digest_of("stdlib", _READER, *self._read())

    def size(self) -> int:
        return sum(path.stat().st_size for path in self._paths) + sum(len(text.encode()) for text in self._topics)

    def _read(self) -> Iterator[str]:
        for path in self._paths:
            yield _read_source(path)
        yield from self._topics


def open_corpus(section: DataSection, digest_cache: Path | None = None) -> Corpus:
    """The corpus that `section.corpus` names: `stdlib`, `hf:NAME`, or a glob of files.

    Raises:
        DataError: nothing is there, or an extra that it needs is not installed.
    """
    if section.corpus == "stdlib":
        return StdlibCorpus()
    if section.corpus.startswith("hf:"):
        return open_dataset(section.corpus, section.text_key, digest_cache)
    pattern = os.path.expanduser(section.corpus)
    beginning = Path(re.split(r"[*?[]", pattern)[0])
    if what := endless(beginning):
        raise DataError(f"corpus {section.corpus!r}: {beginning} is {what}: write its text into a file")
    _refuse_looped_links(pattern)
    paths = sorted({path for name in glob.glob(pattern, recursive=True) if not (path := Path(name)).is_dir()})
    if not paths and Path(pattern).is_file():  # as a shell does: `a[1].txt` matches a1.txt, else it is a name
        paths = [Path(pattern)]
    if not paths:
        raise _no_file(section.corpus, pattern)
    for path in paths:
        if what := endless(path):
            raise DataError(f"corpus {section.corpus!r} matches {path}, which is {what}: write its text into a file")
        if suffix_of(path) == ".json":
            raise DataError(
                f"corpus {section.corpus!r} matches {path}: a .json file is no stream of documents; "
                f"write one object a line into a .jsonl file ({_to_lines(path)})"
            )
    if any(format_of(path) == "parquet" for path in paths):
        import_parquet()  # raises here, not after an hour of reading other files
    return FileCorpus(section.corpus, paths, section.text_key, digest_cache)


def _refuse_looped_links(pattern: str) -> None:
    """Raise a DataError where `**` would follow a link to a folder above: glob takes each turn for other files, and
    with two such links does not end."""
    before, stars, _ = pattern.partition("**")
    for root in glob.glob(before or ".") if stars else ():
        for folder, folders, _ in os.walk(root, followlinks=True):
            folders[:] = [name for name in folders if not name.startswith(".")]  # which glob leaves out
            for link in (Path(folder, name) for name in folders):
                if link.is_symlink() and link.resolve() in (here := link.parent.resolve(), *here.parents):
                    raise DataError(f"corpus {pattern!r} follows {link}, a link to a folder above it: remove the link")


def _to_lines(path: Path) -> str:
    """The command that writes a JSON list as JSON lines."""
    reader = "zcat" if path.suffix.lower() == ".gz" else "cat"
    target = path.with_name(path.name.partition(".json")[0] + ".jsonl")
    return f"{reader} {shlex.quote(str(path))} | jq -c '.[]' > {shlex.quote(str(target))}"


def _no_file(corpus: str, pattern: str) -> DataError:
    folder = Path(pattern)
    if folder.is_dir():
        end = time.monotonic() + _LOOKS_SECONDS  # of a home folder all take a minute
        some = takewhile(lambda _: time.monotonic() < end, folder.rglob("*"))
        suffixes = Counter(path.suffix for path in some if suffix_of(path) in _COMMON_SUFFIXES)
        suffix = suffixes.most_common(1)[0][0] if suffixes else ".txt"
        return DataError(
            f"corpus {corpus!r} is a folder: name its files by a glob, such as "
            f"{Path(glob.escape(corpus), '**', '*')}{suffix}"
        )
    while glob.has_magic(str(folder)) or not folder.exists():
        folder = folder.parent
    names = sorted(entry.name + "/" * entry.is_dir() for entry in folder.iterdir()) if folder.is_dir() else []
    shown = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
    return DataError(
        f"corpus {corpus!r} matches no file (searched from {Path.cwd()}; {folder}/ holds {shown or 'nothing'}): "
        f"give a glob of .txt, .jsonl or .parquet files, `stdlib`, or `hf:NAME`"
    )


def _pydoc_topics() -> list[str]:
    try:
        from pydoc_data.topics import topics
    except ImportError:  # some distributions package it apart; describe() then says 0 help texts
        return []
    return [topics[name] for name in sorted(topics)]


def _read_source(path: Path) -> str:
    """Source text by its coding line; a byte that does not fit becomes U+FFFD: no user can fix this corpus."""
    try:
        with path.open("rb") as file:
            try:
                encoding, _ = tokenize.detect_encoding(file.readline)
            except SyntaxError:
                encoding = "utf-8"
            file.seek(0)
            return file.read().decode(encoding, errors="replace").replace("\r\n", "\n")
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error


def _megabytes(n: int) -> str:
    return f"{n / 1e6:,.1f} MB" if n >= 100_000 else f"{n:,} bytes"

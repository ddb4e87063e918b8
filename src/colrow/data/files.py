"""Documents out of one file: text, JSON lines, or Parquet, in constant memory.

Each reader yields `str`; a null in place of a text is the empty string. What is wrong in a file is a DataError with
the file, the line or row, and the fix.
"""

from __future__ import annotations

import codecs
import gzip
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, Literal

from colrow.errors import DataError

FileFormat = Literal["text", "jsonl", "parquet"]
_COMPRESSED = (".zst", ".zip", ".bz2", ".xz", ".lz4", ".tar", ".tgz", ".7z", ".br")
_MARKS = {
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
_PARQUET_ROWS = 1024
_SCAN_BYTES = 1 << 16
MOST_LINE_BYTES = 64 << 20
"""The longest JSON line: a line is parsed in memory, at several times its size."""


def suffix_of(path: Path) -> str:
    """The suffix that names a file's format: that of `a.jsonl.gz` is `.jsonl`."""
    return Path(path.stem).suffix.lower() if path.suffix.lower() == ".gz" else path.suffix.lower()


def format_of(path: Path) -> FileFormat:
    """How the file at `path` is read, by its name."""
    match suffix_of(path):
        case ".jsonl" | ".ndjson" | ".jsonlines":
            return "jsonl"
        case ".parquet":
            return "parquet"
        case _:
            return "text"


def read_file(path: Path, text_key: str, section_chars: int) -> Iterator[str]:
    """The documents of the file at `path`, in their order.

    Args:
        text_key: the field of a JSON line or a Parquet row that holds the text.
        section_chars: a text file with more characters than this is split into several documents.

    Raises:
        DataError: the file cannot be read, or is not of the format that its suffix names.
    """
    try:
        match format_of(path):
            case "jsonl":
                yield from _read_jsonl(path, text_key)
            case "parquet":
                yield from _read_parquet(path, text_key)
            case "text":
                yield from _read_text(path, section_chars)
    except (OSError, EOFError) as error:  # EOFError: a .gz that ends early
        reason = getattr(error, "strerror", None)
        fix = "" if reason else ": fetch it again, or leave it out of data.corpus"
        raise DataError(f"cannot read {path}: {reason or error}{fix}") from error


def require_text(value: object, where: str) -> str:
    """`value` as a document. Raises DataError where it is neither a string nor null, or not Unicode text."""
    if value is None:
        return ""
    if not isinstance(value, str):
        raise DataError(
            f"{where} holds {_json_type(value)}, not a string: point data.text_key at the field with the text"
        )
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(
            f"{where} holds half of a surrogate pair (character {error.start}), which is not Unicode text: "
            f"write that character again or leave the document out"
        ) from error
    return value


def missing_key(text_key: str, where: str, present: list[str]) -> DataError:
    """The error for a row without the text's key: it names the keys that are there."""
    keys = ", ".join(sorted(present)) or "none"
    return DataError(
        f"{where} has no key {text_key!r}, its keys are {keys}: set data.text_key to the one with the text"
    )


def _open_binary(path: Path) -> BinaryIO | gzip.GzipFile:
    return gzip.open(path, "rb") if path.suffix.lower() == ".gz" else path.open("rb")


def _read_text(path: Path, section_chars: int) -> Iterator[str]:
    try:
        with io.TextIOWrapper(_open_binary(path), encoding="utf-8-sig") as file:  # -sig: a byte-order mark is no text
            yield from _split_text(file, section_chars)
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text (at byte {_bad_byte(path)}): {_to_utf8(path)}") from error


def _to_utf8(path: Path) -> str:
    if suffix_of(path) in _COMPRESSED:
        return "of compressed files .gz alone is read: decompress it, or leave it out of data.corpus"
    with _open_binary(path) as file:
        beginning = file.read(_SCAN_BYTES)
    # the longest first: the mark of UTF-32 begins with that of UTF-16
    encoding = next((name for mark, name in _MARKS.items() if beginning.startswith(mark)), None)
    if encoding is None and b"\0" in beginning:  # iconv would make text of anything
        return "it is no text: leave it out of data.corpus"
    return f"convert it (iconv -f {encoding or 'latin1'} -t utf-8), or leave it out of data.corpus"


def _split_text(file: io.TextIOWrapper, max_chars: int) -> Iterator[str]:
    """Sections of at most `max_chars`: split after a blank line in the second half, else a line end, else there."""
    rest = ""
    while True:
        text = rest + file.read(max_chars + 1 - len(rest))  # one more than fits: else the file ends here
        if len(text) <= max_chars:
            yield text
            return
        at = 0
        for end in ("\n\n", "\n"):
            found = text.rfind(end, max_chars // 2, max_chars)
            if found >= 0:
                at = found + len(end)
                break
        else:
            at = max_chars
        yield text[:at]
        rest = text[at:]


def _bad_byte(path: Path) -> int:
    """Offset of the first byte that is not UTF-8."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    start = 0
    with _open_binary(path) as file:
        while True:
            block = file.read(_SCAN_BYTES)
            pending = len(decoder.getstate()[0])  # bytes of a character that the previous block began
            try:
                decoder.decode(block, final=not block)
            except UnicodeDecodeError as error:
                return start - pending + error.start
            if not block:
                return start
            start += len(block)


def _read_jsonl(path: Path, text_key: str) -> Iterator[str]:
    with _open_binary(path) as file:
        # Bytes, and a bound on each: a file without line ends would be read into memory as one line.
        for number, line in enumerate(iter(lambda: file.readline(MOST_LINE_BYTES + 1), b""), 1):
            where = f"{path} line {number}"
            if len(line) > MOST_LINE_BYTES:
                raise DataError(
                    f"{where} is longer than {MOST_LINE_BYTES >> 20} MiB: a .jsonl file holds one document in each "
                    "line; split it"
                )
            if not line.strip():
                continue
            try:
                row = json.loads(line.removeprefix(codecs.BOM_UTF8))
            except UnicodeDecodeError as error:
                raise DataError(f"{where} is not UTF-8 text: {_to_utf8(path)}") from error
            except (ValueError, RecursionError) as error:
                hint = ""
                if number == 1 and line.lstrip()[:1] in (b"[", b"{"):
                    hint = "; a .jsonl file holds one complete JSON object on each line"
                raise DataError(f"{where} is not JSON: {error}{hint}: correct it, or leave it out") from error
            if not isinstance(row, dict):
                raise DataError(
                    f"{where} holds {_json_type(row)}, not an object such as {{{json.dumps(text_key)}: ...}}"
                )
            if text_key not in row:
                raise missing_key(text_key, where, list(row))
            yield require_text(row[text_key], f"{where}, key {text_key!r},")


def _read_parquet(path: Path, text_key: str) -> Iterator[str]:
    parquet = import_parquet()
    import pyarrow as pa

    number = 0
    try:
        with parquet.ParquetFile(path, pre_buffer=False) as file:
            schema = file.schema_arrow
            if text_key not in schema.names:
                raise missing_key(text_key, str(path), list(schema.names))
            _require_strings(schema.field(text_key).type, path, text_key)
            for group in range(file.num_row_groups):
                for batch in file.iter_batches(batch_size=_PARQUET_ROWS, row_groups=[group], columns=[text_key]):
                    for value in batch.column(0).to_pylist():
                        number += 1
                        yield require_text(value, f"{path} row {number}, key {text_key!r},")
    except (pa.ArrowException, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())  # of several lines
        raise DataError(
            f"{path} is not a complete Parquet file (read {number} rows): {reason}: fetch it again"
        ) from error


def import_parquet() -> Any:
    """pyarrow.parquet. Raises DataError that says how to install it."""
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise DataError(f"Parquet files need pyarrow ({error}): pip install 'colrow[parquet]'") from error
    return pyarrow.parquet


def _require_strings(arrow_type: Any, path: Path, text_key: str) -> None:
    import pyarrow as pa

    if pa.types.is_dictionary(arrow_type):
        arrow_type = arrow_type.value_type
    names = ("is_string", "is_large_string", "is_string_view", "is_null")  # the third is not in pyarrow before 16
    if not any(hasattr(pa.types, name) and getattr(pa.types, name)(arrow_type) for name in names):
        raise DataError(
            f"{path}: column {text_key!r} is {arrow_type}, not string: point data.text_key at the column with the "
            "text, or write the file with that column as strings"
        )


def _json_type(value: object) -> str:
    names = {
        dict: "an object",
        list: "a list",
        str: "a string",
        bool: "a boolean",
        int: "a number",
        float: "a number",
        bytes: "bytes",
    }
    return "null" if value is None else names.get(type(value), type(value).__name__)

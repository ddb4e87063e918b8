"""A corpus, whatever it is read from: a stream of documents in a fixed order, known by what it holds."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path

from colrow.errors import DataError


class Corpus(ABC):
    """Documents (str) in a deterministic order, streamed in constant memory; it can be read any number of times.

    Args:
        digest_cache: a JSON file that keeps what the fingerprint is costly to compute from: the digests of unchanged
            files, the last known commit of a dataset. None: everything is read each time.
    """

    def __init__(self, digest_cache: Path | None = None) -> None:
        self.digest_cache = digest_cache

    @abstractmethod
    def describe(self) -> str:
        """A few words for people: what it is and how much."""

    @abstractmethod
    def fingerprint(self) -> str:
        """Hash of the content, the same wherever the corpus lies."""

    @abstractmethod
    def _read(self) -> Iterator[str]:
        """Every text, blank ones too."""

    def size(self) -> int | None:
        """Bytes of text, where they are known without reading it, else None."""
        return None

    def __iter__(self) -> Iterator[str]:
        """The documents; blank ones are left out.

        Raises:
            DataError: something cannot be read, or no document holds text.
        """
        texts = documents = 0
        for text in self._read():
            texts += 1
            if text and not text.isspace():
                documents += 1
                yield text
        if not documents:
            held = f"all {texts:,} of its texts are blank" if texts else "it holds no text"
            raise DataError(f"corpus {self.describe()} is empty ({held}): name files with text in data.corpus")

    def sample(self, limit: int) -> Iterator[str]:
        """Documents of about `limit` characters in all, or all of the corpus where it is smaller. Deterministic."""
        return up_to(limit, iter(self))


def counted(n: int, noun: str) -> str:
    """`1 file`, `1,234 files`."""
    return f"{n:,} {noun}{'' if n == 1 else 's'}"


def up_to(limit: int, texts: Iterator[str]) -> Iterator[str]:
    """The first of `texts`, of `limit` characters or more in all."""
    taken = 0
    for text in texts:
        yield text
        taken += len(text)
        if taken >= limit:
            return

"""Corpus to tokenizer and token shards, once: later runs, and the other processes of this one, find them in the cache.

[Note: one builder]
`tokens-HASH/`           complete token shards: it got its name by a rename, after its files were flushed. HASH covers
                         the corpus's content, the validation fraction, and the tokenizer or how it is trained
`tokens-HASH.partial-N`  being written by process N, or left by one that was killed
`tokens-HASH.lock`       held (flock) by the process that builds; the kernel drops it when that process dies
`tokenizer-HASH.json`    a trained tokenizer, of the corpus's content and the vocabulary size
`corpus-HASH.json`       digests of the corpus's files (digests.py)
`tokens-HASH.verified`   size, times and digests of the shards when they were compared with meta.json
Whoever finds complete shards verifies them, unless that has been done, and uses them. Otherwise it takes the lock,
looks again (another process may have built them meanwhile), removes what dead builders left, and builds.
"""

from __future__ import annotations

import math
import multiprocessing
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from colrow.data.corpus import open_corpus
from colrow.data.digests import digest_of
from colrow.data.disk import locked, remove, writing_to
from colrow.data.documents import Corpus, counted
from colrow.data.encode import usable_cores
from colrow.data.progress import PreparationProgress
from colrow.data.shards import (
    FORMAT,
    SPLITS,
    ShardMeta,
    TokenArray,
    build_shards,
    partial_folders,
    read_meta,
    verify_shards,
)
from colrow.data.tokenizer import SAMPLE_CHARS, Tokenizer, load_tokenizer, train_tokenizer
from colrow.errors import DataError

if TYPE_CHECKING:  # config imports torch, which worker processes do without
    from colrow.config_sections import DataSection

_TRAINER = "bpe-1"
"""To be raised when the same corpus gives another tokenizer."""
_LARGE_BYTES = 1 << 28
"""Hashing less than this is too quick to be announced."""
_BYTES_PER_WORKER = 16 << 20
"""Text from which on a worker process saves more time than it takes to start; below, threads of `tokenizers` do."""


@dataclass(frozen=True)
class PreparedData:
    """A tokenizer and the token shards that it made of a corpus."""

    tokenizer: Tokenizer
    train: TokenArray
    validation: TokenArray
    folder: Path
    fingerprint: str
    """Content hash of the corpus."""
    counts: ShardMeta
    """Documents, tokens and bytes of text by split."""
    built: bool
    """Whether this call made the shards, rather than find them."""

    def describe(self) -> str:
        """One line for people."""
        train, validation = (
            f"{self.counts.documents[split]:,} documents, {self.counts.tokens[split]:,} tokens"
            for split in ("train", "validation")
        )
        return (
            f"data: {self.counts.source}, {self.tokenizer.vocab_size:,} token vocabulary; train {train}; "
            f"validation {validation}; {self.folder}"
        )


def prepare(
    section: DataSection, model_vocab: int, progress: bool, accept: Callable[[str], None] = lambda fingerprint: None
) -> PreparedData:
    """The tokenizer and token shards of `section`, from its cache or made now.

    Any number of processes may call it at the same time on one cache: one makes them, the others wait. Nothing here
    needs a process group, so a launcher can call it before it starts the ranks.

    Args:
        model_vocab: the model's vocabulary size; the tokenizer's must not exceed it.
        progress: show a bar (on a terminal) or lines, and at the end what was found.
        accept: gets the corpus's fingerprint before any of it is tokenized; what it raises ends this call.

    Raises:
        DataError: the corpus or the tokenizer cannot be used, a split is shorter than a sequence, or the cache
            folder cannot be written.
    """
    start = time.monotonic()
    if getattr(multiprocessing.current_process(), "_inheriting", False):  # it would wait for the parent's lock forever
        raise DataError('a script that prepares data does so under `if __name__ == "__main__":`, for workers import it')
    given = _configured_tokenizer(section, model_vocab)
    corpus = open_corpus(section, _digest_cache(section))
    with PreparationProgress(progress) as shown:
        fingerprint = _fingerprint(corpus, section, shown)
        accept(fingerprint)
        recipe = [
            str(FORMAT),
            fingerprint,
            repr(section.validation_fraction),
            given.digest if given else f"{_TRAINER} {_vocab_size(section, model_vocab)}",
            *([section.special_tokens] if section.special_tokens != "text" else []),
        ]
        folder = section.cache / f"tokens-{digest_of(*recipe)[:16]}"
        meta, built = _find(folder, shown, given, reports=False), False
        if meta is None:
            with locked(folder.with_suffix(".lock"), _watcher(folder, shown)):
                meta = _find(folder, shown, given)
                if meta is None:
                    tokenizer = given or _train_once(corpus, fingerprint, section, model_vocab, shown)
                    meta, built = _build(corpus, tokenizer, folder, fingerprint, section, shown), True
                    _verify(folder, meta, shown)
        data = PreparedData(
            tokenizer=given or load_tokenizer(folder, section.special_tokens == "encode"),
            train=meta.open(folder, "train"),
            validation=meta.open(folder, "validation"),
            folder=folder,
            fingerprint=fingerprint,
            counts=meta,
            built=built,
        )
        shown.say(f"{data.describe()} ({f'made in {time.monotonic() - start:.1f} s' if built else 'found'})")
        if data.tokenizer.drops_unknown:
            shown.say("data: warning: the tokenizer drops the characters that it does not know")
        if meta.special:
            shown.say(_special_line(meta.special, section))
    _require_a_sequence(meta, section)
    return data


def _special_line(documents: int, section: DataSection) -> str:
    """What became of texts that spell special tokens."""
    done, other = "were encoded as plain text", "encode"
    if section.special_tokens == "encode":
        done, other = "became these tokens", "text"
    return (
        f"data: {counted(documents, 'document')} spell special tokens, which {done} (data.special_tokens: "
        f"{section.special_tokens}; the other choice is {other})"
    )


def _configured_tokenizer(section: DataSection, model_vocab: int) -> Tokenizer | None:
    """The tokenizer that the config names, or None where one is to be trained; both are checked for size."""
    path, vocab_size = section.tokenizer.path, section.tokenizer.vocab_size
    if path is None:
        if vocab_size is not None and vocab_size > model_vocab:
            raise DataError(
                f"data.tokenizer.vocab_size={vocab_size:,} is more than the model's vocabulary of {model_vocab:,}: "
                f"leave it out to train {model_vocab:,} tokens, or choose a model with a larger vocabulary"
            )
        return None
    if vocab_size is not None:
        fix = ", or vocab_size to use the one given" if path.exists() else f" ({path} does not exist)"
        raise DataError(
            f"data.tokenizer has both path={path} and vocab_size={vocab_size}: leave out path to train a tokenizer{fix}"
        )
    tokenizer = load_tokenizer(path, section.special_tokens == "encode")
    tokenizer.require_fits(model_vocab, f"tokenizer {path}")
    return tokenizer


def _vocab_size(section: DataSection, model_vocab: int) -> int:
    return section.tokenizer.vocab_size or model_vocab


def _digest_cache(section: DataSection) -> Path:
    return section.cache / f"corpus-{digest_of(section.corpus, section.text_key, str(Path.cwd()))[:16]}.json"


def _fingerprint(corpus: Corpus, section: DataSection, shown: PreparationProgress) -> str:
    """The corpus's fingerprint. One of several processes reads the files; the others wait and read its cache."""
    digest_cache = _digest_cache(section)
    if section.cache.is_dir() and not os.access(section.cache, os.W_OK):
        return corpus.fingerprint()  # a finished cache may be shared read-only
    if not digest_cache.exists() and (corpus.size() or _LARGE_BYTES) >= _LARGE_BYTES:
        shown.stage("hashing the corpus")
    with locked(digest_cache.with_suffix(".lock")):
        return corpus.fingerprint()


def _find(folder: Path, shown: PreparationProgress, given: Tokenizer | None, reports: bool = True) -> ShardMeta | None:
    """The meta of complete shards; None where there are none, or damaged ones, which are reported and built again.

    Without a `given` tokenizer the folder's own will be used, so it must be the one that made the shards.

    Raises:
        DataError: they are damaged in a cache that cannot be written, so they cannot be built again there.
    """
    if not folder.exists():
        return None
    try:
        meta = read_meta(folder)
        _verify(folder, meta, shown)
        tokenizer = given or load_tokenizer(folder)
        if (tokenizer.digest, tokenizer.vocab_size) != (meta.tokenizer, meta.vocab_size):
            raise DataError(f"token shards {folder} are damaged: tokenizer.json is not the one that made them")
        return meta
    except DataError as error:
        if not os.access(folder.parent, os.W_OK):
            raise DataError(
                f"{error}; they cannot be made again in {folder.parent}, which is read-only: set data.cache to a "
                "folder that can be written"
            ) from error
        if reports:
            shown.say(f"data: {error}; they are made again")
        return None


def _verify(folder: Path, meta: ShardMeta, shown: PreparationProgress) -> None:
    """`verify_shards`. One of several processes reads the files; the others wait and read what it has noted."""
    cache = folder.with_suffix(".verified")
    if not os.access(folder.parent, os.W_OK):
        verify_shards(folder, meta, cache)
        return
    if not cache.exists() and sum(_size(folder / f"{split}.bin") for split in SPLITS) >= _LARGE_BYTES:
        shown.stage("verifying the token shards")
    with locked(folder.with_suffix(".verified.lock")):
        verify_shards(folder, meta, cache)


def _watcher(folder: Path, shown: PreparationProgress) -> Callable[[], None]:
    """Shows how far the process is that builds `folder`, from the files that it writes."""
    waited = False

    def watch() -> None:
        nonlocal waited
        if not waited:
            shown.stage("waiting for another process that prepares this data")
            waited = True
        written = sum(_size(file) for partial in partial_folders(folder) for file in partial.glob("*.bin"))
        shown.advance(0, f"{written / 1e6:,.0f} MB of ids written")

    return watch


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:  # renamed between the listing and now
        return 0


def _train_once(
    corpus: Corpus, fingerprint: str, section: DataSection, model_vocab: int, shown: PreparationProgress
) -> Tokenizer:
    """The tokenizer trained on this corpus, cached apart from the shards: it does not depend on validation_fraction."""
    vocab_size = _vocab_size(section, model_vocab)
    path = section.cache / f"tokenizer-{digest_of(_TRAINER, fingerprint, str(vocab_size))[:16]}.json"
    with locked(path.with_suffix(".lock")):
        if path.exists():
            return load_tokenizer(path)
        shown.stage(f"training a tokenizer of {vocab_size:,} tokens", min(corpus.size() or SAMPLE_CHARS, SAMPLE_CHARS))
        tokenizer = train_tokenizer(corpus, vocab_size, lambda text: shown.advance(len(text)))
        with writing_to(section.cache):
            tokenizer.save(path)
        return tokenizer


def _build(
    corpus: Corpus,
    tokenizer: Tokenizer,
    folder: Path,
    fingerprint: str,
    section: DataSection,
    shown: PreparationProgress,
) -> ShardMeta:
    for stale in [folder, *partial_folders(folder)]:  # we hold the lock, so their builders are dead
        remove(stale)
    size = corpus.size()
    useful_workers = usable_cores() if size is None else max(math.ceil(size / _BYTES_PER_WORKER), 1)
    return build_shards(
        corpus,
        tokenizer,
        folder,
        fingerprint=fingerprint,
        validation_fraction=section.validation_fraction,
        workers=section.workers or min(usable_cores(), useful_workers),
        progress=shown,
    )


def _require_a_sequence(meta: ShardMeta, section: DataSection) -> None:
    """Raise a DataError unless each split holds `seq_len` tokens and the one after them."""
    need, train, validation = section.seq_len + 1, meta.tokens["train"], meta.tokens["validation"]
    required = f"fewer than one sequence (data.seq_len={section.seq_len} needs {need:,})"
    if train < need:
        fixes = ["use more text"]
        fraction = math.floor(1000 * (1 - _likely_share(meta, need))) / 1000
        if 0 < fraction < section.validation_fraction:
            fixes.append(f"a data.validation_fraction of {fraction:g} or less")
        if train > 2:
            fixes.append(f"data.seq_len of {train - 1:,} or less")
        raise DataError(
            f"corpus {meta.source} has {train:,} tokens to train on in {counted(meta.documents['train'], 'document')}, "
            f"{required}: {', or '.join(fixes)}"
        )
    if validation < need:
        raise DataError(
            f"corpus {meta.source} has {validation:,} tokens held out for validation, in "
            f"{meta.documents['validation']:,} of its {counted(sum(meta.documents.values()), 'document')}, {required}: "
            f"{_hold_out_more(meta, need)}"
        )


def _hold_out_more(meta: ShardMeta, need: int) -> str:
    """The fix for too small a validation split: a fraction that very likely holds out enough, where there is one."""
    fraction = math.ceil(1000 * _likely_share(meta, need)) / 1000
    if fraction <= 0.5:
        return f"set data.validation_fraction to {fraction:g} or more, or use more text"
    fix = f", or data.seq_len of {held_out - 1:,} or less" if (held_out := meta.tokens["validation"]) > 1 else ""
    return f"use more text{fix}; a document is held out as a unit or not at all"


def _likely_share(meta: ShardMeta, need: int) -> float:
    """The share of the documents that very likely has `need` tokens; above 1 where the corpus is too small.

    A document goes to a split as a unit, by a hash: aim at three documents and half again the tokens that are needed.
    """
    documents, tokens = sum(meta.documents.values()), sum(meta.tokens.values())
    return max(3 / documents, 1.5 * need / tokens) if tokens else math.inf

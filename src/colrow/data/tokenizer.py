"""Text to tokens and back: a byte-level BPE trained on the corpus, or one that exists."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from colrow.data.digests import digest_of
from colrow.data.disk import atomic_write
from colrow.data.documents import Corpus
from colrow.errors import DataError
from colrow.yaml_text import read_text, refuse_endless

END_OF_TEXT = "<|endoftext|>"
_MIN_VOCAB = 257
"""256 bytes and the end-of-text token."""
_LAST_ID = 10_000_000
"""`tokenizers` looks at each id from 0 on where it writes a tokenizer down."""
_MOST_BYTES = 512 << 20
"""Most bytes of a tokenizer.json, which is parsed in memory; those with 262,144 tokens have 33 MB."""
SAMPLE_CHARS = 1 << 26
"""A vocabulary is trained on this much of the corpus: counts of frequent pairs change little beyond it."""
_RARE = "\u16a0\u13a0\ua4d0"
"""Letters that a vocabulary without bytes hardly has: Runic, Cherokee, Lisu."""
_COMMON_END_TOKENS = (END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>", "<|eot_id|>", "<|im_end|>", "[EOS]", "[SEP]")


@dataclass(frozen=True, eq=False)
class Tokenizer:
    """A `tokenizers.Tokenizer` with the ids that begin and end a document.

    Unless `special`, text never turns into special tokens: a document that spells `<|endoftext|>` is encoded letter by
    letter. Long documents are never truncated and short ones never padded, whatever tokenizer.json says.
    """

    backend: Any
    eos_id: int
    settings: dict[str, Any]
    """The content of tokenizer_config.json; `save` writes it again."""
    special: bool = False
    """Whether a special token that a text spells becomes that token."""

    def __post_init__(self) -> None:
        self.backend.no_truncation()
        self.backend.no_padding()
        self.backend.encode_special_tokens = not self.special

    @cached_property
    def vocab_size(self) -> int:
        """One more than the greatest id."""
        return max(self.backend.get_vocab(with_added_tokens=True).values()) + 1

    @cached_property
    def prefix(self) -> list[int]:
        """Ids that the tokenizer itself puts before a text (Llama's begin-of-text); often none."""
        with _naming_a_text_without_ids():
            plain = list(self.backend.encode("a", add_special_tokens=False).ids)
            full = list(self.backend.encode("a", add_special_tokens=True).ids)
        for at in range(len(full) - len(plain) + 1):
            if full[at : at + len(plain)] == plain:
                return full[:at]
        return []

    @cached_property
    def _special_token(self) -> re.Pattern[str] | None:
        added = self.backend.get_added_tokens_decoder().values()
        names = sorted((token.content for token in added if token.special and token.content), key=len, reverse=True)
        return re.compile("|".join(map(re.escape, names))) if names else None

    def spells_special(self, text: str) -> bool:
        """Whether a special token stands in the text."""
        return self._special_token is not None and self._special_token.search(text) is not None

    @cached_property
    def digest(self) -> str:
        """Hash of all that decides which ids a document becomes."""
        return digest_of(self.backend.to_str(), str(self.eos_id))

    def encode(self, text: str) -> list[int]:
        """The ids of a text that goes on, such as a prompt: `prefix` and the text's own."""
        with _naming_a_text_without_ids():
            return self._begun(list(self.backend.encode(text, add_special_tokens=False).ids))

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of complete documents: `prefix`, the text's own, and `eos_id`; a text that spells these as special
        tokens gets them once."""
        with _naming_a_text_without_ids():
            encoded = self.backend.encode_batch_fast(list(texts), add_special_tokens=False)
            return [self._ended(self._begun(list(encoding.ids))) for encoding in encoded]

    @cached_property
    def drops_unknown(self) -> bool:
        """Whether characters that it does not know vanish: it has neither bytes nor an unknown token for them."""
        with contextlib.suppress(DataError), _naming_a_text_without_ids():  # one that says so when it meets a text
            return not self.backend.encode(_RARE, add_special_tokens=False).ids
        return False

    def _begun(self, ids: list[int]) -> list[int]:
        n = len(self.prefix)
        return ids if self.special and n and ids[:n] == self.prefix else [*self.prefix, *ids]

    def _ended(self, ids: list[int]) -> list[int]:
        return ids if self.special and ids and ids[-1] == self.eos_id else [*ids, self.eos_id]

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        return str(self.backend.decode(list(ids), skip_special_tokens=skip_special_tokens))

    def save(self, path: Path | str) -> None:
        """Write tokenizer.json at `path`; where `path` is a folder, tokenizer_config.json beside it.

        `transformers.AutoTokenizer` loads such a folder.
        """
        path = Path(path)
        text = self.backend.to_str(pretty=True)
        if not path.is_dir():
            atomic_write(path, text)
            return
        settings = {"tokenizer_class": "PreTrainedTokenizerFast"} | self.settings
        if not settings.get("eos_token"):
            settings["eos_token"] = self.backend.id_to_token(self.eos_id)
        atomic_write(path / "tokenizer.json", text)
        atomic_write(path / "tokenizer_config.json", json.dumps(settings, indent=2, ensure_ascii=False))

    def require_fits(self, model_vocab: int, source: str) -> None:
        """Raise a DataError unless every id is below the model's vocabulary size."""
        if self.vocab_size > model_vocab:
            raise DataError(
                f"{source} has {self.vocab_size:,} tokens, but the model's vocabulary is {model_vocab:,}: choose a "
                f"model with at least {self.vocab_size:,}, another tokenizer, or leave data.tokenizer out "
                f"(one of {model_vocab:,} tokens is then trained on the corpus)"
            )


@contextlib.contextmanager
def _naming_a_text_without_ids() -> Iterator[None]:
    try:
        yield
    except BaseException as error:
        if not _is_the_librarys(error):
            raise
        raise DataError(
            f"the tokenizer has no ids for a text ({error}): give one with an unknown token, or of bytes, in "
            "data.tokenizer.path"
        ) from error


def _is_the_librarys(error: BaseException) -> bool:
    """Whether `tokenizers` may have raised it: plain Exception, or a panic of its Rust code, which is none."""
    return isinstance(error, Exception) or type(error).__name__ == "PanicException"


def train_tokenizer(corpus: Corpus, vocab_size: int, on_text: Callable[[str], None] = lambda text: None) -> Tokenizer:
    """A byte-level BPE of at most `vocab_size` tokens; the same corpus gives the same one, on any machine.

    Trained on all of a corpus of up to 64 Mi characters, of a larger one on a sample of that size. A small corpus may
    run out of pairs to merge before `vocab_size`.

    Args:
        on_text: called with each document that is counted.

    Raises:
        DataError: `vocab_size` is below 257, or the corpus cannot be read.
    """
    if vocab_size < _MIN_VOCAB:
        raise DataError(
            f"data.tokenizer.vocab_size={vocab_size} is too small: a byte-level BPE needs {_MIN_VOCAB} "
            f"(256 bytes and {END_OF_TEXT}) or more, 4096 for instance"
        )
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=[END_OF_TEXT],  # special tokens come first: its id is 0
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )

    def counted() -> Any:
        for text in corpus.sample(SAMPLE_CHARS):
            on_text(text)
            yield text

    backend.train_from_iterator(counted(), trainer)
    return Tokenizer(backend, 0, {})


def load_tokenizer(path: Path | str, special: bool = False) -> Tokenizer:
    """The tokenizer in a tokenizer.json, or in a folder that holds one as Hugging Face folders do.

    Documents end with the `eos_token` of tokenizer_config.json, the `eos_token_id` of generation_config.json or
    config.json beside it, or else a special token with one of the usual names.

    Raises:
        DataError: no tokenizer.json, one that cannot be read, or one without an end-of-text token.
    """
    path = Path(path).expanduser()
    file = path / "tokenizer.json" if path.is_dir() else path
    if not file.exists():
        raise _no_tokenizer(path)
    refuse_endless(file, DataError)
    if (size := file.stat().st_size) > _MOST_BYTES:
        raise DataError(
            f"{file} has {size:,} bytes, and no tokenizer.json more than {_MOST_BYTES:,}: give another file"
        )
    try:
        backend = tokenizers.Tokenizer.from_file(str(file))
    except BaseException as error:
        if not _is_the_librarys(error):
            raise
        fix = _write_one(path) if file.name != "tokenizer.json" and _is_slow(file.name) else "give the one of its model"
        raise DataError(f"{file} is not a tokenizer.json: {error}: {fix}") from error
    if (last := max(backend.get_vocab(with_added_tokens=True).values(), default=0)) > _LAST_ID:
        raise DataError(f"{file} has a token of id {last:,}, and no vocabulary more than {_LAST_ID:,}: is it damaged?")
    settings = _read_json(file.with_name("tokenizer_config.json"))
    return Tokenizer(backend, _find_eos(backend, file, settings), settings, special)


def holds_tokenizer(folder: Path) -> bool:
    """Whether a model's folder brings a tokenizer, one that cannot be read too: trained weights fit no other one."""
    return folder.is_dir() and any(file.name == "tokenizer.json" or _is_slow(file.name) for file in folder.iterdir())


def _no_tokenizer(path: Path) -> DataError:
    if not path.is_dir():
        return DataError(
            f"there is no tokenizer {path} (searched from {Path.cwd()}): give a tokenizer.json or a Hugging Face "
            f"folder in data.tokenizer.path, or leave it out to train one on the corpus"
        )
    if slow := sorted(file.name for file in path.iterdir() if _is_slow(file.name)):
        return DataError(f"{path} holds {slow[0]}, but no tokenizer.json: {_write_one(path)}")
    return DataError(f"{path} holds no tokenizer.json: give another folder in data.tokenizer.path")


def _is_slow(name: str) -> bool:
    """Whether a file is a tokenizer in another format."""
    return name.endswith((".model", ".tiktoken")) or name in ("vocab.json", "vocab.txt", "merges.txt", "tekken.json")


def _write_one(path: Path) -> str:
    folder = path if path.is_dir() else path.parent
    # transformers chooses the class by it; without, it asks for another library
    first = "" if (folder / "config.json").exists() else "put the model's config.json beside it, "
    then = "" if path.is_dir() else f", and give {folder} in data.tokenizer.path"
    name = repr(str(folder))
    return f"{first}write one with transformers, AutoTokenizer.from_pretrained({name}).save_pretrained({name}){then}"


def _find_eos(backend: Any, file: Path, settings: dict[str, Any]) -> int:
    named = settings.get("eos_token")
    if isinstance(named, dict):  # an AddedToken written out
        named = named.get("content")
    if isinstance(named, str):
        eos_id = backend.token_to_id(named) if _is_unicode(named) else None
        if eos_id is None:
            raise DataError(
                f"{file} has no token {named!r}, which tokenizer_config.json beside it calls eos_token: "
                "name another there"
            )
        return int(eos_id)
    for name in ("generation_config.json", "config.json"):
        eos_id = _read_json(file.with_name(name)).get("eos_token_id")
        if isinstance(eos_id, list) and eos_id:
            eos_id = eos_id[0]
        if isinstance(eos_id, int) and not isinstance(eos_id, bool):
            if not 0 <= eos_id <= _LAST_ID or backend.id_to_token(eos_id) is None:
                raise DataError(
                    f"{file} has no token {eos_id}, which {name} beside it calls eos_token_id: give another there"
                )
            return eos_id
    special = {token.content: i for i, token in backend.get_added_tokens_decoder().items() if token.special}
    for token in _COMMON_END_TOKENS:
        if token in special:
            return int(special[token])
    raise DataError(
        f"{file} does not tell which token ends a text (its special tokens: {', '.join(special) or 'none'}): "
        f'write {{"eos_token": "..."}} into {file.with_name("tokenizer_config.json")}'
    )


def _is_unicode(text: str) -> bool:
    """Whether the text is free of halves of surrogate pairs, which JSON may spell."""
    return text.encode("utf-8", "replace") == text.encode("utf-8", "surrogatepass")


def _read_json(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    text = read_text(path, "file", DataError)
    try:
        tree = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"cannot read {path}: {error}") from error
    return tree if isinstance(tree, dict) else {}

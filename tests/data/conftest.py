"""Small corpora of made-up text, and the config that names them."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from colrow.config_sections import DataSection

_SYLLABLES = ["ka", "lo", "mi", "ren", "tu", "sha", "per", "gol", "ina", "ver", "dus", "tem", "or", "bi", "fel", "zan"]


def made_up_text(seed: int, words: int) -> str:
    """Sentences of made-up words; the same for the same `seed`."""
    rng = random.Random(seed)
    lexicon = ["".join(rng.choices(_SYLLABLES, k=rng.randint(1, 3))) for _ in range(200)]
    text = [rng.choice(lexicon) for _ in range(words)]
    for i in range(12, words, 13):
        text[i] += ".\n\n" if i % 5 == 0 else ".\n"
    return " ".join(text).replace("\n ", "\n")


@pytest.fixture(scope="session")
def text_of() -> Callable[[int, int], str]:
    """`text_of(seed, words)`: made-up text."""
    return made_up_text


@pytest.fixture
def section(tmp_path: Path) -> Callable[..., DataSection]:
    """`section(corpus, ...)`: a DataSection whose cache is this test's own."""

    def build(corpus: str, **more: Any) -> DataSection:
        return DataSection.model_validate(
            {"corpus": corpus, "seq_len": 32, "cache": tmp_path / "cache", "workers": 1, "validation_fraction": 0.2}
            | more
        )

    return build


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    """A folder of 40 text files of about 1,500 characters."""
    folder = tmp_path / "texts"
    folder.mkdir()
    for i in range(40):
        (folder / f"{i:02}.txt").write_text(made_up_text(i, 250), encoding="utf-8")
    return folder

"""YAML from people and strangers: what is refused, in one line and at once."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from colrow.config import load_config
from colrow.errors import ConfigError
from colrow.yaml_text import read_yaml

BOMB = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 10)}]\n" for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (BOMB.encode(), "aliases repeat its values"),
        (b"a: &a [*a]\n", "contains itself"),
        (b"[" * 100_000, "nested too deeply|is not YAML"),
        (b"a: [" + b"{b: [" * 2000, "nested too deeply|is not YAML"),
        ("run: {dir: é}".encode("latin1"), "is not UTF-8 text"),
        (b"a: 1\0", "is not YAML"),
        (b"train: {lr: 1}\ntrain: {lr: 2}\n", "the key 'train' stands twice"),
        (b"train: {lr: .nan}\n", "line 1 holds .nan: give a finite number"),
        (b"a: 2026-02-31\n", "is not YAML"),
        (b"a: " + b"9" * 5000, "holds a number of 5,000 digits"),
        (b"[1, 2]: 3\n", "is not YAML|a key is a"),
        (b"a: !!python/object/apply:os.system [ls]\n", "is not YAML"),
        (b"a: !!int ''\n", "a value is none of its tag"),
        (b"a: !!bool maybe\n", "a value is none of its tag"),
        (b"a: !!timestamp x\n", "a value is none of its tag"),
        (b"a" * (1 << 19), "larger than 256 KiB"),
    ],
    ids=lambda value: repr(value[:20]),
)
def test_hostile_files_end_in_one_line_within_a_second(data: bytes, message: str, tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_bytes(data)
    begin = time.process_time()
    with pytest.raises(ConfigError, match=message) as caught:
        load_config(file)
    assert time.process_time() - begin < 1
    assert len(str(caught.value)) < 400
    assert "\n" not in str(caught.value)


def test_a_merge_key_and_a_few_aliases_are_read(tmp_path: Path) -> None:
    """The control: what people write stays allowed."""
    file = tmp_path / "c.yaml"
    file.write_text("x: &base {a: 1, b: 2}\ny: {<<: *base, b: 3}\n")
    with pytest.raises(ConfigError, match=r"unknown key x"):
        load_config(file)
    assert read_yaml(file.read_text(), "text", ConfigError)["y"] == {"a": 1, "b": 3}


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("a: {b: [{c: 1, c: 2}]}\n", "c"),
        ("a: {yes: 1, true: 2}\n", "True"),
        ("a: {<<: {b: 1, b: 2}}\n", "b"),
        ("a: {<<: [{b: 1}, {c: {d: 1, d: 2}}]}\n", "d"),
        ("a: &a {b: 1}\nc: &c {b: 2}\nd:\n  <<: *a\n  <<: *c\n", "<<"),
    ],
)
def test_a_key_that_stands_twice_is_refused_at_any_depth_and_in_what_is_merged(text: str, key: str) -> None:
    with pytest.raises(ConfigError, match=f"text: the key '?{key}'? stands twice"):
        read_yaml(text, "text", ConfigError)


def test_a_key_that_overrides_a_merged_one_stands_once() -> None:
    """Also where the mapping is merged itself before it is read: PyYAML then has both of its values in it."""
    text = "deep: {base: &base {<<: {a: 1, b: 2}, a: 3}}\nother: {<<: *base, b: 4}\n"
    tree = read_yaml(text, "text", ConfigError)
    assert tree == {"deep": {"base": {"a": 3, "b": 2}}, "other": {"a": 3, "b": 4}}

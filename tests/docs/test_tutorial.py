"""Every page of the tutorial does what it says: its files are written, its commands run, its output compared.

In a page, `<!-- file: NAME -->` before a code block makes the block that file, and a `console` block holds commands
(`$ ...`) with the output that a reader sees. In expected output `...` stands for any text, and a line of `...` alone
for any lines.
"""

from __future__ import annotations

import re
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from helpers.forked import Commands
from helpers.variants import params

TUTORIAL = Path(__file__).parents[2] / "docs" / "tutorial"
PAGES = sorted(TUTORIAL.glob("[0-9]-*.md"))
BLOCK = re.compile(r"(?:<!-- file: (?P<file>\S+) -->\n)?```(?P<kind>\w+)\n(?P<body>.*?)^```$", re.DOTALL | re.MULTILINE)


@dataclass
class Command:
    text: str
    expected: list[str] = field(default_factory=list)


def read_page(text: str) -> tuple[dict[str, str], list[Command]]:
    """The files and the commands of a page, in order. A python block must be a file: else nobody runs it."""
    files: dict[str, str] = {}
    commands: list[Command] = []
    for match in BLOCK.finditer(text):
        kind, body = match["kind"], match["body"]
        if match["file"]:
            files[match["file"]] = body
        elif kind == "console":
            for line in body.splitlines():
                if line.startswith("$ "):
                    commands.append(Command(line[2:]))
                elif line.startswith("> "):
                    commands[-1].text += "\n" + line[2:]
                else:
                    commands[-1].expected.append(line.rstrip())
        else:
            assert kind != "python", f"a python block without a file name is run by nobody:\n{body}"
    return files, commands


def matches(expected: list[str], got: list[str]) -> bool:
    if not expected:
        return not got
    if expected[0] == "...":
        return any(matches(expected[1:], got[i:]) for i in range(len(got) + 1))
    if not got:
        return False
    pattern = re.escape(expected[0]).replace(re.escape("..."), ".*")
    return re.fullmatch(pattern, got[0].rstrip()) is not None and matches(expected[1:], got[1:])


def test_the_comparison_can_fail() -> None:
    assert matches(["a", "...", "loss ... nats"], ["a", "x", "y", "loss 3.2 nats"])
    assert not matches(["a", "loss ... nats"], ["a", "x", "loss 3.2 nats"])
    assert not matches(["by row: (3, 6)"], ["by row: (3, 3)"])


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pages' `.cache`: the text is tokenized once for all of them."""
    return tmp_path_factory.mktemp("cache")


@pytest.mark.distributed
@pytest.mark.parametrize("page", params(PAGES, lambda page: page.stem[0] == "5"), ids=lambda page: page.stem)
def test_a_page_does_what_it_says(page: Path, tmp_path: Path, cache: Path, commands: Commands) -> None:
    files, typed = read_page(page.read_text(encoding="utf-8"))
    (tmp_path / ".cache").symlink_to(cache)
    for name, body in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(body, encoding="utf-8")
    for command in typed:
        run = subprocess.run(
            ["bash", "-c", command.text],
            cwd=tmp_path,
            env=commands.environment(COLUMNS="80"),
            capture_output=True,
            text=True,
            timeout=900,
            check=False,
        )
        shown = f"$ {command.text}\n{run.stdout}\n--- stderr\n{run.stderr}"
        assert run.returncode == 0, shown
        assert matches(command.expected, run.stdout.splitlines()), shown

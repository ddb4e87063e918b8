"""`docs/torchs-tests.md` names tests that exist, and every test of the file is named there."""

from __future__ import annotations

import re
from pathlib import Path

TESTS = Path(__file__).parents[1]
TEXT = (TESTS.parent / "docs/torchs-tests.md").read_text(encoding="utf-8")
FILE = TESTS / "distributed" / "test_torchs_own.py"


def names_in(path: Path) -> set[str]:
    return set(re.findall(r"^def (test_\w+)", path.read_text(encoding="utf-8"), re.M))


def test_the_page_names_what_exists_and_all_of_it() -> None:
    named = set(re.findall(r"`(test_\w+)`", TEXT))
    exist = set.union(*map(names_in, TESTS.rglob("test_*.py")))
    assert named <= exist
    controls = {"test_a_sum_that_is_left_out_is_seen"}
    assert names_in(FILE) - controls <= named

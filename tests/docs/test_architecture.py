"""`docs/architecture.md` names files and rooms that exist, and all rooms that exist."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")


def named() -> set[str]:
    """What stands in backquotes and looks like a path."""
    return {name for name in re.findall(r"`([\w./-]+)`", TEXT) if name.endswith((".py", ".md", ".toml", "/"))}


def missing(names: set[str]) -> set[str]:
    """Those that exist neither from the repository's root nor below the package. `forecasting/` has a floor kept."""
    places = ROOT, ROOT / "src/colrow"
    return {name for name in names if not any((place / name).exists() for place in places)} - {"forecasting/"}


def test_what_the_page_names_exists() -> None:
    assert len(named()) > 50
    assert missing(named()) == set()
    assert missing({"styles/gone.py"}) == {"styles/gone.py"}


def test_every_room_stands_on_the_page() -> None:
    rooms = {f"{path.name}/" for path in (ROOT / "src/colrow").iterdir() if (path / "__init__.py").exists()}
    assert rooms <= named()


def test_the_floors_are_those_of_the_imports() -> None:
    from test_rooms import FLOORS

    on_page = re.findall(r"^\| (\d+) \| (.*?) \|", TEXT, re.M)
    stated = {room: int(floor) for floor, names in on_page for room in re.findall(r"`(\w+)(?:/|\.py)`", names)}
    assert stated == {room: i + 1 for i, rooms in enumerate(FLOORS) for room in rooms if room in stated}
    assert set.union(*FLOORS) - stated.keys() == {"__main__"}


def test_the_ways_are_short() -> None:
    """Each passes at most 12 files, which are named where the page tells the way."""
    begins = (
        r"\*\*A config\*\*",
        r"\*\*A rank\*\*",
        r"\*\*`layers\.0.*?\n\n",
        r"\*\*A batch\*\*",
        r"\*\*A checkpoint\*\*",
    )
    for begin in begins:
        way = re.search(rf"{begin}(.*?)\n\n", TEXT, re.S)
        assert way is not None, begin
        assert 7 <= len(set(re.findall(r"`([\w/]+\.py)`", way[1]))) <= 12, begin

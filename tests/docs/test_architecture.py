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
    """A parameter passes at most 12 files, and so does a batch: each is named where the page tells the way."""
    parameter = re.search(r"\*\*`layers\.0.*?\n\n(.*?)\n\n", TEXT, re.S)
    batch = re.search(r"\*\*A batch\*\*(.*?)\n\n", TEXT, re.S)
    assert parameter is not None
    assert batch is not None
    for way in (parameter[1], batch[1]):
        assert 8 <= len(set(re.findall(r"`([\w/]+\.py)`", way))) <= 12

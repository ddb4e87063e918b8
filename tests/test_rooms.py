"""The layout: imports run from upper rooms to lower ones, no files import each other, no file or room is large.

Imports inside functions count; those that only a type checker reads do not. See `docs/architecture.md`.
"""

from __future__ import annotations

import ast
import copy
import functools
from collections.abc import Iterator
from pathlib import Path

import colrow

SRC = Path(colrow.__file__).parent

FLOORS = [
    {"errors", "torch_compat", "mesh", "yaml_text", "config", "config_sections"},
    {"ops", "models", "data"},
    {"sharding"},
    {"styles"},
    {"plans"},
    {"parallel"},
    {"dryrun"},
    {"checking"},
    {"verifying"},
    {"derive"},
    {"checkpoint"},
    {"forecasting"},
    {"train"},
    {"run"},
    {"bench"},
    {"cli"},
    {"__main__"},
]
"""From the ground: a room imports from itself and from floors below. On the ground floor, files are rooms."""

WAYS_UP = {("plans.plan", "derive.judged")}
"""`Plan.derive` names publicly what `derive` does. The package's `__init__` imports public names at first use."""

LARGEST_FILE = 450
LARGEST_ROOM = 0.20

Edges = dict[str, set[str]]


def sources() -> dict[str, Path]:
    """Module names below `colrow` to files; the package itself is left out."""
    names = {".".join(path.relative_to(SRC).with_suffix("").parts): path for path in sorted(SRC.rglob("*.py"))}
    return {name.removesuffix(".__init__"): path for name, path in names.items() if name != "__init__"}


def run_time_nodes(tree: ast.AST) -> Iterator[ast.AST]:
    """All nodes of a syntax tree but those that only a type checker reads."""
    for node in ast.iter_child_nodes(tree):
        if not (isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"):
            yield node
            yield from run_time_nodes(node)


def imports(text: str, modules: set[str]) -> set[str]:
    """The modules of colrow that a file imports at run time."""
    found = set()
    for node in run_time_nodes(ast.parse(text)):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.partition(".")[0] == "colrow":
            package = node.module.removeprefix("colrow").removeprefix(".")
            for alias in node.names:
                module = f"{package}.{alias.name}".removeprefix(".")
                found.add(module if module in modules else package)
        elif isinstance(node, ast.Import):
            found |= {alias.name.removeprefix("colrow.") for alias in node.names if alias.name.startswith("colrow.")}
    return found - {""}


@functools.cache
def edges() -> Edges:
    files = sources()
    return {name: imports(path.read_text(encoding="utf-8"), set(files)) for name, path in files.items()}


def room(module: str) -> str:
    return module.partition(".")[0]


def floor(module: str) -> int:
    return next(i for i, rooms in enumerate(FLOORS) if room(module) in rooms)


def ways_up(graph: Edges) -> set[tuple[str, str]]:
    return {
        (importer, imported)
        for importer, targets in graph.items()
        for imported in targets
        if room(importer) != room(imported) and floor(imported) >= floor(importer) > 0
    }


def circles(graph: Edges) -> list[list[str]]:
    """Groups of files that reach each other by imports."""

    def reached(start: str) -> set[str]:
        seen: set[str] = set()
        todo = [start]
        while todo:
            for following in graph.get(todo.pop(), ()):
                if following not in seen:
                    seen.add(following)
                    todo.append(following)
        return seen

    reach = {name: reached(name) for name in graph}
    groups = {frozenset({name} | {other for other in reach[name] if name in reach.get(other, ())}) for name in graph}
    return sorted(sorted(group) for group in groups if len(group) > 1)


def lines(path: Path) -> int:
    return len(path.read_text(encoding="utf-8").splitlines())


def test_every_file_stands_on_a_floor() -> None:
    missing = {room(name) for name in sources()} - set.union(*FLOORS)
    assert not missing, "put each on a floor in FLOORS, and in the table of docs/architecture.md"


def test_imports_run_down() -> None:
    why = "(importer, imported): a file imports from its own room and from floors below, in functions too"
    assert ways_up(edges()) == WAYS_UP, why


def test_no_files_import_each_other() -> None:
    graph = copy.deepcopy(edges())
    for importer, imported in WAYS_UP:
        graph[importer].discard(imported)
    assert circles(graph) == [], "move what each of these files needs of the other into a third file"


def test_a_new_way_up_and_a_circle_are_seen() -> None:
    graph = copy.deepcopy(edges())
    graph["sharding.layout"] |= imports("def f():\n    from colrow.train.step import Step\n", set(graph))
    assert ("sharding.layout", "train.step") in ways_up(graph)
    assert any({"sharding.layout", "train.step"} <= set(group) for group in circles(graph))


def test_what_a_type_checker_reads_is_no_import() -> None:
    assert imports("if TYPE_CHECKING:\n    from colrow.train.step import Step\n", {"train.step"}) == set()


def test_a_file_is_about_one_noun() -> None:
    large = {name: n for name, path in sources().items() if (n := lines(path)) > LARGEST_FILE}
    assert not large, f"more than {LARGEST_FILE} lines: move one of the things that the file is about into its own"


def test_no_room_holds_a_fifth_of_all_lines() -> None:
    total: dict[str, int] = {}
    for name, path in sources().items():
        total[room(name)] = total.get(room(name), 0) + lines(path)
    assert {name: n for name, n in total.items() if n > LARGEST_ROOM * sum(total.values())} == {}


def test_every_room_has_tests_of_its_own() -> None:
    """`make test-room ROOM=...` runs `tests/ROOM` or `tests/test_ROOM.py`, and what the Makefile names besides."""
    tests = Path(__file__).parent
    named = (tests.parent / "Makefile").read_text(encoding="utf-8")
    rooms = {path.stem for path in SRC.iterdir() if path.is_dir() or path.suffix == ".py"} - {"__pycache__"}
    bare = {r for r in rooms if not (tests / r).is_dir() and not (tests / f"test_{r}.py").exists()}
    assert {r for r in bare if f"\nROOM_{r} :=" not in named} == {"__init__", "__main__"}

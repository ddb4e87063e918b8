"""What others ask about a style stands on its class: nothing outside `styles/` and the presets compares its name."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import colrow
from colrow.checking.finding import CODES
from colrow.styles.base import PREVIOUS_NAMES, STYLES, style_from_data

SOURCE = Path(colrow.__file__).parent
FOREIGN = {
    ("sharding/placements.py", "replicate"): "a placement",
    ("ops/weights.py", "rowwise"): "a recipe of fp8",
    ("plans/plan.py", "sequence"): "an order of tokens",
}
"""Words that are a style's name and stand for something else."""
FOREIGN_FILES = {"plans/huggingface.py": "Hugging Face's names of styles", "plans/presets.py": "may compare"}


def files() -> Iterator[tuple[str, ast.Module]]:
    for path in sorted(SOURCE.rglob("*.py")):
        name = str(path.relative_to(SOURCE))
        if not name.startswith("styles/") and name not in FOREIGN_FILES:
            yield name, ast.parse(path.read_text(encoding="utf-8"))


def strings(node: ast.AST) -> Iterator[str]:
    """Strings of a node, but not those of calls inside it: an argument is no operand."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        yield node.value
    if not isinstance(node, ast.Call):
        for child in ast.iter_child_nodes(node):
            yield from strings(child)


def compared(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Strings that a file compares with `==` or `in`, matches, uses as keys of a dict, or collects to look up."""
    for node in ast.walk(tree):
        found: list[str] = []
        if isinstance(node, ast.Compare):
            found = [s for operand in (node.left, *node.comparators) for s in strings(operand)]
        elif isinstance(node, ast.MatchValue):
            found = list(strings(node.value))
        elif isinstance(node, ast.Dict):
            found = [s for key in node.keys if key is not None for s in strings(key)]
        elif isinstance(node, ast.Assign | ast.AnnAssign) and isinstance(node.value, ast.Tuple | ast.List | ast.Set):
            found = list(strings(node.value))
        yield from ((getattr(node, "lineno", 0) or node.pattern.lineno, s) for s in found)  # type: ignore[attr-defined]


def names_compared(tree: ast.AST) -> Iterator[int]:
    """Comparisons of `style.name`, whatever with."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Compare):
            for operand in (node.left, *node.comparators):
                if isinstance(operand, ast.Attribute) and operand.attr == "name" and "style" in ast.unparse(operand):
                    yield node.lineno


def test_nothing_outside_compares_a_styles_name() -> None:
    names = {*STYLES, *PREVIOUS_NAMES}
    words = [(file, line, text) for file, tree in files() for line, text in compared(tree) if text in names]
    found = [f"{file}:{line}: {text}" for file, line, text in words if (file, text) not in FOREIGN]
    found += [f"{file}:{line}: .name" for file, tree in files() for line in names_compared(tree)]
    assert found == [], "ask a fact of the style's class instead (`Style` in styles/base.py); FOREIGN has other words"
    assert {(file, text) for file, _, text in words} == FOREIGN.keys()  # none is excused that is gone


@pytest.mark.parametrize(
    "text",
    [
        "style.name == 'sequence'",
        "styles[fqn].name in known",
        "kind in ('colwise', 'rowwise')",
        "WANTED = {'fast_gather': 'column_forward'}",
        "SUMS = ('rowwise', 'grad_sum')",
        "match kind:\n    case 'linear_head': pass",
    ],
)
def test_a_comparison_is_seen(text: str) -> None:
    tree = ast.parse(text)
    assert {s for _, s in compared(tree)} & STYLES.keys() or list(names_compared(tree))


def test_every_module_of_the_package_is_imported_with_it() -> None:
    """So a style needs no list that names it."""
    paths = {path for path in (SOURCE / "styles").rglob("*.py") if "name = " in path.read_text(encoding="utf-8")}
    declared = {
        node.value.value
        for path in paths
        for cls in ast.parse(path.read_text(encoding="utf-8")).body
        if isinstance(cls, ast.ClassDef)
        for node in cls.body
        if isinstance(node, ast.Assign)
        and isinstance(node.targets[0], ast.Name)
        and node.targets[0].id == "name"
        and isinstance(node.value, ast.Constant)
    }
    assert declared == STYLES.keys()
    assert len(declared) > 20


def test_negative_controls_are_styles() -> None:
    controls = {cls.negative_control.style for cls in STYLES.values() if cls.negative_control}
    assert controls == {"replicate", "grad_sum"}


@pytest.mark.parametrize(
    ("previous", "now"),
    [
        ("fast_part", "fast_shard_tokens"),
        ("fast_whole", "fast_gather_tokens"),
        ({"style": "fast_whole", "arguments": [1]}, {"style": "fast_gather_tokens", "arguments": [1]}),
        ({"style": "fast_embedding", "whole": True}, {"style": "fast_embedding", "all_tokens": True}),
        ({"style": "linear_head", "layout": "tokens"}, {"style": "linear_head", "layout": "flattened"}),
        ({"style": "linear_head", "layout": "whole"}, {"style": "linear_head", "layout": "replicated"}),
        (
            {"style": "packed_colwise", "segments": [8, 4], "whole": [1]},
            {"style": "packed_colwise", "segments": [8, 4], "replicated": [1]},
        ),
        (
            {"style": "fast_colwise", "segments": [4], "whole": [0]},
            {"style": "fast_colwise", "segments": [4], "replicated": [0]},
        ),
        (
            {"style": "local_shards", "shards": {"w": {"dim": 0, "segments": [8, 4], "whole": [1]}}},
            {"style": "local_shards", "shards": {"w": {"dim": 0, "segments": [8, 4], "replicated": [1]}}},
        ),
    ],
)
def test_a_previous_name_is_read_and_the_name_of_today_written(previous: object, now: object) -> None:
    assert style_from_data(previous, "key").to_data() == now
    assert style_from_data(now, "key") == style_from_data(previous, "key")


def test_codes_of_plan_errors_are_codes_of_findings() -> None:
    """`PlanError(code, ...)` and `Site.divide(extent, code, what)`."""
    codes = [
        argument.value
        for path in SOURCE.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call)
        and ast.unparse(node.func).endswith(("PlanError", ".divide"))
        and len(node.args) > 1
        for argument in node.args[:2]
        if isinstance(argument, ast.Constant) and str(argument.value).startswith("CR")
    ]
    assert len(codes) > 15
    assert set(codes) <= CODES.keys()

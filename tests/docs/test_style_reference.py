"""The page on styles has every style, as its class says it."""

from __future__ import annotations

from pathlib import Path

from colrow.plans.style_reference import reference
from colrow.styles.base import STYLES

PAGE = Path(__file__).parents[2] / "docs" / "guide" / "styles.md"


def test_the_page_has_the_reference() -> None:
    first, has_reference = reference().partition("\n")[0], reference() in PAGE.read_text(encoding="utf-8")
    fix = "put what `python -m colrow.plans.style_reference` prints in the place of"
    assert has_reference, f"{fix} all of docs/guide/styles.md from {first!r} on"


def test_every_style_has_a_section_with_its_options() -> None:
    sections = {part.partition("\n")[0]: part for part in reference().split("### ")}
    assert {f"`{name}`" for name in STYLES} <= {*sections}
    assert "`segments`" in sections["`packed_rowwise`"]
    assert "`keep_gathered: true`" in sections["`fast_gather`"]
    assert "`optional" not in sections["`fast_gather`"], "the page says that once"

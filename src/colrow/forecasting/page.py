"""A forecast as one self-contained HTML page: stacked bars of memory and of time for each mesh."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from pathlib import Path

from colrow.data.disk import write_result
from colrow.forecasting.choices import Table
from colrow.forecasting.forecast import Row
from colrow.forecasting.memory import GIB

_COLOURS = (
    "#4477aa",
    "#66a5d8",
    "#228833",
    "#ccbb44",
    "#ee6677",
    "#aa3377",
    "#8a94a3",
    "#e08a3c",
    "#4cb7a5",
    "#b0b8c4",
    "#7a5195",
    "#b5651d",
    "#d9a6c2",
)
"""One for each part: a step has up to twelve."""
_STYLE = """
:root { --ink: #1c2430; --soft: #5b6675; --line: #d5dbe3; --paper: #ffffff; --limit: #c02626 }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6eaf0; --soft: #9aa5b4; --line: #343c48; --paper: #14181e; --limit: #ff7b72 } }
* { box-sizing: border-box } body { margin: 0 auto; padding: 16px; max-width: 900px; background: var(--paper);
  color: var(--ink); font: 15px/1.5 system-ui, sans-serif }
h1 { font-size: 22px; margin: 0 } h2 { font-size: 17px; margin: 28px 0 4px } p { margin: 4px 0; color: var(--soft) }
.row { margin: 10px 0 }
.name { display: flex; flex-wrap: wrap; justify-content: space-between; gap: 0 12px; font-size: 13px }
.name b { font-weight: 600 } .name span { color: var(--soft) } .no b { color: var(--limit) }
.bar { position: relative; display: flex; height: 16px; background: var(--line); border-radius: 3px; overflow: hidden }
.bar i { min-width: 0 } .limit { position: absolute; top: 0; bottom: 0; width: 2px; background: var(--limit) }
.keys { display: flex; flex-wrap: wrap; gap: 2px 14px; font-size: 13px; color: var(--soft) }
.keys i { display: inline-block; width: 10px; height: 10px; border-radius: 2px; margin-right: 5px }
"""


def write_page(table: Table, title: str, path: Path) -> None:
    """Write the page. It loads nothing from anywhere."""
    write_result(path, page(table, title))


def page(table: Table, title: str) -> str:
    """The page as text."""
    first = table.rows[0]
    limit = first.device.memory / GIB
    memory = {id(row): row.memory.gib_by_part for row in table.rows}
    fitting = [row for row in table.rows if row.fits]
    rates = {id(row): _per_token(row) for row in fitting}
    return "\n".join([
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<style>{_STYLE}</style></head><body><h1>{escape(title)}</h1>",
        f"<p>{first.mesh.world_size} × {escape(first.device.name)}; rates: {escape(first.device.source)}</p>",
        f"<h2>Memory of a rank, GiB</h2><p>The line is the device's {limit:.0f} GiB.</p>",
        _bars(table.rows, memory, limit, "GiB"),
        "<h2>Time, µs a token of a GPU</h2><p>Shorter is faster.</p>",
        _bars(fitting, rates, None, "µs"),
        "</body></html>",
    ])  # fmt: skip


def _per_token(row: Row) -> dict[str, float]:
    """Microseconds by part, so that meshes with other batches compare."""
    tokens = row.tokens_per_second_per_gpu * row.time.seconds
    return {name: seconds / tokens * 1e6 for name, seconds in row.time.parts.items()}


def _bars(rows: list[Row], parts: Mapping[int, Mapping[str, float]], limit: float | None, unit: str) -> str:
    names = list(dict.fromkeys(name for row in rows for name, value in parts[id(row)].items() if value > 0))
    colours = dict(zip(names, _COLOURS, strict=False))
    widest = max([limit or 0.0, *(sum(parts[id(row)].values()) for row in rows)], default=1.0) or 1.0
    keys = "".join(f'<span><i style="background:{colours[name]}"></i>{escape(name)}</span>' for name in names)
    lines = [f'<div class="keys">{keys}</div>']
    for row in rows:
        filled = "".join(
            f'<i style="width:{100 * value / widest:.2f}%;background:{colours[name]}" '
            f'title="{escape(name)} {value:.2f} {unit}"></i>'
            for name, value in parts[id(row)].items()
            if value > 0
        )
        mark = "" if limit is None else f'<u class="limit" style="left:calc({100 * limit / widest:.2f}% - 2px)"></u>'
        total = sum(parts[id(row)].values())
        graph = ", CUDA graph" * row.options.cuda_graph + ", flat data engine" * row.mesh.is_flat
        how = f"{row.plan}{graph}, micro-batch {row.options.micro_batch}, recompute {row.options.recompute}"
        speed = f"{row.tokens_per_second_per_gpu:,.0f} tokens/s" if row.fits else "does not fit"
        lines.append(
            f'<div class="row{"" if row.fits else " no"}"><div class="name"><b>{escape(str(row.mesh))}</b>'
            f"<span>{escape(how)}, {total:.1f} {unit}, {speed}</span>"
            f'</div><div class="bar">{filled}{mark}</div></div>'
        )
    return "\n".join(lines)

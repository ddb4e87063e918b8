"""A plan as one self-contained HTML page: the block's picture, memory on a rank, every parameter with its reason."""

from __future__ import annotations

from html import escape
from pathlib import Path

from colrow.data.disk import write_result
from colrow.dryrun.report import ParameterRow, PathStep, PlanReport
from colrow.dryrun.result import Collective
from colrow.plans.patterns import with_stars

_STYLE = """
:root { --ink: #1c2430; --soft: #5b6675; --line: #d5dbe3; --paper: #ffffff; --box: #f4f6f9;
        --sharded: #1f6feb; --replicated: #8a94a3; --gather: #0a7f5a; --scatter: #b4540a; --reduce: #8b3fb0; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6eaf0; --soft: #9aa5b4; --line: #343c48; --paper: #14181e; --box: #1d232c;
          --sharded: #6ea8ff; --replicated: #78828f; --gather: #4cc79b; --scatter: #f0a35e; --reduce: #cf94ee; } }
* { box-sizing: border-box } body { margin: 0 auto; padding: 24px; max-width: 1100px; background: var(--paper);
  color: var(--ink); font: 15px/1.5 system-ui, sans-serif }
h1 { font-size: 24px; margin: 0 } h2 { font-size: 18px; margin: 36px 0 8px } p { margin: 4px 0; color: var(--soft) }
code, .mono, td { font-family: ui-monospace, monospace; font-size: 13px }
.scroll { overflow-x: auto } table { border-collapse: collapse; width: 100% }
th { text-align: left; font-weight: 600; color: var(--soft); font-size: 13px }
th, td { padding: 4px 12px 4px 0; border-bottom: 1px solid var(--line); vertical-align: top; white-space: nowrap }
td.why { white-space: normal; font-family: system-ui, sans-serif; color: var(--soft) }
.path { border-left: 3px solid var(--line); margin-left: 8px; padding: 2px 0 2px 16px }
.step { background: var(--box); border: 1px solid var(--line); border-radius: 8px; padding: 8px 12px; margin: 8px 0 }
.step b { font-family: ui-monospace, monospace } .step span { color: var(--soft); font-size: 13px; margin-left: 8px }
.sent { font-size: 13px; padding: 2px 0 } .sent b { font-weight: 600 }
.all_gather b { color: var(--gather) } .reduce_scatter b { color: var(--scatter) }
.all_reduce b { color: var(--reduce) }
.bar { display: flex; height: 14px; border-radius: 7px; overflow: hidden; background: var(--line); margin: 8px 0 }
.bar i { background: var(--sharded) } .bar i.replicated { background: var(--replicated) }
.key::before { content: ""; display: inline-block; width: 10px; height: 10px; border-radius: 2px; margin-right: 6px;
  background: var(--sharded) } .key.replicated::before { background: var(--replicated) }
.key { margin-right: 18px; font-size: 13px }
"""


def write_page(shown: PlanReport, model: str, path: Path) -> None:
    """Write the page. It loads nothing from anywhere."""
    write_result(path, page(shown, model))


def page(shown: PlanReport, model: str) -> str:
    """The page as text."""
    title = f"{model} · plan {shown.plan.name} · tp {shown.tp}"
    block = f"{shown.block} (× {shown.blocks})" if shown.block else ""
    sections = [
        f"<h1>{escape(title)}</h1>",
        f"<p>loss {shown.plan.loss}; batch {shown.batch_size} × {shown.seq_len} tokens on a rank</p>",
        "<h2>Parameters on a rank</h2>",
        _memory(shown.parameters),
        f"<h2>One block: {escape(block)}</h2><p>Activations flow down the page, gradients up.</p>" if block else "",
        _path(shown.path),
        "<h2>Collectives outside the blocks</h2>" + _collectives(shown.other_collectives),
        "<h2>Every parameter</h2>" + _table(shown.parameters),
    ]
    notes = "".join(f"<li>{escape(note)}</li>" for note in shown.notes)
    if notes:
        sections.append(f"<h2>Notes</h2><ul>{notes}</ul>")
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head><body>{''.join(sections)}</body></html>\n"
    )


def _memory(rows: list[ParameterRow]) -> str:
    total = sum(row.bytes for row in rows)
    sharded = sum(row.local_bytes for row in rows if row.local_shape != row.shape)
    replicated = sum(row.local_bytes for row in rows if row.local_shape == row.shape)
    bars = (("", sharded), ("replicated", replicated))
    return (
        '<div class="bar" role="img" aria-label="share of the model on one rank">'
        + "".join(f'<i class="{name}" style="width:{100 * nbytes / total:.3f}%"></i>' for name, nbytes in bars)
        + "</div>"
        f'<span class="key">sharded: {in_units(sharded)}</span><span class="key replicated">replicated: '
        f'{in_units(replicated)}</span><span class="mono">{in_units(sharded + replicated)} of {in_units(total)}</span>'
    )


def _path(steps: list[PathStep]) -> str:
    """Boxes nested like the modules of the block."""
    out, depth = [], 0
    for step in steps:
        while depth > step.depth:
            out.append("</div>")
            depth -= 1
        while depth < step.depth:
            out.append('<div class="path">')
            depth += 1
        sent = "".join(_sent(c) for c in (*step.before, *step.after, *step.backward))
        output = ""
        if step.output is not None:
            shape = " × ".join(map(str, step.output.shape))
            output = f"<span>out {shape}{' global' if step.output.is_dtensor else ''}</span>"
        out.append(
            f'<div class="step"><b>{escape(step.name)}</b><span>{escape(step.style)}</span>'
            f"<span>{escape(step.weights)}</span>{output}{sent}</div>"
        )
    return "".join(out) + "</div>" * depth


def _sent(c: Collective) -> str:
    arrow = "▼ forward" if c.pass_ == "forward" else "▲ backward"
    return (
        f'<div class="sent {c.op}">{arrow} <b>{c.op.replace("_", "-")}</b> {in_units(c.bytes)} '
        f"<span>{escape(c.cause)}</span></div>"
    )


def _collectives(collectives: list[Collective]) -> str:
    return "".join(_sent(c) for c in collectives) or "<p>none</p>"


def _table(rows: list[ParameterRow]) -> str:
    groups: dict[tuple[str, str, str, str, str], int] = {}
    for row in rows:
        shape, local = (" × ".join(map(str, s)) for s in (row.shape, row.local_shape))
        key = (with_stars(row.name), shape, row.placement, local, row.reason)
        groups[key] = groups.get(key, 0) + 1
    head = "".join(f"<th>{t}</th>" for t in ("parameter", "shape", "placement", "on a rank", "number", "why"))
    body = "".join(
        "<tr>"
        + "".join(f"<td>{escape(cell)}</td>" for cell in key[:4])
        + f'<td>{n}</td><td class="why">{escape(key[4])}'
        "</td></tr>"
        for key, n in groups.items()
    )
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def in_units(number: float) -> str:
    """Bytes for people: 1.5 MiB."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if number < 1024 or unit == "GiB":
            break
        number /= 1024
    return f"{number:.0f} {unit}" if number >= 100 or unit == "B" else f"{number:.1f} {unit}"

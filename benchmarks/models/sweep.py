"""Derive and prove a plan for every causal language model of the installed transformers, on tiny configurations.

    python -m benchmarks.models.sweep --tp 2 4 --results sweep.jsonl -o docs/models.md [NAME ...]

Each model runs in a process of its own under a limit of CPU time. What the results file holds already is not run again
(unless `--again`), so a long sweep goes in pieces (`--budget SECONDS`); `--jobs` models run at a time. A model is

    full          two reductions a layer (one, where a layer is a single mixer), and most of its matrices split
    partial       something is split; the reason names what is not
    unsharded     nothing is split; the reason says why
    fails         the plan raises when it runs (never a wrong number)
    untraceable   torch.export cannot trace it
    not built     a tiny configuration does not give a model that runs
    refused       the model gets no fast styles, where those were requested (`--styles fast`)
    WRONG         loss or a gradient differs from the unsharded model: must never stand in the table

The check, which runs no numbers, judges each plan too: proven, unproven (CR414), or refused with an error.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from torch import nn

from benchmarks.models.apart import run_all
from benchmarks.models.examine import Row, examine
from benchmarks.models.results import by_model, read, verdict_counts
from benchmarks.models.tiny import causal_models
from colrow.derive.derivation import derive
from colrow.plans.derive_options import Styles

TORCH = torch.__version__.partition("+")[0]
VERDICTS = ("full", "partial", "unsharded", "fails", "untraceable", "not built", "refused", "WRONG")


def warm() -> None:
    """Import what every model needs, before the processes split off."""
    import transformers.modeling_utils
    import transformers.models.llama.modeling_llama  # noqa: F401

    derive(nn.Sequential(nn.Linear(32, 64), nn.Linear(64, 32)), 2, inputs=(torch.zeros(3, 34, 32),))


def judgement(row: Row) -> str:
    """What the check says of a plan; empty where there is none."""
    if "findings" not in row:
        return ""
    codes = {finding.partition(" ")[0] for finding in row["findings"]}
    return "refused by check" if codes - {"CR414"} else "unproven" if codes else "proven by check"


def _said(row: Row) -> str:
    """The judgement for a cell of the table: with the operators that are unproven, or the codes of the errors."""
    said = judgement(row).partition(" ")[0]
    if said == "unproven":
        operators = dict.fromkeys(f.partition(": ")[2].split()[0] for f in row["findings"])
        said += " " + ", ".join(list(operators)[:4])
    if said == "refused":
        said += " " + ", ".join(sorted({f.partition(" ")[0] for f in row["findings"]} - {"CR414"}))
    return said


def table(rows: Sequence[Row], command: str, known: Sequence[str], styles: Styles = "plain") -> str:
    """Markdown: the counts of each verdict at each degree, one line a model, and which of `known` have no row yet."""
    import transformers

    degrees = sorted({row["tp"] for row in rows})
    models = by_model(rows)
    torches = " and ".join(sorted({row.get("torch", TORCH) for row in rows}))
    lines = [
        "# Models that a derived plan" + (f" of {styles} styles" if styles != "plain" else "") + " was proved on",
        "",
        f"Causal language models of transformers {transformers.__version__} in tiny configurations, with torch "
        f"{torches} on a CPU. Each plan ran forward and backward on simulated ranks, and "
        "loss and every gradient were compared with the unsharded model: 1e-9 relative in fp64, 1e-5 where the model "
        "computes in fp32 by itself (more where a gradient is zero by mathematics, and rounding is all there is). The "
        "table is made by",
        "",
        f"    {command}",
        "",
        *verdict_counts(rows, degrees, VERDICTS),
    ]
    for kind in ("proven by check", "unproven", "refused by check"):
        counts = [sum(judgement(r) == kind for r in rows if r["tp"] == tp) for tp in degrees]
        lines.append(f"| {kind} | " + " | ".join(map(str, counts)) + " |")
    lines.append("| models | " + " | ".join(str(sum(r["tp"] == tp for r in rows)) for tp in degrees) + " |")
    lines += [
        "",
        "*full*: attention and MLP of every layer are split, two reductions a layer (one, where a layer is a single "
        "mixer). *partial*: something is split, "
        "and the reason names what is not. *unsharded*: nothing is. *fails*: the plan stops with an error when it "
        "runs. *untraceable*: `torch.export` cannot trace the model. *not built*: the tiny configuration gives no "
        "model that runs on token ids only. "
        + ("*refused*: the model gets no such styles. " if styles != "plain" else "")
        + "*WRONG*: a wrong number; it must never stand here. *check*: the plan in training mode is *proven*, or some "
        "operators are *unproven* (CR414), or it is *refused*.",
        "",
        "| model | "
        + " | ".join(f"tp {tp}" for tp in degrees)
        + " | check | split | sequence shards | worst error | reason |",
        "|---|" + "---|" * len(degrees) + "---|---|---|---|---|",
    ]
    for model in sorted(models):
        found = models[model]
        verdicts = [found[tp]["verdict"] if tp in found else "" for tp in degrees]
        first = found[min(found)]
        share = f"{first['share']:.0%}" if "share" in first else ""
        shards = {True: "yes", False: "no"}.get(first.get("sequence_parallel"), "")  # type: ignore[arg-type]
        errors = [max(r["gradient_error"], r["loss_error"]) for r in found.values() if "gradient_error" in r]
        worst = f"{max(errors):.0e}" + (" (fp32)" if first.get("fp32") else "") if errors else ""
        check = " / ".join(dict.fromkeys(filter(None, map(_said, found.values()))))
        reasons = dict.fromkeys(r.get("reason", "") for r in found.values())
        reason = " / ".join(r for r in reasons if r).replace("|", "/")
        lines.append(f"| {model} | {' | '.join(verdicts)} | {check} | {share} | {shards} | {worst} | {reason} |")
    if missing := [name for name in known if name not in models]:
        names = "" if styles != "plain" else f": {', '.join(missing)}"
        lines += ["", f"Not run yet, {len(missing)} of {len(known)}{names}."]
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.models.sweep", description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", help="model types; all unless given")
    parser.add_argument("--tp", type=int, nargs="+", default=[2])
    parser.add_argument("--styles", choices=("plain", "fast"), default="plain", help="what plans are written in")
    parser.add_argument("--limit", type=int, default=120, help="seconds of CPU for one model")
    parser.add_argument("--jobs", type=int, default=1, help="models at a time, each on one core")
    parser.add_argument("--budget", type=float, default=float("inf"), help="start no model after so many seconds")
    parser.add_argument("--results", type=Path, help="a file of JSON lines, to continue from and to add to")
    parser.add_argument("--again", action="store_true", help="run what the results hold, too")
    parser.add_argument("-o", "--output", type=Path, help="where the markdown table goes")
    given = parser.parse_args(argv)
    known = causal_models()
    if unknown := [m for m in given.models if m not in known]:
        parser.error(f"no causal language model is called {', '.join(unknown)}")
    results = read(given.results)
    jobs = [
        (model_type, degrees)
        for model_type in given.models or known
        if (degrees := [tp for tp in given.tp if given.again or (model_type, tp) not in results])
    ]
    start = time.monotonic()
    if jobs:
        warm()
        print(f"{len(jobs)} models to go, warm after {time.monotonic() - start:.0f} s", flush=True)
    judge = partial(examine, styles=given.styles)
    for rows in run_all(jobs, judge, at_once=given.jobs, limit=given.limit, budget=given.budget):
        rows = [row | {"torch": TORCH} for row in rows]
        for row in rows:
            results[(row["model"], row["tp"])] = row
            model = f"{row['model']:24s} tp {row['tp']}"
            said = f"{row['verdict']:12s} {judgement(row):16s} {row['seconds']:6.1f} s  {row.get('reason', '')[:150]}"
            print(f"{model} {said}", flush=True)
            if given.results:
                with given.results.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(row) + "\n")
    if left := sum((model_type, tp) not in results for model_type, degrees in jobs for tp in degrees):
        print(f"{left} rows left")
    tp = " ".join(map(str, given.tp))
    fast = f" --styles {given.styles}" if given.styles != "plain" else ""
    page = "models.md" if given.styles == "plain" else f"models-{given.styles}.md"
    command = f"python -m benchmarks.models.sweep --tp {tp}{fast} --results sweep.jsonl -o docs/{page}"
    text = table(list(results.values()), command, known, given.styles)
    if given.output:
        given.output.write_text(text, encoding="utf-8")
    elif not given.results:
        print(text)
    return 1 if any(row["verdict"] == "WRONG" for row in results.values()) else 0


if __name__ == "__main__":
    sys.exit(main())

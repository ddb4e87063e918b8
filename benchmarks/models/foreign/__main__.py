"""Derive, check and prove plans for models of other people's packages, and write the table of them.

    python -m benchmarks.models.foreign --tp 2 4 --results foreign.jsonl -o docs/models-foreign.md [GROUP ...]

Packages are installed in one environment for each group (`--environments`), never in this one; torch is shared. What
the results file holds is not run again, unless `--again`; a long run goes in slices (`--budget SECONDS`). What the
verdicts mean: `judge.py`.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from benchmarks.models.apart import Row
from benchmarks.models.foreign.environments import python_of
from benchmarks.models.foreign.registry import GROUPS, models_of
from benchmarks.models.results import by_model, read, verdict_counts

VERDICTS = ("useful", "little", "nothing", "unproven", "refused", "not built", "fails", "WRONG")
ROOT = Path(__file__).parents[3]
LONGEST = 170


def table(rows: Sequence[Row], command: str, versions: str, known: Sequence[str] = ()) -> str:
    """Markdown: the counts of each verdict at each degree, one line a model, and which of `known` have no row yet."""
    degrees = sorted({row["tp"] for row in rows})
    models = by_model(rows)
    packages = {row["package"] for row in rows}
    lines = [
        "# Derived plans for models of other packages",
        "",
        f"{len(models)} models of {len(packages)} packages, of two layers and a width of about 64, with random "
        f"weights, {versions}, on a CPU. `Plan.derive` gives a plan, `check` judges it, and `verify` compares loss, "
        "every gradient and a step on simulated ranks with one process, in fp64. The table is made by",
        "",
        f"    {command}",
        "",
        *verdict_counts(rows, degrees, VERDICTS),
    ]
    attention = []
    for tp in degrees:
        shares = [r["attention"] for r in rows if r["tp"] == tp and r.get("attention") is not None]
        attention.append(f"{sum(share >= 0.5 for share in shares)} of {len(shares)}")
    lines += [
        f"| attention split | {' | '.join(attention)} |",
        "",
        "*useful*: at least 60% of the parameters are split, the plan is proved, and the check finds no error. "
        "*little*: proved, and less is split. *nothing*: nothing is split. *unproven*: no error is found, and none in "
        "plans broken on purpose either. *refused*: one line says why there is no plan. *fails*: an exception "
        "that is no message. "
        "*WRONG*: a wrong number; it must never stand here. *share*: of the parameters that are split; *attention*: of "
        "those in its attention. *reason*: the largest, for what is not split. *seconds*: of CPU, for `Plan.derive` at "
        f"tp {degrees[0]}.",
        "",
        "| field | package | model | "
        + " | ".join(f"tp {tp}" for tp in degrees)
        + " | share | attention | seconds | reason |",
        "|---|---|---|" + "---|" * len(degrees) + "---|---|---|---|",
    ]
    for found in sorted(models.values(), key=lambda found: next((r["field"], r["model"]) for r in found.values())):
        first = found[min(found)]
        verdicts = " | ".join(found[tp]["verdict"] if tp in found else "" for tp in degrees)
        shares = [" / ".join(_percent(found[tp].get(key)) for tp in sorted(found)) for key in ("share", "attention")]
        reason = next((r["reason"] for r in found.values() if r.get("reason")), "")
        cells = [first["field"], first["package"], first["name"], verdicts, *shares]
        cells += [str(first.get("seconds", "")), _short(reason)]
        lines.append("| " + " | ".join(cells) + " |")
    if missing := [key for key in known if key not in models]:
        lines += ["", f"Not run yet, {len(missing)} of {len(known)}: {', '.join(missing)}."]
    return "\n".join(lines) + "\n"


def trained_table(rows: Sequence[Row]) -> str:
    """Markdown: what `trained.py` printed, one line a model, kind of styles and precision."""
    lines = [
        "",
        "## Trained for 20 steps",
        "",
        "Two real ranks (gloo, tp 2) beside one process, AdamW, a new batch in each step, dropout of 0.1 where a model "
        "has it: the largest relative difference of a loss. Made by "
        "`python -m benchmarks.models.foreign.trained`.",
        "",
        "| model | styles | precision | dropout | first and last loss | largest difference |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        said = [row["model"], row["styles"], row.get("dtype", "")]
        if "refused" in row:
            said += ["", "", f"refused: {_short(row['refused'])}"]
        elif "failed" in row:
            said += ["", "", "a rank failed"]
        else:
            said += [str(row["dropout"] or "off"), f"{row['first']:.6g}, {row['last']:.6g}", f"{row['worst']:.0e}"]
        lines.append(f"| {' | '.join(said)} |")
    return "\n".join(lines) + "\n"


def _percent(share: float | None) -> str:
    return "" if share is None else f"{share:.0%}"


def _short(reason: str) -> str:
    text = " ".join(reason.replace("|", "/").split())
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 3]}..."


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.models.foreign", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("groups", nargs="*", help=f"of {', '.join(GROUPS)}; all unless given")
    parser.add_argument("--tp", type=int, nargs="+", default=[2])
    parser.add_argument("--environments", type=Path, default=Path("build/foreign"), help="where packages are installed")
    parser.add_argument("--results", type=Path, help="a file of JSON lines, to continue from and to add to")
    parser.add_argument("--again", action="store_true", help="run what the results hold, too")
    parser.add_argument("--budget", type=float, default=float("inf"), help="start no model after so many seconds")
    parser.add_argument("--trained", type=Path, help="lines of `trained.py`, for a table behind the first")
    parser.add_argument("-o", "--output", type=Path, help="where the markdown table goes")
    given = parser.parse_args(argv)
    if unknown := set(given.groups) - set(GROUPS):
        parser.error(f"there is no group {', '.join(sorted(unknown))}: choose from {', '.join(GROUPS)}")
    results, start = read(given.results), time.monotonic()
    for group in given.groups or GROUPS:
        keys = [each.key for each in models_of(group)]
        todo = [key for key in keys if given.again or any((key, tp) not in results for tp in given.tp)]
        left = given.budget - (time.monotonic() - start)
        if not todo or left <= 0:
            continue
        for row in run(group, todo, given.tp, left, python_of(group, given.environments.absolute())):
            results[row["model"], row["tp"]] = row
            print(f"{row['model']:48} tp {row['tp']} {row['verdict']:9} {row.get('reason', '')[:100]}", flush=True)
            if given.results:
                with given.results.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(row) + "\n")
    if given.output:
        import torch
        import transformers

        degrees = " ".join(map(str, given.tp))
        command = (
            f"python -m benchmarks.models.foreign --tp {degrees} --results foreign.jsonl -o docs/models-foreign.md"
        )
        versions = f"with torch {torch.__version__.partition('+')[0]} and transformers {transformers.__version__}"
        known = [each.key for group in GROUPS for each in models_of(group)]
        text = table(list(results.values()), command, versions, known)
        if given.trained:
            text += trained_table([json.loads(line) for line in given.trained.read_text(encoding="utf-8").splitlines()])
        given.output.write_text(text, encoding="utf-8")
    return 1 if any(row["verdict"] == "WRONG" for row in results.values()) else 0


def run(group: str, keys: Sequence[str], degrees: Sequence[int], budget: float, python: Path) -> Iterator[Row]:
    """The rows of some models of a group, as they come."""
    command = [str(python), "-m", "benchmarks.models.foreign.judge", group, "--tp", *map(str, degrees)]
    command += ["--budget", str(budget), "--models", *keys]
    paths = [str(ROOT), str(ROOT / "src"), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
    with (
        tempfile.TemporaryFile("w+") as errors,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, env=environment, text=True) as judge,
    ):
        assert judge.stdout is not None
        yield from (json.loads(line) for line in judge.stdout if line.startswith("{"))
        if judge.wait():
            errors.seek(0)
            raise RuntimeError(f"the judge of {group} ended with {judge.returncode}: {errors.read()[-2000:]}")


if __name__ == "__main__":
    sys.exit(main())

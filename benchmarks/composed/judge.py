"""Hold the check against the truth on composed models, and write a table.

    python -m benchmarks.composed.judge --cases 300 -o table.md        # seeds 0 to 299
    python -m benchmarks.composed.judge --fast --cases 100             # plans of the fast styles
    python -m benchmarks.composed.judge --cases 40 --check-alone       # in a minute, without the proofs before a run
    python -m benchmarks.composed.judge --singles scores -v            # every step alone whose text holds `scores`

It exits with 1 where a bar of `BARS` is not kept.
"""

from __future__ import annotations

import argparse
import json
import logging
import multiprocessing
import sys
import time
import warnings
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.composed.compose import TP, Case, compose, singles
from benchmarks.composed.truth import DRAWS, Truth, on_two_ranks, worse
from colrow.checking.check import check
from colrow.mesh import Mesh
from colrow.run.decision import decide

MOST_DRAWS = 10
"""Of weights, for a case that is right and gets an error."""


@dataclass(frozen=True)
class Row:
    """A case, what it is, and what was said of it.

    Attributes:
        codes: of the findings that make it an error or unproven.
        accepted: whether a run would start; None where that was not asked, as of a model in evaluation mode.
        refusal: why not, where the check alone does not say so.
    """

    case: str
    suspect: str
    truth: Truth
    errors: tuple[str, ...]
    unproven: tuple[str, ...]
    accepted: bool | None
    refusal: str
    seconds: float

    @property
    def found(self) -> bool:
        """Whether check alone says something."""
        return bool(self.errors or self.unproven)


def ids_of(case: Case) -> Tensor:
    """The batch on which a case is judged."""
    sizes = case.made.sizes
    generator = torch.Generator().manual_seed(2)
    return torch.randint(0, sizes.vocabulary, (sizes.batch, sizes.tokens), generator=generator)


def judged(case: Case, truth: Truth, ask: bool = True) -> Row:
    """What the check says of a case, and whether a run would start (where the check alone does not refuse it)."""
    started = time.monotonic()
    shape = tuple(ids_of(case).shape)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = check(case.model(), case.plan(), Mesh(tp=TP), *shape)
        errors, unproven = (
            tuple(f"{f.code} {f.where}: {f.message}" for f in found if which(f))
            for which in (lambda f: f.severity == "error", lambda f: f.code == "CR414")
        )
        # a run trains in training mode: what is right in evaluation mode may be wrong there
        asks = ask and case.train and not errors
        decision = decide(case.model(), case.plan(), Mesh(tp=TP), *shape) if asks else None
    accepted = False if errors else decision.accepted if decision else None
    why = decision.refusal if decision else ""
    return Row(case.name, case.suspect, truth, errors, unproven, accepted, why, time.monotonic() - started)


@dataclass(frozen=True)
class Counts:
    """Of all rows; see `BARS`."""

    wrong: int
    wrong_found: int
    wrong_accepted: int
    right: int
    right_refused: int
    right_unproven: int
    right_not_accepted: int
    others: int

    @classmethod
    def of(cls, rows: Sequence[Row]) -> Counts:
        wrong = [row for row in rows if row.truth.verdict == "wrong"]
        right = [row for row in rows if row.truth.verdict == "right"]
        return cls(
            len(wrong),
            sum(row.found for row in wrong),
            sum(row.accepted is True for row in wrong),
            len(right),
            sum(bool(row.errors) for row in right),
            sum(bool(row.unproven) and not row.errors for row in right),
            sum(row.accepted is False for row in right),
            len(rows) - len(wrong) - len(right),
        )

    def failures(self, most_unproven: float) -> list[str]:
        """The bars that are not kept."""
        bars = {
            "a wrong plan is accepted": self.wrong_accepted == 0,
            "check finds less than 97% of the wrong plans": self.wrong_found >= 0.97 * self.wrong,
            "a right plan gets an error": self.right_refused == 0,
            f"more than {most_unproven:.0%} of the right plans are unproven": (
                self.right_unproven <= most_unproven * self.right
            ),
        }
        return [text for text, kept in bars.items() if not kept]


def most_unproven() -> float:
    """The share of right plans that may be unproven: older torch has fewer sharding rules."""
    return 0.08 if torch.__version__.startswith("2.11") else 0.03


def table(rows: Sequence[Row]) -> str:
    """Markdown: the counts, and each row that is not as it should be."""
    counts = Counts.of(rows)
    lines = [f"torch {torch.__version__}, tp {TP}, {len(rows)} cases", "", "| | |", "| --- | --- |"]
    lines += [f"| {name.replace('_', ' ')} | {number} |" for name, number in asdict(counts).items()]
    kinds = Counter(row.truth.verdict for row in rows)
    lines += ["", ", ".join(f"{number} {kind}" for kind, number in kinds.items()), ""]
    parts = {
        "wrong, and check says nothing": [r for r in rows if r.truth.verdict == "wrong" and not r.found],
        "wrong, and accepted": [r for r in rows if r.truth.verdict == "wrong" and r.accepted],
        "right, and an error": [r for r in rows if r.truth.verdict == "right" and r.errors],
        "right, and not accepted": [r for r in rows if r.truth.verdict == "right" and r.accepted is False],
        "right, and unproven": [r for r in rows if r.truth.verdict == "right" and r.unproven and not r.errors],
        "unclear or invalid": [r for r in rows if r.truth.verdict in ("unclear", "invalid")],
    }
    for title, found in parts.items():
        lines += [f"## {title}: {len(found)}", ""] if found else []
        for row in found:
            lines += [f"- {row.case}", f"  - {row.truth.error:.1e} {row.truth.where}"]
            lines += [
                f"  - {text}" for text in (*row.errors, *row.unproven, row.refusal.replace("\n", " "))[:3] if text
            ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=300, help="how many")
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--fast", action="store_true", help="plans of the fast styles")
    parser.add_argument("--singles", nargs="?", const="", help="steps alone, those whose text holds this")
    parser.add_argument("--every", type=int, default=1, help="of the steps alone, every n-th")
    parser.add_argument("--check-alone", action="store_true", help="do not ask whether a run would start")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("-o", "--output", type=Path, help="the table; on the screen unless given")
    parser.add_argument("--results", type=Path, help="a line of JSON for each case")
    options = parser.parse_args()
    logging.disable(logging.CRITICAL)
    torch.set_num_threads(1)
    if options.singles is None:
        cases = [compose(seed, fast=options.fast) for seed in range(options.first, options.first + options.cases)]
    else:
        cases = [case for case in singles() if options.singles in case.name][:: options.every]
    rows = judge(cases, options.workers, not options.check_alone)
    if options.results:
        options.results.write_text("".join(json.dumps(asdict(row)) + "\n" for row in rows), encoding="utf-8")
    text = table(rows)
    if options.output:
        options.output.write_text(text, encoding="utf-8")
    else:
        print(text)
    failures = Counts.of(rows).failures(most_unproven())
    print("\n".join(failures) or "every bar is kept")
    sys.exit(bool(failures))


def judge(cases: Sequence[Case], workers: int, decide: bool = True) -> list[Row]:
    """The rows of cases, by so many processes."""
    pairs = [(case, ids_of(case)) for case in cases]
    groups = max(1, workers // 2)
    # not a Pool, whose daemonic workers may not start the ranks of a proof
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), initializer=_quiet) as pool:
        with ThreadPoolExecutor(groups) as threads:
            found = list(threads.map(on_two_ranks, [pairs[i::groups] for i in range(groups)]))
        truths = {case.name: t for i in range(groups) for (case, _), t in zip(pairs[i::groups], found[i], strict=True)}
        asked = [pool.submit(judged, case, truths[case.name], decide) for case in cases]
        rows = [each.result() for each in asked]
    # An error says that there are numbers for which the plan is wrong: they are looked for among more weights.
    doubtful = [i for i, row in enumerate(rows) if row.truth.verdict == "right" and row.errors]
    if doubtful:
        again = on_two_ranks([pairs[i] for i in doubtful], range(DRAWS, MOST_DRAWS))
        for i, found in zip(doubtful, again, strict=True):
            rows[i] = replace(rows[i], truth=worse(rows[i].truth, found))
    return rows


def _quiet() -> None:
    logging.disable(logging.CRITICAL)
    torch.set_num_threads(1)


if __name__ == "__main__":
    main()

"""The table that a benchmark prints, and the JSON that it leaves."""

from __future__ import annotations

import json
import platform
import statistics
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from colrow.data.disk import write_result
from colrow.errors import ConfigError
from colrow.mesh import Mesh
from colrow.yaml_text import read_text

Result = dict[str, Any]


def environment() -> dict[str, Any]:
    """Hardware and software of a measurement."""
    cuda = torch.cuda.is_available()
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "commit": _commit(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "nccl": ".".join(map(str, torch.cuda.nccl.version())) if cuda else None,
        "device": torch.cuda.get_device_name() if cuda else f"CPU ({platform.machine()})",
        "devices": torch.cuda.device_count() if cuda else None,
        "python": platform.python_version(),
    }


def merged(rounds: list[list[Result]]) -> list[Result]:
    """One result for each arm: the median round by step time, with the step times of all rounds."""
    by_arm: dict[str, list[Result]] = {}
    for results in rounds:
        for result in results:
            by_arm.setdefault(result["arm"], []).append(result)
    out = []
    for results in by_arm.values():
        # median_low: a round that was measured, as its memory and its trace belong to its time
        middle = statistics.median_low([result["step_ms"] for result in results])
        chosen = next(result for result in results if result["step_ms"] == middle)
        out.append({**chosen, "rounds_step_ms": [result["step_ms"] for result in results]})
    return out


def table(results: list[Result]) -> Table:
    """Arms as rows; `×` compares with the first arm."""
    shown = Table(box=None, pad_edge=False, header_style="bold")
    for title in (
        "arm",
        "step",
        "tok/s/GPU",
        "×",
        "MFU causal/full",
        "of forecast",
        "GiB alloc/reserved/device",
        "exposed",
        "idle",
    ):
        shown.add_column(title, justify="left" if title == "arm" else "right", no_wrap=True)
    first = results[0]["tokens_per_second_per_gpu"] if results else 1.0
    for result in results:
        trace = result["trace"]
        shown.add_row(
            result["arm"],
            f"{result['step_ms']:.1f} ms",
            f"{result['tokens_per_second_per_gpu']:,.0f}",
            f"{result['tokens_per_second_per_gpu'] / first:.2f}",
            _in_one_cell(result, ("mfu_causal", "mfu_full"), lambda share: f"{share:.1%}"),
            f"{result['step_ms'] / result['forecast_ms']:.0%}" if result.get("forecast_ms") else "-",
            _in_one_cell(
                result, ("peak_allocated_gib", "peak_reserved_gib", "device_used_gib"), lambda gib: f"{gib:.1f}"
            ),
            "-" if trace["exposed"] is None or result["one_rank"] else f"{trace['exposed']:.1f} ms",
            "-" if trace["idle"] is None else f"{trace['idle']:.1f} ms",
        )
    return shown


def show(results: list[Result], environment: dict[str, Any], console: Console) -> None:
    """Print the table, the environment, and what each arm's profiled step consisted of."""
    if not results:
        return
    first = results[0]
    mesh = Mesh.model_validate(first["mesh"])
    console.print(
        f"{first['model']}, mesh {mesh}, seq {first['seq_len']}, micro-batch {first['micro_batch']}, "
        f"{first['tokens_per_step']:,} tokens a step"
    )
    if first["one_rank"]:
        console.print("one rank, nothing sent: a step with all communication hidden")
    console.print(
        f"{environment['device']}, torch {environment['torch']}, commit {environment['commit']}, {environment['date']}"
    )
    console.print(table(results))
    for result in results:
        trace = result["trace"]
        kinds = ", ".join(f"{kind} {ms:.0f}" for kind, ms in trace["kinds"].items())
        calls = ", ".join(f"{name} ×{n}" for name, n in {**trace["operators"], **trace["collectives"]}.items())
        launches = f", {trace['graph_launches']} launches" if result["cuda_graph"] else ""
        console.print(f"{result['arm']}: plan {result['plan']}, loss {result['loss']}, {result['compute']}")
        console.print(f"  ran {result['ran']}{launches}", highlight=False)
        if result["one_rank"] and (exposed := _with_exposed(result)) is not None:
            console.print(f"  with the collectives that the forecast says are exposed: {exposed:,.0f} tok/s/GPU")
        console.print(
            f"  {f'ms by kind: {kinds}; ' if kinds else ''}{calls or 'no calls of colrow operators'}", highlight=False
        )


def _with_exposed(result: Result) -> float | None:
    """Tokens/s per GPU with the collectives that the forecast says nothing hides; None without a forecast."""
    sent = result.get("forecast_exposed_ms")
    if sent is None:
        return None
    return float(result["tokens_per_second_per_gpu"] * result["step_ms"] / (result["step_ms"] + sent))


def read(path: Path) -> tuple[list[Result], dict[str, Any]]:
    """The results of a file, and what they were measured on.

    Raises:
        ConfigError: it is no file that `write` wrote.
    """
    try:
        tree = json.loads(read_text(path, "file", ConfigError))
        results, environment = tree["results"], dict(tree["environment"])
        for result in results:  # as `show_beside` prints it
            _line(result)
        return results, environment
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
        raise ConfigError(f"{path} holds no results of colrow bench ({error}): give a file of -o") from error


def _line(result: Result) -> str:
    work = f"{result.get('model')}, {Mesh.model_validate(result['mesh'])}, seq {result.get('seq_len')}"
    return f"  {result['arm']}: {result['tokens_per_second_per_gpu']:,.0f} tok/s/GPU ({work})"


def show_beside(path: Path, environment: dict[str, Any], console: Console) -> None:
    """Print the rates of an earlier file, and a warning where they cannot be compared with this call's."""
    results, earlier = read(path)
    console.print(f"\n{path}: {earlier.get('device')}, torch {earlier.get('torch')}, {earlier.get('date')}")
    for result in results:
        console.print(_line(result))
    for key, what in (("device", "card"), ("torch", "torch")):
        if earlier.get(key) != environment.get(key):
            console.print(
                f"warning: {path.name} is of another {what}, {earlier.get(key)}, and this call of "
                f"{environment.get(key)}: ratios between them say nothing about the code"
            )


def write(results: list[Result], rounds: list[list[Result]], environment: dict[str, Any], path: Path) -> None:
    """Write everything as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    tree = {"environment": environment, "results": results, "rounds": rounds if len(rounds) > 1 else []}
    write_result(path, json.dumps(tree, indent=1) + "\n")


def _in_one_cell(result: Result, keys: tuple[str, ...], form: Any) -> str:
    values = [result.get(key) for key in keys]
    return " / ".join("-" if value is None else form(value) for value in values)


def _commit() -> str | None:
    """The commit of this source tree; None when it is no git checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()

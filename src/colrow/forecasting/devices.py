"""What a GPU and its links can do: rates from a calibration, else from data sheets, which say less.

A table is the JSON that `colrow calibrate` writes. Those in `tables/` ship with colrow; `colrow forecast --table FILE`
takes another. A device without a table gets its data sheet's figures times what kernels usually reach of them.
"""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from importlib import resources
from itertools import pairwise
from math import exp, log
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter

from colrow.errors import ConfigError, did_you_mean
from colrow.yaml_text import read_text

T = TypeVar("T")
Points = tuple[tuple[float, float], ...]
"""(bytes that a rank sends, seconds), rising."""

PEAK_FLOPS = {"H100": 989e12, "H200": 989e12, "H800": 989e12, "GH200": 989e12, "A100": 312e12, "B200": 2250e12}
"""Dense bf16 FLOP/s by a substring of the GPU's name (data sheets of the SXM forms)."""


def peak_flops(device_name: str) -> float | None:
    """Dense bf16 FLOP/s of the GPU of this name; None when the table lacks it: then there is no MFU."""
    return of_device(PEAK_FLOPS, device_name)


def of_device(table: Mapping[str, T], device_name: str) -> T | None:
    """The entry whose key is in the GPU's name; None when there is none."""
    return next((entry for key, entry in table.items() if key in device_name), None)


@dataclass(frozen=True)
class Rates:
    """What a part of a step takes.

    Args:
        matmul: FLOP/s of large bf16 matmuls; matmul_fp8 of those in fp8, their rounding included.
        attention_forward, attention_backward: FLOP/s by the causal count.
        memory: bytes/s of pointwise operators run one by one; fused: of a compiled block's, by the bytes that enter and
            leave its chains (`work.Work.fused_bytes`), of which kernels read many twice; fused_fast: of fast styles;
            fused_chunked: of those that also sum and copy chunks; outside: of operators around compiled blocks, such
            as the loss; outside_linear: where it is computed by chunks with the head.
        optimizer: bytes/s of the update.
        kernel: seconds of the CPU for each kernel that a compiled block launches; kernel_fast, kernel_chunked: the same
            of fast styles and of those that send chunks, which run more Python; operator: for each eager operator;
            launch: for each kernel around compiled blocks, such as those of a loss by chunks; fsdp_unit: for each unit
            (a block, an end of the model) that FSDP2 gathers and reduces in a micro-batch.
        gap: seconds between two operators in which no kernel runs though the CPU is ahead, in CUDA graphs too.
        links: points by the number of ranks inside a host; network: between hosts, by the one card that a rank has.
        peer_copy: bytes/s that a GPU's copy engines read from its peers, or write to them; 0 where they cannot.
        overlap_slowdown: how much longer matmuls take while other streams copy.
    """

    matmul: float
    matmul_fp8: float
    attention_forward: float
    attention_backward: float
    memory: float
    fused: float
    fused_fast: float
    fused_chunked: float
    outside: float
    outside_linear: float
    optimizer: float
    kernel: float
    kernel_fast: float
    kernel_chunked: float
    operator: float
    links: Mapping[int, Points] = field(default_factory=dict)
    network: Points = ()
    peer_copy: float = 0.0
    overlap_slowdown: float = 0.025
    launch: float = 10e-6
    fsdp_unit: float = 1e-3
    gap: float = 2.5e-6


@dataclass(frozen=True)
class Device:
    """A GPU as the forecast knows it.

    Attributes:
        memory: bytes that the driver shows in total.
        band: half the width of the band around a step's time, as a share of it.
        source: where the rates are from.
    """

    name: str
    memory: float
    peak_flops: float
    rates: Rates
    band: float
    source: str


@dataclass(frozen=True)
class _Sheet:
    """A data sheet: GiB that the driver shows, dense bf16 FLOP/s, bytes/s of memory, of links in one direction, and of
    the network card that a GPU has to itself."""

    gib: float
    flops: float
    memory: float
    link: float
    network: float = 50e9


_SHEETS = {
    "h100-sxm": _Sheet(79.2, 989e12, 3.35e12, 450e9),
    "h100-pcie": _Sheet(79.2, 756e12, 2.0e12, 64e9),
    "h200": _Sheet(139.8, 989e12, 4.8e12, 450e9),
    "h800": _Sheet(79.2, 989e12, 3.35e12, 200e9),
    "b200": _Sheet(178.0, 2250e12, 8.0e12, 900e9),
    "a100-80gb": _Sheet(79.2, 312e12, 2.0e12, 300e9, 25e9),
    "a100-40gb": _Sheet(39.4, 312e12, 1.55e12, 300e9, 25e9),
    "l40s": _Sheet(44.5, 362e12, 0.86e12, 32e9, 25e9),
}
CPU = "cpu"
_NVLINK = 150e9  # bytes/s in one direction: less is PCIe, over which not every host's GPUs reach each other
UNCALIBRATED = 0.4
"""Half of the band around a device without a table."""


def device_named(name: str, table: Path | None = None) -> Device:
    """The device of `--gpu NAME`, with the rates of a table of its own, of a shipped one, or of its data sheet.

    Raises:
        ConfigError: no such device, or no table in the file.
    """
    if name not in _SHEETS:
        raise ConfigError(f"unknown GPU {name!r}{did_you_mean(name, _SHEETS)}")
    sheet = _SHEETS[name]
    if table is not None:
        try:
            device = _from_table(name, sheet, json.loads(read_text(table, "table", ConfigError)))
            return TypeAdapter(Device).validate_python(asdict(device))
        except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            command = shlex.join(["colrow", "calibrate", "-o", str(table)])
            raise ConfigError(f"{table} holds no table of rates: write one with `{command}`") from error
    shipped = resources.files("colrow.forecasting") / "tables" / f"{name}.json"
    if shipped.is_file():
        return _from_table(name, sheet, json.loads(shipped.read_text(encoding="utf-8")))
    return Device(name, sheet.gib * 2**30, sheet.flops, _rates_of(sheet), UNCALIBRATED, "data sheet, not calibrated")


def this_cpu() -> Device:
    """This host's CPU as one device, to compare micro-batches: rates of a few cores, and the memory that is free."""
    sheet = _Sheet(0.0, 2e11, 2e10, 2e9)
    memory = float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES"))
    return Device(CPU, memory, sheet.flops, replace(_rates_of(sheet), operator=20e-6), UNCALIBRATED, "no rates of CPUs")


def name_of(device_name: str) -> str | None:
    """`h100-sxm` of "NVIDIA H100 80GB HBM3"; None of a GPU without a data sheet here."""
    lowered = device_name.lower()
    if "h100" in lowered:
        return "h100-pcie" if "pcie" in lowered else "h100-sxm"
    if "a100" in lowered:
        return "a100-80gb" if "80" in lowered else "a100-40gb"
    return next((name for name in _SHEETS if name in lowered), None)


def _rates_of(sheet: _Sheet) -> Rates:
    """What kernels reach of a data sheet, as the fitted table of H200 has it; of the links 45%."""
    bus = 0.45 * sheet.link
    points = tuple((float(size), 20e-6 + size / bus) for size in (2**16, 2**20, 2**24, 2**27, 2**30))
    return Rates(
        matmul=0.79 * sheet.flops,
        matmul_fp8=1.25 * sheet.flops,
        attention_forward=0.64 * sheet.flops,
        attention_backward=0.53 * sheet.flops,
        memory=0.61 * sheet.memory,
        fused=0.62 * sheet.memory,
        fused_fast=0.33 * sheet.memory,
        fused_chunked=0.2 * sheet.memory,
        outside=0.7 * sheet.memory,
        outside_linear=0.25 * sheet.memory,
        optimizer=0.73 * sheet.memory,
        kernel=115e-6,
        kernel_fast=260e-6,
        kernel_chunked=310e-6,
        operator=110e-6,
        links=dict.fromkeys((2, 4, 8), points),
        peer_copy=0.7 * sheet.link if sheet.link >= _NVLINK else 0.0,
        network=tuple(
            (float(size), 40e-6 + size / (0.8 * sheet.network)) for size in (2**16, 2**20, 2**24, 2**27, 2**30)
        ),
    )


def _from_table(name: str, sheet: _Sheet, table: Mapping[str, Any]) -> Device:
    rates = _rates_of(sheet)
    numbers = {each.name for each in fields(Rates)} - {"links", "network"}
    known = {key: value for key, value in table["rates"].items() if key in numbers}
    rates = replace(rates, **known)
    if links := table["rates"].get("links"):
        rates = replace(rates, links={int(n): _points(points) for n, points in links.items()})
    if network := table["rates"].get("network"):
        rates = replace(rates, network=_points(network))
    return Device(name, table.get("memory", sheet.gib * 2**30), sheet.flops, rates, table["band"], table["source"])


def _points(given: Any) -> Points:
    return tuple((float(size), float(seconds)) for size, seconds in given)


def seconds_of(points: Points, nbytes: float) -> float:
    """Between two points along log bytes and log seconds; beyond the last one at its rate."""
    if nbytes <= 0 or not points:
        return 0.0
    if nbytes <= points[0][0]:
        return points[0][1]
    for (a, s), (b, t) in pairwise(points):
        if nbytes <= b:
            share = log(nbytes / a) / log(b / a)
            return exp(log(s) + share * log(t / s))
    size, seconds = points[-1]
    return seconds * nbytes / size

"""Triton, which is optional: the kernels beside this file are defined where it can be imported."""

from __future__ import annotations

from typing import Any

triton: Any
tl: Any
UNAVAILABLE: str
"""Why Triton cannot be imported; empty where it can."""
try:
    import triton  # type: ignore[no-redef, unused-ignore]
    import triton.language as tl  # type: ignore[no-redef, unused-ignore]

    UNAVAILABLE = ""
except ImportError as error:
    triton, tl, UNAVAILABLE = None, None, str(error)

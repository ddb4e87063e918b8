"""The bound of a step, beside figures that were worked out by hand for Llama 3 8B on four H200."""

from __future__ import annotations

import pytest

from colrow.bench.bound import bound
from colrow.mesh import Mesh
from colrow.models.shapes import shape

LLAMA = shape("llama3-8b")


@pytest.mark.parametrize(
    ("mesh", "tokens", "hidden", "exposed"),
    [
        (Mesh(tp=4), 16384, 345, 435),
        (Mesh(tp=4), 32768, 669, 849),
        (Mesh(dp_shard=2, tp=2), 32768, 669, 761),  # 8 x 32 + 4 collectives of 128 MiB, half of each over 190 GB/s
    ],
)
def test_llama_3_8b(mesh: Mesh, tokens: int, hidden: float, exposed: float) -> None:
    found = bound(LLAMA, mesh, 8192, tokens, "NVIDIA H200")
    assert found is not None
    assert found.hidden == pytest.approx(hidden, rel=0.02)
    assert found.exposed == pytest.approx(exposed, rel=0.02)


def test_what_it_does_not_know() -> None:
    assert bound(LLAMA, Mesh(tp=4), 8192, 16384, "Some GPU") is None
    assert bound(LLAMA, Mesh(pp=2, tp=2), 8192, 16384, "NVIDIA H200") is None
    found = bound(LLAMA, Mesh(tp=8), 8192, 16384, "NVIDIA H200")
    assert found is not None
    assert found.exposed is None
    alone = bound(LLAMA, Mesh(tp=1), 8192, 16384, "NVIDIA H200")
    assert alone is not None
    assert alone.exposed == alone.hidden

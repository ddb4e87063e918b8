"""The degrees of a mesh, before any process exists, and what each axis means to a rank."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

import colrow
from colrow.errors import ConfigError
from colrow.mesh import Mesh, MeshAxes
from colrow.torch_compat import fake_store


def test_degrees_that_do_not_multiply_name_those_that_do() -> None:
    with pytest.raises(ConfigError) as error:
        Mesh(pp=3, tp=2).require_world_size(8)
    text = str(error.value)
    assert "pp=3 × dp_replicate=1 × dp_shard=1 × tp=2 needs 6 ranks, but there are 8" in text
    assert "pp 4 × tp 2" in text
    assert "start 6 ranks" in text


@pytest.mark.parametrize(
    ("mesh", "local", "says"),
    [
        (Mesh(dp_shard=2, tp=8), 8, None),
        (Mesh(dp_shard=8, tp=2), 8, None),
        (Mesh(dp_shard=16), 6, None),
        (Mesh(tp=4), 8, None),  # one host holds them all
        (Mesh(dp_shard=2, tp=8), 4, "use tp=4"),
        (Mesh(dp_shard=4, tp=4), 6, "use tp=2"),
    ],
)
def test_tp_across_hosts_is_warned_of(mesh: Mesh, local: int, says: str | None) -> None:
    warning = mesh.warning_across_hosts(local)
    if says is None:
        assert warning is None
    else:
        assert warning is not None
        assert says in warning
        assert f"hosts of {local} ranks" in warning


MESH = Mesh(pp=2, dp_replicate=2, dp_shard=3, tp=2)


def axes_of(rank: int) -> dict[str, Any]:
    """What one of 24 ranks finds; a rank of its groups stands for each group."""
    dist.init_process_group("fake", store=fake_store(), rank=rank, world_size=MESH.world_size)
    try:
        axes = MeshAxes(MESH.build("cpu", MESH.world_size))
        return {
            "place": tuple(axes.rank(axis) for axis in ("pp", "dp_replicate", "dp_shard", "tp")),
            "data": axes.data_rank,
            "weight": axes.loss_weight,
            "norm": [dist.get_process_group_ranks(group) for group in axes.norm_groups()],
            "same": [dist.get_process_group_ranks(group) for group in axes.same_batch_groups()],
            "part": MeshAxes(MESH.build("cpu", MESH.world_size)["dp_shard", "tp"]).size("pp"),
        }
    finally:
        dist.destroy_process_group()


def test_what_a_rank_is_on_each_axis() -> None:
    found = axes_of(17)  # 1 * 12 + 0 * 6 + 2 * 2 + 1
    assert found["place"] == (1, 0, 2, 1)
    assert found["data"] == 2
    assert found["norm"] == [[5, 17], [13, 15, 17], [16, 17]]  # pp, dp_shard, tp
    assert found["same"] == [[5, 17], [16, 17]]
    assert found["part"] == 1


def test_batches_are_dealt_to_ranks_and_losses_counted_once() -> None:
    found = [axes_of(rank) for rank in range(MESH.world_size)]
    assert sorted({one["data"] for one in found}) == list(range(MESH.dp))
    for rank, one in enumerate(found):
        assert {found[other]["data"] for ranks in one["same"] for other in ranks} == {one["data"]}, rank
    counted = [(one["place"], one["weight"]) for one in found if one["weight"]]
    assert [weight for _, weight in counted] == [1 / MESH.dp] * MESH.dp
    assert all(place[0] == MESH.pp - 1 and place[3] == 0 for place, _ in counted)


def test_nothing_else_reads_a_mesh_by_position_or_compares_the_world_with_tp() -> None:
    package = Path(colrow.__file__).parent
    found = []
    for path in sorted(package.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if path != package / "mesh.py" and (_unpacks_a_mesh(node) or _compares_world_and_tp(node)):
                found.append(f"{path.relative_to(package)}:{node.lineno}")  # type: ignore[attr-defined]
    assert found == []


def _unpacks_a_mesh(node: ast.AST) -> bool:
    """`pp, _, _, tp = mesh.get_coordinate()` or `mesh.degrees[3]`."""
    reads = ("get_coordinate", "degrees")
    if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Tuple):
        return any(isinstance(inner, ast.Attribute) and inner.attr in reads for inner in ast.walk(node.value))
    if isinstance(node, ast.Subscript):
        return any(isinstance(inner, ast.Attribute) and inner.attr in reads for inner in ast.walk(node.value))
    return False


def _compares_world_and_tp(node: ast.AST) -> bool:
    if not isinstance(node, ast.Compare):
        return False
    names = {side.attr for side in (node.left, *node.comparators) if isinstance(side, ast.Attribute)}
    return {"world_size", "tp"} <= names

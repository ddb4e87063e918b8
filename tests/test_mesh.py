"""The degrees of a mesh, before any process exists."""

from __future__ import annotations

import pytest

from colrow.errors import ConfigError
from colrow.mesh import Mesh


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

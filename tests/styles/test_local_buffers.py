"""A batch norm over sharded channels: each rank normalises its own, and every rank keeps all running statistics."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from colrow.checking.check import check
from colrow.derive.derivation import derive
from colrow.mesh import Mesh
from colrow.styles import local_buffers
from colrow.styles.shards import ShardSpec
from colrow.verifying.verify import verify

IMAGES = (torch.randn(4, 3, 4, 4, generator=torch.Generator().manual_seed(0)),)


class Joined(nn.Module):
    """A batch norm of one convolution's channels, and one of two convolutions' side by side."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8)
        self.wide, self.narrow = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 4, 1)
        self.joint, self.out = nn.BatchNorm2d(12), nn.Conv2d(12, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.stem(x)))
        return self.out(F.relu(self.joint(torch.cat([self.wide(x), self.narrow(x)], 1))))


def test_running_statistics_are_those_of_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = Joined()
    found = derive(model, 2, inputs=IMAGES)
    plan = found.plan()
    assert found.modules["joint"]["shards"]["running_mean"] == {"dim": 0, "segments": [8, 4]}
    assert not list(check(model, plan, Mesh(tp=2), inputs=IMAGES))
    assert verify(model, plan, 2, inputs=IMAGES, backend="local").verdict == "proved"
    monkeypatch.setattr(local_buffers, "_BATCH_NORMS", ())
    report = verify(model, plan, 2, inputs=IMAGES, backend="local")
    assert report.verdict == "wrong"
    assert report.max_buffer_rel_err > 0.1


def test_rows_that_every_rank_holds_stand_once_in_the_buffer() -> None:
    """Of parts [4, 6, 2], of which all ranks hold the second."""
    spec = ShardSpec(0, (4, 6, 2), replicated=(1,))
    gathered = [row for rank in range(2) for row in spec.rows(2, rank)]
    places = local_buffers.places_of_rows(gathered)
    assert [gathered[place] for place in places] == [*range(12)]
    assert local_buffers.places_of_rows([*range(12)]) is None

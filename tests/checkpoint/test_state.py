"""What of a model a checkpoint keeps, and what is refused by name."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from colrow.checkpoint.distributed import Checkpoints
from colrow.errors import CheckpointError


class Counted(nn.Linear):
    """Has state that is in no parameter or buffer, as a tensor: it would be stored, and lost at loading."""

    calls = 0

    def get_extra_state(self) -> Tensor:
        return torch.tensor(self.calls)

    def set_extra_state(self, state: Tensor) -> None:
        self.calls = int(state)


def test_state_outside_of_parameters_and_buffers_is_refused(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(4, 4), Counted(4, 4))
    optimizer = torch.optim.AdamW(model.parameters())
    with pytest.raises(CheckpointError, match=r"^1 \(Counted\) has an extra state .*: register it as a buffer"):
        Checkpoints(tmp_path).save(1, model, optimizer, {})
    model[1].register_buffer("counted", torch.zeros(()))  # a control: a buffer is kept
    model[1].__class__ = nn.Linear
    Checkpoints(tmp_path).save(1, model, optimizer, {})

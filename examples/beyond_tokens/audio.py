"""A speech recogniser: convolutions over a spectrogram, a transformer, and CTC.

torchrun --nproc-per-node 2 examples/beyond_tokens/audio.py
"""

from __future__ import annotations

import loop
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

BANDS, WIDTH, HEADS, LETTERS, BATCH, FRAMES = 20, 32, 4, 28, 4, 48


class Recogniser(nn.Module):
    """A spectrogram [B, BANDS, FRAMES] to log-probabilities of letters [B, FRAMES / 2, LETTERS]; letter 0 is CTC's
    blank."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv1d(BANDS, WIDTH, kernel_size=3, padding=1)
        self.second = nn.Conv1d(WIDTH, WIDTH, kernel_size=3, stride=2, padding=1)
        self.blocks = nn.ModuleList(loop.Block(WIDTH, HEADS) for _ in range(2))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, LETTERS)

    def forward(self, spectrogram: Tensor) -> Tensor:
        x = F.gelu(self.second(F.gelu(self.first(spectrogram)))).transpose(1, 2)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def build() -> nn.Module:
    torch.manual_seed(0)
    return Recogniser()


def batch(step: int) -> loop.Batch:
    """Spectrograms, and 8 letters for each: a letter raises one band for a while."""
    generator = torch.Generator().manual_seed(step)
    letters = torch.randint(1, LETTERS, (BATCH, 8), generator=generator)
    bands = F.one_hot(letters % BANDS, BANDS).repeat_interleave(FRAMES // 8, dim=1).transpose(1, 2)
    return torch.randn(BATCH, BANDS, FRAMES, generator=generator) + 3 * bands, letters


def loss_of(model: nn.Module, given: loop.Batch) -> Tensor:
    spectrogram, letters = given
    scores = model(spectrogram).log_softmax(-1).transpose(0, 1)  # CTC wants time first
    frames = torch.full((BATCH,), scores.shape[0])
    return F.ctc_loss(scores, letters, frames, torch.full((BATCH,), letters.shape[1]))


def run(mesh: DeviceMesh, steps: int) -> list[float]:
    return loop.train(build(), batch, loss_of, batch(0)[:1], mesh, steps)


if __name__ == "__main__":
    loop.main(run)

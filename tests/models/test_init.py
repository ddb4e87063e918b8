"""Initial values depend on (seed, name) alone, and are what the literature starts from."""

from __future__ import annotations

import math

import pytest
import torch

from colrow.errors import ConfigError
from colrow.models.init import init_tensor
from colrow.models.shapes import shape

CONFIG = shape("article")  # whose weights start at the usual 0.02
Q = "layers.0.self_attn.q_proj.weight"


def test_same_name_and_seed_give_the_same_bits() -> None:
    torch.manual_seed(1)
    first = init_tensor(Q, (64, 32), 7, "cpu", CONFIG)
    torch.manual_seed(2)
    assert torch.equal(first, init_tensor(Q, (64, 32), 7, "cpu", CONFIG))


def test_another_name_or_seed_gives_other_values() -> None:
    first = init_tensor(Q, (64, 32), 7, "cpu", CONFIG)
    for name, seed in ((Q, 8), (Q.replace(".0.", ".1."), 7), (Q.replace("q_", "k_"), 7)):
        other = init_tensor(name, (64, 32), seed, "cpu", CONFIG)
        correlation = torch.corrcoef(torch.stack([first.flatten(), other.flatten()]))[0, 1]
        assert abs(correlation) < 0.1  # 2048 samples: one standard deviation is 0.022


def test_the_global_generator_is_left_alone() -> None:
    before = torch.get_rng_state()
    init_tensor(Q, (64, 32), 7, "cpu", CONFIG)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("box", [((0, 0), (300, 500)), ((17, 3), (1, 400)), ((299, 499), (1, 1)), ((40, 8), (256, 1))])
def test_a_part_is_a_slice_of_the_whole(box: tuple[tuple[int, int], tuple[int, int]]) -> None:
    (row, column), (rows, columns) = box
    whole = init_tensor(Q, (300, 500), 0, "cpu", CONFIG)
    part = init_tensor(Q, (300, 500), 0, "cpu", CONFIG, offset=(row, column), size=(rows, columns))
    assert torch.equal(part, whole[row : row + rows, column : column + columns])


def test_values_are_normal() -> None:
    x = init_tensor(Q, (1024, 1024), 0, "cpu", CONFIG) / 0.02
    assert abs(x.mean()) < 0.005
    assert x.std() == pytest.approx(1.0, abs=0.005)
    assert (x**4).mean() == pytest.approx(3.0, abs=0.05)
    for sigmas, share in ((1, 0.6827), (2, 0.9545), (3, 0.9973)):
        assert (x.abs() < sigmas).float().mean() == pytest.approx(share, abs=0.002)
    neighbours = torch.corrcoef(torch.stack([x.flatten()[:-1], x.flatten()[1:]]))[0, 1]
    below = torch.corrcoef(torch.stack([x[:-1].flatten(), x[1:].flatten()]))[0, 1]
    assert abs(neighbours) < 0.005
    assert abs(below) < 0.005


@pytest.mark.parametrize("name", ["self_attn.o_proj", "mlp.down_proj"])
def test_projections_into_the_residual_stream_are_smaller(name: str) -> None:
    x = init_tensor(f"layers.0.{name}.weight", (512, 512), 0, "cpu", CONFIG)
    assert x.std() == pytest.approx(0.02 / math.sqrt(2 * CONFIG.num_hidden_layers), rel=0.02)


def test_norms_are_one_and_biases_zero() -> None:
    assert init_tensor("layers.0.input_layernorm.weight", (8,), 0, "cpu", CONFIG).eq(1).all()
    assert init_tensor("layers.0.self_attn.q_norm.weight", (8,), 0, "cpu", CONFIG).eq(1).all()
    assert init_tensor("layers.0.self_attn.q_proj.bias", (8,), 0, "cpu", CONFIG).eq(0).all()


@pytest.mark.parametrize(("name", "size"), [("layers.0.mixer.A_log", (8,)), ("conv.weight", (4, 4, 3)), ("w", (4, 4))])
def test_a_parameter_without_a_rule_is_refused(name: str, size: tuple[int, ...]) -> None:
    with pytest.raises(ConfigError, match=f"no rule gives an initial value to {name}"):
        init_tensor(name, size, 0, "cpu", CONFIG)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_gives_the_same_numbers_to_rounding() -> None:
    cpu = init_tensor(Q, (512, 512), 0, "cpu", CONFIG)
    torch.testing.assert_close(init_tensor(Q, (512, 512), 0, "cuda", CONFIG).cpu(), cpu, rtol=1e-6, atol=0.0)

"""Folders that store a parameter as several tensors: a model of experts, read and written as transformers does."""

from __future__ import annotations

import itertools
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from benchmarks.models.tiny import classes, tiny
from colrow.checkpoint.conversions import Part, _regions, in_parts, parts_for, parts_in
from colrow.checkpoint.export import export
from colrow.checkpoint.huggingface import load_weights
from colrow.checkpoint.pieces import Piece
from colrow.checkpoint.stored_files import SINGLE
from colrow.errors import CheckpointError
from colrow.sharding.layout import Region

transformers = pytest.importorskip("transformers")
pytest.importorskip("transformers.conversion_mapping")
MOVED = {
    "mixtral": "model.layers.0.block_sparse_moe.experts.3.w2.weight",
    "qwen3_moe": "model.layers.0.mlp.experts.3.up_proj.weight",
}
"""What a folder calls one of the tensors that the model holds otherwise."""


def model_of(kind: str, seed: int) -> Any:
    model: Any = tiny(*classes(kind), num_hidden_layers=1).float()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for param in model.parameters():
            param.normal_(generator=generator)
    return model


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


@pytest.mark.parametrize("kind", MOVED)
def test_experts_come_in_and_go_out_under_the_names_of_transformers(kind: str, tmp_path: Path) -> None:
    model, other = model_of(kind, 1), model_of(kind, 2)
    model.save_pretrained(tmp_path / "theirs")
    assert MOVED[kind] in load_file(tmp_path / "theirs" / SINGLE)
    assert not same(model, other)
    load_weights(other, tmp_path / "theirs")
    assert same(model, other)
    export(other, tmp_path / "ours", model.config.to_dict())
    theirs, ours = (load_file(tmp_path / name / SINGLE) for name in ("theirs", "ours"))
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(theirs[name], ours[name]) for name in theirs)
    assert same(model, type(model).from_pretrained(tmp_path / "ours"))


def test_a_folder_in_the_model_s_own_names_is_read_too(tmp_path: Path) -> None:
    model, other = model_of("mixtral", 1), model_of("mixtral", 2)
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, tmp_path / SINGLE)
    load_weights(other, tmp_path)
    assert same(model, other)


def test_an_expert_that_is_missing_or_of_another_size_is_named(tmp_path: Path) -> None:
    model = model_of("mixtral", 1)
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / SINGLE)
    name = MOVED["mixtral"]
    save_file(tensors | {name: tensors[name][:, 1:].contiguous()}, tmp_path / SINGLE)
    with pytest.raises(CheckpointError, match=rf"other sizes: {name} is \[64, 127\], the model's \[64, 128\]"):
        load_weights(model, tmp_path)
    del tensors[name]
    save_file(tensors, tmp_path / SINGLE)
    with pytest.raises(CheckpointError, match=r"down_proj is made of 4 stored tensors \.experts\..*, and there are 3"):
        load_weights(model, tmp_path)


def test_what_is_no_arrangement_of_regions_says_what_to_do() -> None:
    from transformers.core_model_loading import Transpose, WeightConverter

    converter = WeightConverter("a.weight", "b.weight", operations=[Transpose(0, 1)])
    with pytest.raises(CheckpointError, match=r"Transpose of transformers .* save_original_format=False"):
        _regions("b.weight", (4, 6), [["a.weight"]], converter)


def test_other_models_are_stored_as_they_are() -> None:
    assert parts_in(nn.Linear(2, 3), {"weight": (3, 2)}, ["a"]) == {}
    assert parts_for(nn.Linear(2, 3), {"weight": (3, 2)}) == {}
    model = tiny(*classes("llama"), num_hidden_layers=1)
    assert parts_for(model, {name: tuple(p.shape) for name, p in model.named_parameters()}) == {}


def test_a_tied_weight_is_stored_as_the_model_says(tmp_path: Path) -> None:
    """Its first name here, the head's, is not the one that transformers stores."""
    model, other = (tiny(*classes("xlm-roberta"), num_hidden_layers=1).float() for _ in range(2))
    with torch.no_grad():
        for param in model.parameters():
            param.normal_()
    model.save_pretrained(tmp_path / "theirs")
    load_weights(other, tmp_path / "theirs")
    assert same(model, other)
    export(other, tmp_path / "ours", model.config.to_dict())
    assert load_file(tmp_path / "ours" / SINGLE).keys() == load_file(tmp_path / "theirs" / SINGLE).keys()
    assert same(model, type(model).from_pretrained(tmp_path / "ours"))


def cut(whole: Tensor, rng: random.Random) -> list[Piece]:
    """The tensor in boxes, as ranks of any mesh may hold it."""
    ends = [sorted({0, n, *(rng.randrange(n + 1) for _ in range(2))}) for n in whole.shape]
    boxes = [[]]  # type: ignore[var-annotated]
    for at in ends:
        boxes = [[*box, (a, b)] for box in boxes for a, b in itertools.pairwise(at)]
    return [
        Piece("w", tuple(whole.shape), region, whole[region.slices], True)
        for region in (Region(tuple(a for a, _ in box), tuple(b - a for a, b in box)) for box in boxes)
    ]


@pytest.mark.parametrize("seed", range(20))
def test_pieces_of_any_cut_are_the_stored_tensors(seed: int) -> None:
    rng = random.Random(seed)
    experts, f, d = 3, 4, 5
    whole = torch.randn(experts, 2 * f, d)
    parts = [
        Part(f"{e}.{half}", Region((e, half * f, 0), (1, f, d)), stacked=True)
        for e, half in itertools.product(range(experts), range(2))
    ]
    stored = {part.name: torch.full(part.shape, torch.nan) for part in parts}
    for piece in in_parts(cut(whole, rng), parts):
        assert piece.shape == (f, d)
        at = piece.region.slices
        assert stored[piece.name][at].isnan().all(), "a block of its own"
        stored[piece.name][at] = piece.data
    for e in range(experts):
        assert torch.equal(torch.cat([stored[f"{e}.0"], stored[f"{e}.1"]]), whole[e])


def test_what_is_read_into_a_piece_is_in_the_parameter() -> None:
    whole = torch.zeros(2, 4, 3)
    (piece,) = in_parts(
        [Piece("w", (2, 4, 3), Region((1, 1, 0), (1, 2, 3)), whole[1:, 1:3], True)],
        [Part("a", Region((1, 0, 0), (1, 2, 3)), True)],
    )
    assert (piece.region, tuple(piece.data.shape)) == (Region((1, 0), (1, 3)), (1, 3))
    piece.data.fill_(7.0)
    assert whole.sum() == 21
    assert (whole[1, 1] == 7).all()

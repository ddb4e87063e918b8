"""The tensors of a Hugging Face folder that make up a parameter, where they are not one and the same.

Models of transformers may hold in one parameter what their folders store in many: all experts' matrices are one stack,
with gate and up beside each other. Transformers says so in a list of transforms; here they become regions of the
parameter, so that a rank reads and writes its own shard and nothing else.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import astuple, dataclass, replace
from typing import Any

from torch import nn

from colrow.checkpoint.pieces import Piece
from colrow.errors import CheckpointError
from colrow.sharding.layout import Region


@dataclass(frozen=True)
class Part:
    """A stored tensor, and the region of the parameter that it is."""

    name: str
    region: Region
    stacked: bool = False
    """Whether the stored tensor lacks the region's first dim, which has extent 1."""

    @property
    def shape(self) -> tuple[int, ...]:
        return self.region.size[1:] if self.stacked else self.region.size

    def of(self, piece: Piece) -> Piece | None:
        """What this part and a piece of the parameter have in common, as a piece of the stored tensor."""
        starts, ends = [], []
        for a, n, b, m in zip(*astuple(self.region), *astuple(piece.region), strict=True):
            starts.append(max(a, b))
            ends.append(min(a + n, b + m))
        size = tuple(end - start for start, end in zip(starts, ends, strict=True))
        if any(extent <= 0 for extent in size):
            return None
        # views throughout: what is read into the new piece is in the parameter
        data = piece.data[_relative(starts, size, piece.region).slices]
        region = _relative(starts, size, self.region)
        if self.stacked:
            data, region = data[0], Region(region.offset[1:], region.size[1:])
        return replace(piece, name=self.name, shape=self.shape, region=region, data=data)


def in_parts(pieces: Sequence[Piece], parts: Sequence[Part]) -> list[Piece]:
    """Pieces of a parameter as pieces of the tensors that it is stored as."""
    return [found for piece in pieces for part in parts if (found := part.of(piece)) is not None]


def _relative(starts: Sequence[int], size: tuple[int, ...], frame: Region) -> Region:
    """The region from `starts`, counted from the beginning of the region `frame`."""
    return Region(tuple(start - first for start, first in zip(starts, frame.offset, strict=True)), size)


Shapes = dict[str, tuple[int, ...]]


def parts_in(model: nn.Module, shapes: Shapes, stored: Iterable[str]) -> dict[str, list[Part]]:
    """Which of a folder's tensors make up a model's, by the model's names, for models of transformers.

    Args:
        shapes: global shapes of the model's tensors that the folder does not have under the same name.
        stored: names in the folder.

    Raises:
        CheckpointError: one is stored in another way than as regions.
    """
    known = _Transforms.of(model)
    if known is None or not shapes:
        return {}
    groups: dict[str, dict[str | None, list[str]]] = {}
    for name in stored:
        target, pattern = known.forward(name, shapes)
        groups.setdefault(target, {}).setdefault(pattern, []).append(name)
    found = {}
    for name, shape in shapes.items():
        match groups.get(name):
            case None:
                pass
            case {None: [only]}:
                found[name] = [as_is(only, shape)]
            case by_pattern:
                converter = next(c for c in known.converters if set(c.source_patterns) & by_pattern.keys())
                names = [sorted(by_pattern.get(p, []), key=_by_numbers) for p in converter.source_patterns]
                found[name] = _regions(name, shape, names, converter)
    return found


def parts_for(model: nn.Module, shapes: Shapes) -> dict[str, list[Part]]:
    """The tensors that a folder stores for each of a model's, where transformers writes others than the model holds.
    What is not stored as regions is left out: transformers reads the model's own names too."""
    known = _Transforms.of(model)
    if known is None:
        return {}
    found = {}
    for name, shape in shapes.items():
        try:
            parts = known.backward(name, shape)
        except CheckpointError:
            continue
        # Renaming is not always invertible: only names that transformers would read back as this parameter are used.
        if parts != [as_is(name, shape)] and all(known.forward(part.name, shapes)[0] == name for part in parts):
            found[name] = parts
    return found


@dataclass(frozen=True)
class _Transforms:
    """What transformers does with the names of a folder: all renamings, then one converter at most."""

    prefix: str
    renamings: list[Any]
    converters: list[Any]

    @classmethod
    def of(cls, model: nn.Module) -> _Transforms | None:
        """None for a model of another library, or of a release whose parameters are what is stored."""
        try:
            from transformers import PreTrainedModel
            from transformers.conversion_mapping import get_model_conversion_mapping
            from transformers.core_model_loading import WeightConverter, WeightRenaming
        except ImportError:
            return None
        if not isinstance(model, PreTrainedModel):
            return None
        transforms = get_model_conversion_mapping(model, add_legacy=False)
        renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
        return cls(model.base_model_prefix, renamings, [t for t in transforms if isinstance(t, WeightConverter)])

    def forward(self, stored: str, shapes: Shapes) -> tuple[str, str | None]:
        """The model's name of a stored tensor, and the pattern of the converter that takes it."""
        from transformers.core_model_loading import rename_source_key  # the one that from_pretrained uses

        name, pattern = rename_source_key(stored, self.renamings, self.converters, self.prefix, shapes)
        return str(name), pattern

    def backward(self, name: str, shape: tuple[int, ...]) -> list[Part]:
        """The stored tensors of a parameter."""
        for converter in self.converters:
            reverse = converter.reverse_transform()
            stored, pattern = reverse.rename_source_key(name)
            if pattern is not None:
                # transformers writes the first pattern into the name: the other tensors have their own in its place
                names = [
                    self._renamed(stored.replace(reverse.target_patterns[0], p, 1)) for p in reverse.target_patterns
                ]
                each = shape[0] if _stacks(converter) else 1
                return _regions(
                    name, shape, [[n.replace("*", str(i), 1) for i in range(each)] for n in names], converter
                )
        return [as_is(self._renamed(name), shape)]

    def _renamed(self, name: str) -> str:
        for renaming in reversed(self.renamings):
            name = renaming.reverse_transform().rename_source_key(name)[0]
        return name


def as_is(name: str, shape: tuple[int, ...]) -> Part:
    """A parameter that is stored as the model holds it."""
    return Part(name, Region((0,) * len(shape), shape))


def _by_numbers(name: str) -> list[int | str]:
    """Experts in order: 2 before 10."""
    return [int(word) if word.isdigit() else word for word in name.split(".")]


def _stacks(converter: Any) -> bool:
    names = [type(operation).__name__ for operation in converter.operations]
    return names[:1] == ["MergeModulelist"] and converter.operations[0].dim == 0


def _regions(name: str, shape: tuple[int, ...], names: list[list[str]], converter: Any) -> list[Part]:
    """The converter's operations as regions: a stack of modules' tensors, tensors one after another, or both.

    `names` are stored, by the converter's patterns.
    """
    operations, patterns = [type(operation).__name__ for operation in converter.operations], converter.source_patterns
    stacked = _stacks(converter)
    # `each`: the shape of one stored tensor. A stack has extent 1 where the model's has one entry a module; of tensors
    # one after another each has its share of that dim.
    each = list(shape)
    if stacked:
        each[0] = 1
    along = converter.operations[-1].dim if operations[-1:] == ["Concatenate"] else None
    if along is not None:
        each[along] //= len(names)
    count = shape[0] if stacked else 1
    if wrong := next((pattern for pattern, n in zip(patterns, names, strict=True) if len(n) != count), None):
        there = len(names[patterns.index(wrong)])
        raise CheckpointError(
            f"{name} is made of {count} stored tensors {wrong}, and there {'is' if there == 1 else 'are'} {there}: "
            "fetch the folder again"
        )
    if operations[stacked:] not in ([], ["Concatenate"]):
        raise CheckpointError(
            f"{name} is stored as {', '.join(n[0] for n in names)}, which "
            f"{' and '.join(operations)} of transformers make into one, and that is no arrangement of regions: write a "
            "folder in the model's own names, with transformers: model.save_pretrained(DIR, save_original_format=False)"
        )
    parts = []
    for position, of_pattern in enumerate(names):
        for index, stored in enumerate(of_pattern):
            offset = [0] * len(shape)
            if along is not None:
                offset[along] = position * each[along]
            if stacked:
                offset[0] = index
            parts.append(Part(stored, Region(tuple(offset), tuple(each)), stacked))
    return parts

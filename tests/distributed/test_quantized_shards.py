"""`fsdp.gather_fp8`: weights are gathered in 8 bits, and every loss, gradient and parameter keeps its bits."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

from benchmarks.parity import step as parity
from benchmarks.parity.models import MODELS, SIZES, SmallModel
from benchmarks.parity.step import Trained, config_of, set_up, train
from colrow.config_sections import FsdpSection
from colrow.errors import ConfigError
from colrow.forecasting.memory import Setting, peak_memory, stages_of
from colrow.forecasting.traffic import traffic_of
from colrow.forecasting.walk import HEAD, ROOT, Cell, walk
from colrow.mesh import Mesh
from colrow.models.llama import Llama
from colrow.ops import float8_linear
from colrow.ops.execution_record import recorded
from colrow.parallel import flat_gather
from colrow.parallel.compile import compile_forward
from colrow.parallel.flat_weights import FlatWeights, check_data_engine
from colrow.parallel.quantized_shards import QuantizedShards
from colrow.plans.plan import Plan
from colrow.sharding.layout import local_tensor
from colrow.train.setup import Training
from helpers.flat_peers import flat, simulated_peers
from helpers.harness import Ranks
from helpers.variants import collected, params

pytestmark = pytest.mark.distributed
WIDE = replace(SIZES, hidden_size=64, intermediate_size=96, num_attention_heads=4, num_key_value_heads=2, head_dim=16)
STEPS = 2  # of two micro-batches on two data ranks, clipped


class Fp8Model(SmallModel):
    def model(self) -> nn.Module:
        """The first half of each matrix's rows, which the first ranks have, is larger: largest numbers differ."""
        model = super().model()
        with torch.no_grad():
            for name, param in model.named_parameters():
                if "proj" in name:
                    param[len(param) // 2 :] /= 8
        return model

    def plan_of(self) -> Plan:
        return super().plan_of().with_fp8("tensorwise")


MODEL = {"wide": Fp8Model(lambda: Llama(WIDE), loss="linear", preset="llama-fast")}

Counts = Counter[tuple[str, int]]
Case = tuple[Mesh, dict[str, Any], dict[str, Any]]
CASES: dict[int, dict[str, Case]] = {
    2: {
        "shard2": (flat(dp_shard=2), {}, {}),
        "bf16": (flat(dp_shard=2), {"precision": "bf16"}, {}),
        "selective": (flat(dp_shard=2), {"activation_checkpoint": "selective"}, {}),
        "full": (flat(dp_shard=2), {"activation_checkpoint": "full"}, {}),
        "compiled": (flat(dp_shard=2), {"compile": True}, {}),
        "compiled-full": (flat(dp_shard=2), {"compile": True, "activation_checkpoint": "full"}, {}),
        "stay-gathered": (flat(dp_shard=2), {}, {"reshard_after_forward": False}),
        "peers": (flat(dp_shard=2), {}, {"gather": "copy_engine"}),
    },
    4: {
        "tp2-shard2": (flat(dp_shard=2, tp=2), {}, {}),
        "tp2-shard2-bf16-full": (flat(dp_shard=2, tp=2), {"precision": "bf16", "activation_checkpoint": "full"}, {}),
        "replicate2-shard2": (flat(dp_replicate=2, dp_shard=2), {}, {}),
        "shard4": (flat(dp_shard=4), {"precision": "bf16"}, {}),
    },
}
KEPT = {"bf16", "full"}


@contextmanager
def prepared(device: str, mesh: Mesh, section: dict[str, Any], fsdp: dict[str, Any]) -> Iterator[Training]:
    config = config_of(mesh, fp8="tensorwise", **section).model_copy(update={"fsdp": FsdpSection(**fsdp)})
    with ExitStack() as stack:
        stack.enter_context(mock.patch.dict(MODELS, MODEL))
        stack.enter_context(mock.patch.object(parity, "config_of", return_value=config))
        if section.get("compile"):
            backend = partial(compile_forward, backend="aot_eager")
            stack.enter_context(mock.patch.object(parity.setup, "compile_forward", backend))
        if device == "cpu" and fsdp.get("gather") == "copy_engine":
            stack.enter_context(simulated_peers())
        yield set_up(device, "wide", mesh, **section)


def differences(got: Trained, want: Trained) -> list[str]:
    """What has other bits."""
    found = [f"loss {i}" for i, (a, b) in enumerate(zip(got.losses, want.losses, strict=True)) if a != b]
    pairs = [*zip(got.gradients, want.gradients, strict=True), (got.parameters, want.parameters)]
    for ours, theirs in pairs:
        assert ours.keys() == theirs.keys()
        for name, held in ours.items():
            equal = all(torch.equal(a, b) for (_, a), (_, b) in zip(held, theirs[name], strict=True))
            found += [] if equal else [name]
    return found


def compared(device: str, mesh: Mesh, section: dict[str, Any], fsdp: dict[str, Any]) -> list[str]:
    seen = []
    for gather_fp8 in (False, True):
        with prepared(device, mesh, section, {**fsdp, "gather_fp8": gather_fp8}) as training:
            seen.append(train(training, range(STEPS)))
        assert ("weights gathered in 8 bits" in recorded("data")) == gather_fp8
    return differences(seen[1], seen[0])


def sabotaged(device: str, what: str) -> int:
    """How many tensors have other bits, with a part left out."""
    left_out = {
        # each rank takes the scale of its own rows
        "maximum over ranks": mock.patch.object(QuantizedShards, "_largest_of_ranks", lambda _, peaks: peaks),
        # what stands in the weights' place is read, as code beside the matmuls would
        "numbers": mock.patch.object(float8_linear, "quantized_weight", _of_stand_ins),
        # shards of the first step serve the second
        "rounding": mock.patch.object(QuantizedShards, "quantize", _once),
    }
    with prepared(device, flat(dp_shard=2), {}, {"gather_fp8": False}) as training:
        want = train(training, range(STEPS))
    with left_out[what], prepared(device, flat(dp_shard=2), {}, {"gather_fp8": True}) as training:
        return len(differences(train(training, range(STEPS)), want))


def _of_stand_ins(quantized: list[Tensor], *, transposed: bool = False) -> Any:
    rows, columns = sum(w.shape[0] for w in quantized[:-1]), quantized[0].shape[1]
    shape = (columns, rows) if transposed else (rows, columns)
    return float8_linear.quantize([torch.full(shape, torch.nan, device=quantized[0].device)])


_QUANTIZE = QuantizedShards.quantize


def _once(shards: Any, units: Any) -> None:
    done = shards.__dict__.setdefault("done", set())
    _QUANTIZE(shards, [unit for unit in units if unit not in done])
    done.update(units)


def held_bytes(training: Training) -> int:
    """Of the memory of weights beside the optimizer's: shards and buffers."""
    weights = training.step.forward_backward.weights
    assert isinstance(weights, FlatWeights)
    params = [each for unit in weights._units for each in unit.params]
    tensors = [
        t
        for each in params
        for t in (each.copy, local_tensor(each.full), each.numbers, each.all_numbers)
        if t is not None
    ]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


def sent(device: str, degrees: dict[str, int]) -> dict[bool, tuple[Counts, int]]:
    """Kind and bytes of what a step sends for weights, in 16 and in 8 bits; and what they take."""
    found = {}
    gather_into, largest_of_ranks = flat_gather.gather_into, QuantizedShards._largest_of_ranks
    for gather_fp8 in (False, True):
        seen: Counts = Counter()

        def gather(outputs: list[Tensor], inputs: list[Tensor], group: Any, seen: Counts = seen) -> Any:
            seen["all_gather", sum(each.nbytes for each in outputs)] += 1
            return gather_into(outputs, inputs, group)

        def reduce(shards: QuantizedShards, peaks: Tensor, seen: Counts = seen) -> Tensor:
            seen["all_reduce", peaks.nbytes] += 1
            return largest_of_ranks(shards, peaks)

        with (
            mock.patch.object(flat_gather, "gather_into", gather),
            mock.patch.object(QuantizedShards, "_largest_of_ranks", reduce),
            prepared(device, flat(**degrees), {"precision": "bf16"}, {"gather_fp8": gather_fp8}) as training,
        ):
            train(training, [0])
            seen.clear()  # the first step gathers what later ones find
            train(training, [1])
            found[gather_fp8] = seen, held_bytes(training)
    return found


def forecast(degrees: dict[str, int], *, gather_fp8: bool) -> tuple[Counts, float]:
    """What a forecast says of the same."""
    mesh, plan = flat(**degrees), MODEL["wide"].plan_of()
    with torch.device("meta"):
        model = Llama(WIDE)
    walked = walk(model, plan, Cell(mesh.tp, 2, 8, compiled=False, dtype=torch.bfloat16, data_axes=mesh.tp == 1))
    setting = Setting(mesh, 2, copies=False, gather_fp8=gather_fp8)
    (stage,) = stages_of(walked, setting)
    flags = 4 * sum(len(walked.units[name].trained) for name in (ROOT, HEAD, *stage.layers))
    found = [each for each in traffic_of(walked, setting, stage) if each.axis == "dp_shard" and each.bytes != flags]
    counts = Counter({(each.kind, each.bytes): each.calls for each in found if each.kind != "all_to_all"})
    return counts, peak_memory(walked, setting).weights


OTHERS: dict[str, Any] = {
    "sent": partial(sent, degrees={"dp_shard": 2}),
    "sent, tp": partial(sent, degrees={"dp_shard": 2, "tp": 2}),
    **{f"without {what}": partial(sabotaged, what=what) for what in ("maximum over ranks", "numbers", "rounding")},
}


def run(device: str, world: int, names: list[str]) -> dict[str, Any]:
    return {
        name: compared(device, *CASES[world][name]) if name in CASES[world] else OTHERS[name](device) for name in names
    }


@pytest.fixture(scope="module")
def results(request: pytest.FixtureRequest, ranks: Ranks) -> Any:
    done: dict[int, list[dict[str, Any]]] = {}
    wanted = collected(request, "world", "name")

    def get(world: int, name: str) -> list[Any]:
        if world not in done:
            done[world] = ranks(world).run(run, world, [key for at, key in wanted if at == world])
            ranks(world).stop()
        return [rank[name] for rank in done[world]]

    return get


@pytest.mark.parametrize(
    ("world", "name"),
    params([(world, name) for world in CASES for name in CASES[world]], lambda _, name: name not in KEPT),
)
def test_gathers_of_8_bits_change_no_bit(results: Any, world: int, name: str) -> None:
    assert results(world, name) == [[]] * world


@pytest.mark.parametrize(
    ("world", "name"),
    params(
        [(2, name) for name in OTHERS if name.startswith("without ")],
        lambda _, name: name != "without maximum over ranks",
    ),
)
def test_a_part_left_out_is_seen(results: Any, world: int, name: str) -> None:
    assert min(results(world, name)) > 0


@pytest.mark.parametrize(("world", "name"), params([(2, "sent"), (4, "sent, tp")], lambda world, _: world == 4))
def test_what_is_sent_is_what_the_forecast_says(results: Any, world: int, name: str) -> None:
    degrees = OTHERS[name].keywords["degrees"]
    wanted = {gather_fp8: forecast(degrees, gather_fp8=gather_fp8) for gather_fp8 in (False, True)}
    for found in results(world, name):
        assert {way: counts for way, (counts, _) in found.items()} == {
            way: counts for way, (counts, _) in wanted.items()
        }
        for way, (_, held) in found.items():
            assert held == pytest.approx(wanted[way][1], rel=0.02), "ranges begin at multiples of 128"
    assert wanted[True][1] < 0.95 * wanted[False][1], "buffers are half as large; of three blocks, shards larger"
    # of a block's matrices half the bytes, and norms as before
    matrices = 64 * (64 + 2 * 32 + 64) + 3 * 64 * 96
    (low, high) = (max(nbytes for kind, nbytes in wanted[way][0] if kind == "all_gather") for way in (True, False))
    assert high - low == matrices // degrees.get("tp", 1)


@pytest.mark.parametrize(
    ("mesh", "section", "fsdp", "words"),
    [
        (flat(dp_shard=2), {}, {}, r"set train\.fp8 to tensorwise"),
        (Mesh(dp_shard=2), {"fp8": "tensorwise"}, {}, r"set mesh\.data_engine to flat"),
        (flat(dp_replicate=2), {"fp8": "tensorwise"}, {}, r"set fsdp\.gather_fp8 to false"),
        (flat(dp_shard=2), {"fp8": "tensorwise"}, {"keep_shards": False}, r"set fsdp\.keep_shards to true"),
    ],
)
def test_where_nothing_is_gathered_in_8_bits_it_is_refused(mesh: Mesh, section: Any, fsdp: Any, words: str) -> None:
    config = config_of(mesh, **section).model_copy(update={"fsdp": FsdpSection(gather_fp8=True, **fsdp)})
    with pytest.raises(ConfigError, match=words):
        check_data_engine(config)


def without_fp8(device: str) -> str:
    plain = {"wide": SmallModel(lambda: Llama(WIDE), loss="linear", preset="llama-fast")}
    with mock.patch.dict(MODEL, plain), pytest.raises(ConfigError) as error:
        with prepared(device, flat(dp_shard=2), {}, {"gather_fp8": True}):
            pass
    return str(error.value)


@pytest.mark.exhaustive
def test_a_plan_that_multiplies_nothing_in_8_bits_is_refused(ranks: Ranks) -> None:
    assert all("the plan has none" in text for text in ranks(2).run(without_fp8))

"""`mesh.data_engine: flat` trains as one process does, and as FSDP2; what it cannot do it refuses."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from benchmarks.parity import step as parity
from benchmarks.parity.models import MODELS, SIZES, D, Model, SmallModel
from benchmarks.parity.step import STEPS, config_of, on_ranks, set_up, train
from colrow.checkpoint.distributed import Checkpoints
from colrow.config_sections import FsdpSection
from colrow.errors import ConfigError
from colrow.mesh import Mesh
from colrow.models.llama import Llama
from colrow.ops.kernels.slot_sum import add_received
from colrow.parallel import flat_gather, flat_unit
from colrow.parallel.compile import compile_forward
from colrow.parallel.flat_unit import FlatUnit
from colrow.parallel.flat_weights import FlatWeights, check_data_engine
from colrow.train.setup import Training
from helpers.flat_graphs import CASES as GRAPHED
from helpers.flat_graphs import apart_when_replayed
from helpers.flat_peers import by_peers, exchanged_by_peers, flat
from helpers.harness import Ranks
from helpers.variants import collected, params

TOLERANCE = 1e-10
pytestmark = pytest.mark.distributed

_SEGMENTS = [D // 2, D, D // 2]


def frozen() -> Llama:
    """The embedding, a block, and in each block a matrix are not trained."""
    model = Llama(SIZES)
    for name, param in model.named_parameters():
        param.requires_grad_(not name.startswith(("embed", "layers.0.")) and "o_proj" not in name)
    return model


FURTHER = {
    "llama-fast": SmallModel(lambda: Llama(SIZES), loss="linear", preset="llama-fast"),
    "frozen": SmallModel(frozen, loss="vocab_parallel", preset="llama"),
    "packed": SmallModel(
        Model,
        {
            "layers.*.mlp.up": {"style": "packed_colwise", "segments": _SEGMENTS},
            "layers.*.mlp.down": {"style": "packed_rowwise", "segments": _SEGMENTS},
        },
    ),
}


Case = tuple[str, Mesh, dict[str, Any]]
CASES: dict[int, dict[str, Case]] = {
    2: {
        "shard2": ("llama", flat(dp_shard=2), {}),
        "replicate2": ("llama", flat(dp_replicate=2), {}),
        "shard2-tied-odd": ("llama, tied, odd vocabulary", flat(dp_shard=2), {}),
        "shard2-sparse": ("sparse", flat(dp_shard=2), {}),
        "replicate2-hard": ("hard", flat(dp_replicate=2), {}),
        "shard2-drop": ("layer drop", flat(dp_shard=2), {}),
        "replicate2-exit": ("early exit", flat(dp_replicate=2), {}),
        "shard2-auxiliary": ("sparse, auxiliary loss", flat(dp_shard=2), {}),
        "shard2-batch-norm": ("batch norm", flat(dp_shard=2), {}),
        "shard2-dropout": ("dropout", flat(dp_shard=2), {}),
        "shard2-frozen": ("frozen", flat(dp_shard=2), {}),
        "shard2-full": ("llama", flat(dp_shard=2), {"activation_checkpoint": "full"}),
        "shard2-selective": ("llama", flat(dp_shard=2), {"activation_checkpoint": "selective"}),
        "shard2-compiled": ("llama", flat(dp_shard=2), {"compile": True}),
        "shard2-compiled-full": ("llama", flat(dp_shard=2), {"compile": True, "activation_checkpoint": "full"}),
        "shard2-fast": ("llama-fast", flat(dp_shard=2), {}),
        "shard2-fast-full": ("llama-fast", flat(dp_shard=2), {"activation_checkpoint": "full"}),
        "shard2-fast-selective": ("llama-fast", flat(dp_shard=2), {"activation_checkpoint": "selective"}),
        "shard2-fast-compiled": ("llama-fast", flat(dp_shard=2), {"compile": True}),
        "shard2-fast-fsdp2": ("llama-fast", Mesh(dp_shard=2), {}),
        "replicate2-fast": ("llama-fast", flat(dp_replicate=2), {}),
        "shard2-skip": ("llama", flat(dp_shard=2), {"on_nonfinite": "skip"}),
    },
    4: {
        "tp2-shard2": ("llama", flat(dp_shard=2, tp=2), {}),
        "replicate2-shard2": ("llama", flat(dp_replicate=2, dp_shard=2), {}),
        "tp2-replicate2": ("llama", flat(dp_replicate=2, tp=2), {}),
        "shard4-fast": ("llama-fast", flat(dp_shard=4), {}),
        "replicate2-shard2-fast-fsdp2": ("llama-fast", Mesh(dp_replicate=2, dp_shard=2), {}),
        "shard4": ("llama", flat(dp_shard=4), {}),
        "tp2-shard2-fast": ("llama-fast", flat(dp_shard=2, tp=2), {}),
        "tp2-shard2-tied-odd": ("llama, tied, odd vocabulary", flat(dp_shard=2, tp=2), {}),
        "tp2-shard2-packed": ("packed", flat(dp_shard=2, tp=2), {}),
        "tp2-shard2-frozen": ("frozen", flat(dp_shard=2, tp=2), {}),
        "tp2-shard2-full": ("llama", flat(dp_shard=2, tp=2), {"activation_checkpoint": "full"}),
        "tp2-shard2-compiled": ("llama-fast", flat(dp_shard=2, tp=2), {"compile": True}),
        "shard4-hard": ("hard", flat(dp_shard=4), {}),
        "tp2-replicate2-hard": ("hard", flat(dp_replicate=2, tp=2), {}),
        "replicate2-shard2-drop": ("layer drop", flat(dp_replicate=2, dp_shard=2), {}),
        "tp2-shard2-sparse": ("sparse", flat(dp_shard=2, tp=2), {}),
        "tp2-shard2-bare": ("bare matrices", flat(dp_shard=2, tp=2), {}),
        "tp2-shard2-bare-full": ("bare matrices", flat(dp_shard=2, tp=2), {"activation_checkpoint": "full"}),
        "tp2-shard2-bare-compiled": ("bare matrices", flat(dp_shard=2, tp=2), {"compile": True}),
        "tp2-shard2-bare-fsdp2-compiled": ("bare matrices", Mesh(dp_shard=2, tp=2), {"compile": True}),
        "pp2-tp2-bare": ("bare matrices", Mesh(pp=2, tp=2), {}),
        "pp2-tp2-bare-compiled": ("bare matrices", Mesh(pp=2, tp=2), {"compile": True}),
    },
}
KEPT = {"shard2"}
RESUMED = {"tp2-shard2-fast", "replicate2-shard2"}

Seen = tuple[float, float]
"""The largest errors against one process, and of a run that was continued."""
Results = Callable[[int, str], list[Any]]


def errors_of(device: str, name: str, mesh: Mesh, section: dict[str, Any], folder: Path | None) -> Seen:
    with mock.patch.dict(MODELS, FURTHER):
        compiled = mock.patch.object(parity.setup, "compile_forward", partial(compile_forward, backend="aot_eager"))
        with compiled if section.get("compile") else ExitStack():
            errors = on_ranks(device, name, mesh, folder, **section)
    return errors.worst, errors.resumed


@contextmanager
def counted() -> Iterator[Counter[str]]:
    """The collectives of the engine, by name."""
    found: Counter[str] = Counter()

    def watched(name: str, function: Any) -> Any:
        def run(*args: Any, **kwargs: Any) -> Any:
            found[name] += 1
            return function(*args, **kwargs)

        return run

    with ExitStack() as stack:
        for owner, name in ((flat_gather, "gather_into"), (dist, "batch_isend_irecv")):
            stack.enter_context(mock.patch.object(owner, name, watched(name, getattr(owner, name))))
        yield found


def set_up_with(device: str, fsdp: FsdpSection) -> Training:
    """llama, of three blocks, a root and a head, on two shards."""
    mesh = flat(dp_shard=2)
    with mock.patch.object(parity, "config_of", return_value=config_of(mesh).model_copy(update={"fsdp": fsdp})):
        return set_up(device, "llama", mesh)


def collectives(device: str, reshard: bool | None) -> dict[str, int]:
    """Of one step of two micro-batches on two ranks."""
    training = set_up_with(device, FsdpSection(reshard_after_forward=reshard))
    assert isinstance(training.step.forward_backward.weights, FlatWeights)
    with counted() as found:
        train(training, [0])
    return dict(found)


def continued(device: str, folder: Path) -> float:
    """A run of FSDP2 that the flat engine continues, and the reverse, beside one that goes on."""
    worst = 0.0
    for first, second in ((Mesh(dp_shard=2), flat(dp_shard=2)), (flat(dp_shard=2), Mesh(dp_shard=2))):
        saved, resumed = set_up(device, "llama", first), set_up(device, "llama", second)
        want = train(saved, range(STEPS), folder / first.data_engine)
        Checkpoints(folder / first.data_engine, mesh=second).load(STEPS // 2, resumed.modules, resumed.optimizer)
        got = train(resumed, range(STEPS // 2, STEPS))
        for name, held in want.parameters.items():
            assert [where for where, _ in held] == [where for where, _ in got.parameters[name]]
            worst = max(
                [
                    worst,
                    *((a - b).abs().max().item() for (_, a), (_, b) in zip(held, got.parameters[name], strict=True)),
                ]
            )
    return worst


def low_precision(device: str) -> dict[str, float]:
    """bf16 compute: gradients of the first step, flat beside FSDP2; parameters of equal meshes and placements."""
    trainings = [set_up(device, "llama", mesh, precision="bf16") for mesh in (Mesh(dp_shard=2), flat(dp_shard=2))]
    named = [dict(training.modules[0].named_parameters()) for training in trainings]
    assert named[0].keys() == named[1].keys()
    for ours, theirs in zip(named[1].values(), named[0].values(), strict=True):
        assert isinstance(ours, DTensor)
        assert isinstance(theirs, DTensor)
        assert (ours.placements, ours.device_mesh) == (theirs.placements, theirs.device_mesh)
        assert (ours.shape, ours.stride()) == (theirs.shape, theirs.stride())
    found = [train(training, [0]) for training in trainings]
    apart = {}
    for name, held in found[0].gradients[0].items():
        for (_, a), (_, b) in zip(held, found[1].gradients[0][name], strict=True):
            assert a.dtype == b.dtype == torch.float32
            apart[name] = ((a - b).abs().max() / a.abs().max()).item() if a.numel() else 0.0
    return apart


def cast_for_each_gather(device: str) -> float:
    """Parameters after some steps without shards in the compute dtype, beside a run that keeps them."""
    kept, cast = (train(set_up_with(device, FsdpSection(keep_shards=keep)), range(3)) for keep in (True, False))
    pairs = [
        (a, b)
        for name, held in kept.parameters.items()
        for (_, a), (_, b) in zip(held, cast.parameters[name], strict=True)
    ]
    return max((a - b).abs().max().item() for a, b in pairs if a.numel())


def evaluated(device: str) -> float:
    """A loss without gradients between steps, beside FSDP2's, and that steps go on from the same state."""
    losses = []
    for mesh in (Mesh(dp_shard=2), flat(dp_shard=2)):
        training = set_up(device, "llama", mesh)
        batches = [(ids.to(device), y.to(device)) for ids, y in parity.micro_batches(7)[:2]]
        values = []
        for number in range(2):
            train(training, [number])
            values.append(training.step.forward_backward.evaluate(batches).item())
        losses.append(values)
    return max(abs(a / b - 1) for a, b in zip(*losses, strict=True))


def sabotaged(device: str, what: str) -> float:
    """The largest error, with a part left out."""
    squares = FlatUnit.squares
    gather = FlatUnit.gather

    def only_in_forward(unit: FlatUnit) -> None:
        if unit.buffer.holds is None or not torch._C._current_graph_task_id() >= 0:
            gather(unit)
        else:
            unit.buffer.holds = unit

    def without_others(own: Any, received: Any, total: Any, scale: float, **options: Any) -> None:
        total.copy_(own)

    def unscaled(own: Any, received: Any, total: Any, scale: float, **options: Any) -> None:
        add_received(own, received, total, 1.0, **options)

    left_out = {
        "exchange": mock.patch.object(flat_unit, "add_received", without_others),
        "gather in backward": mock.patch.object(FlatUnit, "gather", only_in_forward),
        "average": mock.patch.object(flat_unit, "add_received", unscaled),
        "norm": mock.patch.object(FlatUnit, "squares", lambda unit: {p: 2 * x for p, x in squares(unit).items()}),
    }
    with left_out[what]:
        return on_ranks(device, "llama", flat(dp_shard=2), steps=STEPS if what == "norm" else 1).worst


def refused(device: str) -> list[str]:
    """The texts of what a step refuses."""
    texts = []
    training = set_up(device, "plain", flat(dp_shard=2))
    model: Any = training.modules[0]
    first, second, *_ = model.layers
    second.register_forward_hook(lambda module, args, output: first(output))
    try:
        train(training, [0])
    except ConfigError as error:
        texts.append(str(error))

    training = set_up(device, "plain", flat(dp_shard=2))
    model = training.modules[0]
    kept: list[Any] = []
    model.layers[0].mlp.register_forward_hook(lambda module, args, output: kept.append(output.square().mean()))
    model.register_forward_hook(lambda module, args, output: output + 0 * output + kept.pop())
    for block in model.layers[1:]:
        block.register_forward_hook(lambda module, args, output: output.detach().requires_grad_())
    try:
        train(training, [0])
    except ConfigError as error:
        texts.append(str(error))
    return texts


def run(device: str, world: int, names: list[str], folder: Path) -> dict[str, Any]:
    """The cases of `world` ranks."""
    found: dict[str, Any] = {}
    for name in names:
        if name in CASES[world]:
            model, mesh, section = CASES[world][name]
            found[name] = errors_of(device, model, mesh, section, folder / name if name in RESUMED else None)
        else:
            function, *args = OTHERS[name]
            found[name] = function(device, *[folder / name if arg is Path else arg for arg in args])
    return found


OTHERS: dict[str, tuple[Any, ...]] = {
    "collectives": (collectives, None),
    "collectives kept": (collectives, False),
    "cast": (cast_for_each_gather,),
    "continued": (continued, Path),
    "bf16": (low_precision,),
    "evaluated": (evaluated,),
    "refused": (refused,),
    "replayed": (apart_when_replayed, GRAPHED[2]["shard2"]),
    "without restore": (apart_when_replayed, GRAPHED[2]["without restore"]),
    "peers": (partial(by_peers, barriers=True), {"dp_shard": 2}),
    "without barriers": (partial(by_peers, barriers=False), {"dp_shard": 2}),
    "peers exchange": (exchanged_by_peers, {"dp_shard": 2}, Path),
    "four peers exchange": (exchanged_by_peers, {"dp_shard": 4}, Path),
    "without copies": (partial(exchanged_by_peers, left_out="copy"), {"dp_shard": 2}, Path),
    **{f"without {what}": (sabotaged, what) for what in ("exchange", "gather in backward", "average", "norm")},
}
LONGER = {
    "without norm",
    "cast",
    "continued",
    "without barriers",
    "collectives kept",
    "evaluated",
    "without average",
    "without exchange",
    "without copies",
}


@pytest.fixture(scope="module")
def results(request: pytest.FixtureRequest, ranks: Ranks, tmp_path_factory: pytest.TempPathFactory) -> Results:
    done: dict[int, list[dict[str, Any]]] = {}
    wanted = collected(request, "world", "name")

    def get(world: int, name: str) -> list[Any]:
        if world not in done:
            names = [key for at, key in wanted if at == world]
            done[world] = ranks(world).run(run, world, names, tmp_path_factory.mktemp("saved"))
            ranks(world).stop()
        return [rank[name] for rank in done[world]]

    return get


def pairs(names: Any) -> list[Any]:
    found = [(world, name) for world in CASES for name in CASES[world]] if names is CASES else [(2, n) for n in names]
    return params(found, lambda _, name: name not in KEPT if names is CASES else name in LONGER)


@pytest.mark.parametrize(("world", "name"), pairs(CASES))
def test_steps_equal_one_process(results: Results, world: int, name: str) -> None:
    for worst, resumed in results(world, name):
        assert worst < TOLERANCE
        assert resumed == 0


@pytest.mark.parametrize(("world", "name"), pairs(["collectives", "collectives kept"]))
def test_collectives_are_as_few_as_units(results: Results, world: int, name: str) -> None:
    for found in results(world, name):
        # two micro-batches; backward has two of three blocks in their buffers still, the next forward the first two
        gathers = 5 if name.endswith("kept") else (5 + 1) + (1 + 1)
        # the update starts the next step's first three
        assert found == {"gather_into": gathers + 3, "batch_isend_irecv": 2 * 5}


@pytest.mark.parametrize(("world", "name"), pairs(["continued"]))
def test_each_engine_continues_the_others_run(results: Results, world: int, name: str) -> None:
    assert max(results(world, name)) < TOLERANCE


@pytest.mark.parametrize(("world", "name"), pairs(["peers"]))
def test_copy_engines_gather_what_collectives_do(results: Results, world: int, name: str) -> None:
    assert max(results(world, name)) < TOLERANCE


@pytest.mark.parametrize(
    ("world", "name"), [*pairs(["peers exchange"]), *params([(4, "four peers exchange")], lambda *_: True)]
)
def test_copy_engines_exchange_what_collectives_do(results: Results, world: int, name: str) -> None:
    assert max(results(world, name)) < TOLERANCE


@pytest.mark.parametrize(("world", "name"), pairs(["cast"]))
def test_shards_that_are_not_kept_are_cast(results: Results, world: int, name: str) -> None:
    assert max(results(world, name)) < TOLERANCE


@pytest.mark.parametrize(("world", "name"), pairs(["evaluated"]))
def test_evaluation_sees_the_weights_of_now(results: Results, world: int, name: str) -> None:
    assert max(results(world, name)) < TOLERANCE


@pytest.mark.parametrize(("world", "name"), pairs(["replayed"]))
def test_a_replayed_step_has_the_bits_of_an_eager_one(results: Results, world: int, name: str) -> None:
    assert max(results(world, name)) == 0.0


@pytest.mark.parametrize(("world", "name"), pairs(["bf16"]))
def test_low_precision_terms_are_summed_in_fp32(results: Results, ranks: Ranks, world: int, name: str) -> None:
    tolerance = 1e-6 if ranks.device == "cpu" else 2e-2  # GPUs' attention adds in any order, and rounds to bf16
    for apart in results(world, name):
        assert max(apart.values()) < tolerance, apart


@pytest.mark.parametrize(("world", "name"), pairs([name for name in OTHERS if name.startswith("without ")]))
def test_a_part_left_out_is_seen(results: Results, ranks: Ranks, world: int, name: str) -> None:
    if ranks.device == "cuda" and name in ("without barriers", "without copies"):
        pytest.skip("memory that shows what was there at the last barrier is simulated on CPUs")
    assert max(results(world, name)) > (1e-5 if name == "without norm" else 0.01)  # AdamW forgives a wrong scale


@pytest.mark.parametrize(("world", "name"), pairs(["refused"]))
def test_an_order_that_it_does_not_know_is_refused(results: Results, world: int, name: str) -> None:
    for texts in results(world, name):
        assert "runs twice in a forward" in texts[0]
        assert "not from its output" in texts[1]
        assert all("mesh.data_engine: fsdp2" in text for text in texts)


def test_what_the_engine_has_not_is_refused_by_name() -> None:
    for mesh, section, words in (
        (flat(pp=2, dp_shard=2), {}, "mesh.pp is 2"),
        (flat(dp_shard=2), {"replay_every": 5}, "train.replay_every"),
    ):
        with pytest.raises(ConfigError, match=words) as error:
            check_data_engine(config_of(mesh, **section))
        assert "mesh.data_engine to fsdp2" in str(error.value)
    alone = config_of(Mesh(dp_shard=2)).model_copy(update={"fsdp": FsdpSection(gather="copy_engine")})
    with pytest.raises(ConfigError, match=r"set mesh\.data_engine to flat"):
        check_data_engine(alone)
    unkept = config_of(flat(dp_shard=2)).model_copy(
        update={"fsdp": FsdpSection(gather="copy_engine", keep_shards=False)}
    )
    with pytest.raises(ConfigError, match=r"set fsdp\.keep_shards to true"):
        check_data_engine(unkept)
    check_data_engine(config_of(Mesh(pp=2, dp_shard=2)))
    check_data_engine(config_of(flat(tp=2), replay_every=5))
    assert not flat(tp=2).is_flat

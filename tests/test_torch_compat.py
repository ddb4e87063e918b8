"""Every wrapper of a private name of torch, called: what fails here says what a release of torch has moved."""

from __future__ import annotations

import pickle
import time
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.overrides import TorchFunctionMode

from colrow import torch_compat as tc
from colrow.sharding.packed_shard import PackedShard


@pytest.fixture
def mesh() -> Iterator[DeviceMesh]:
    """Two ranks, of which only the first exists."""
    dist.init_process_group("fake", store=tc.fake_store(), rank=0, world_size=2)
    yield init_device_mesh("cpu", (2,))
    dist.destroy_process_group()


def test_a_missing_name_says_what_it_was_for() -> None:
    with pytest.raises(tc.TorchMovedError, match=r"has no torch\._gone\.deeper, which colrow needs for a test"):
        tc.private("torch:_gone.deeper", "for a test")
    with pytest.raises(tc.TorchMovedError, match=r"has no torch\.gone\.name"):
        tc.private("torch.gone:name", "for a test")


def test_tensors_are_found_in_a_tree() -> None:
    x, y = torch.ones(1), torch.ones(2)
    assert [id(found) for found in tc.tensors_in(({"a": x}, [1, y], None))] == [id(x), id(y)]


def test_foreach_changes_a_list_of_tensors() -> None:
    tensors = [torch.ones(2), torch.ones(3)]
    tc.foreach("mul_", tensors, 2.0)
    assert [t.sum().item() for t in tensors] == [4.0, 6.0]


def test_the_version_counts_writes() -> None:
    x = torch.zeros(2)
    before = tc.version(x)
    x.add_(1)
    assert tc.version(x) == before + 1


def test_the_running_backward_node_is_seen() -> None:
    x, seen = torch.ones(2, requires_grad=True), list[str]()
    y = x * 2
    y.register_hook(lambda _: seen.append(type(tc.current_autograd_node()).__name__))
    y.sum().backward()
    assert tc.current_autograd_node() is None
    assert seen == ["MulBackward0"]


def test_higher_order_operators_are_told_from_others() -> None:
    assert tc.is_higher_order(torch.ops.higher_order.cond)
    assert not tc.is_higher_order(torch.ops.aten.add.Tensor)


def test_tensors_under_vmap_are_told_apart() -> None:
    seen = []
    torch.vmap(lambda x: seen.append(tc.is_transformed(x)) or x)(torch.ones(2))
    assert seen == [True]
    assert not tc.is_transformed(torch.ones(2))


def test_tensors_of_a_model_are_replaced() -> None:
    model = nn.Linear(2, 2)
    tc.apply_to_tensors(model, lambda t: t.double())
    assert model.weight.dtype == torch.float64


def test_attention_names_its_backend() -> None:
    q = torch.ones(1, 2, 8, 4)
    assert tc.attention_backend(q, q, q, causal=True, grouped=False) in range(5)


def test_compiled_graphs_are_counted() -> None:
    before = tc.compiled_graph_count()
    torch.compile(lambda x: x + 1, backend="eager")(torch.ones(2))
    assert tc.compiled_graph_count() == before + 1


def test_a_group_is_found_by_its_name(mesh: DeviceMesh) -> None:
    group = mesh.get_group()
    assert tc.group_named(group.group_name) is group


def test_a_fake_group_stands_beside_another(mesh: DeviceMesh) -> None:
    group = tc.fake_group_beside("beside", [0, 1, 2], timedelta(seconds=5))
    assert group.size() == 3
    dist.destroy_process_group(group)


def test_finished_work_waits_for_nothing(mesh: DeviceMesh) -> None:
    assert tc.finished_work() is not None


def test_functional_collectives_give_the_shapes_of_two_ranks(mesh: DeviceMesh) -> None:
    x = torch.ones(4, 6)
    assert tc.all_reduce(x, mesh).shape == (4, 6)
    assert tc.all_gather(x, 0, mesh).shape == (8, 6)
    assert tc.reduce_scatter(x, 1, mesh).shape == (4, 3)


def test_an_unfinished_collective_is_seen(mesh: DeviceMesh) -> None:
    x = DTensor.from_local(torch.ones(2, 2), mesh, [Shard(0)], run_check=False)
    assert tc.is_async(tc.local_shard(x.redistribute(placements=[Replicate()], async_op=True)))
    assert not tc.is_async(torch.ones(2))


def test_the_local_shard_is_the_same_memory(mesh: DeviceMesh) -> None:
    local = torch.ones(2, 2)
    x = DTensor.from_local(local, mesh, [Shard(0)], run_check=False)
    assert tc.local_shard(x).data_ptr() == local.data_ptr()


def test_handlers_of_dtensor_are_its_own_table() -> None:
    assert tc.dtensor_handlers() is DTensor._op_dispatcher._custom_op_handlers
    assert tc.dtensor_handlers()


def test_dtensor_says_how_an_operator_places_its_results(mesh: DeviceMesh) -> None:
    mm, norm = torch.ops.aten.mm.default, torch.ops.aten.roll.default
    a, b = (Shard(1), (2, 8), (8, 1), torch.float32), (Shard(0), (8, 4), (4, 1), torch.float32)
    _, two = tc.tree_flatten(((1, 2), {}))
    ((placement, shape),) = tc.propagated(mm, [a, b], two, mesh)
    assert (placement.is_partial(), shape) == (True, (2, 4))
    with pytest.raises(tc.NoDTensorRuleError, match="moves data"):
        tc.propagated(mm, [a, a[:1] + b[1:]], two, mesh)
    _, rolled = tc.tree_flatten(((1, [1], [1]), {}))
    with pytest.raises(tc.NoDTensorRuleError):
        tc.propagated(norm, [a, 1, 1], rolled, mesh)
    with pytest.raises(tc.NoDTensorRuleError, match="handler"):
        tc.propagated(next(iter(tc.dtensor_handlers())), [a], two, mesh)
    select, vector = torch.ops.aten.select.int, (Shard(0), (8,), (1,), torch.float32)
    with pytest.raises(tc.NoDTensorRuleError):  # an element: torch 2.11 calls it a shard of dim 0
        tc.propagated(select, [vector, 0, 1], tc.tree_flatten(((1, 0, 1), {}))[1], mesh)


def test_shardings_are_forgotten(mesh: DeviceMesh) -> None:
    """The mask of an embedding whose sum was never formed."""
    weight = DTensor.from_local(torch.ones(4, 2), mesh, [Shard(0)], run_check=False)
    embedded = lambda *ids: F.embedding(  # noqa: E731
        DTensor.from_local(torch.tensor(ids), mesh, [Replicate()], run_check=False), weight
    )
    embedded(0, 1)
    with pytest.raises(RuntimeError, match="MaskBuffer"):
        embedded(1, 7)
    tc.forget_shardings()
    embedded(1, 7)
    tc.forget_shardings()


def test_conversions_of_dtensors_are_watched(mesh: DeviceMesh) -> None:
    seen = []

    def watch(name: str, function: Any) -> Any:
        return lambda *args: (seen.append(name), function(*args))[1]

    x = torch.ones(2, 4, requires_grad=True)
    with tc.watched_conversions(watch):
        y = DTensor.from_local(x, mesh, [Shard(0)], run_check=False).redistribute(placements=[Replicate()])
        y.to_local().sum().backward()
    assert seen[:4] == ["from_local", "redistribute", "to_local", "to_local_backward"]
    assert seen[-2:] == ["redistribute", "from_local_backward"]
    before = len(seen)
    DTensor.from_local(x, mesh, [Shard(0)], run_check=False).to_local()
    assert len(seen) == before


def test_the_propagation_of_shapes_is_seen(mesh: DeviceMesh) -> None:
    seen: list[str] = []
    with tc.watched_propagation(lambda: seen.append("started"), lambda: seen.append("ended")):
        DTensor.from_local(torch.ones(3, 7), mesh, [Shard(0)]).sin()
    assert seen[:1] == ["started"]
    assert seen.count("started") == seen.count("ended")


def test_a_mode_sees_the_operators_of_a_compiled_graph() -> None:
    seen: list[str] = []

    class Names(tc.CompilableMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    with Names():
        torch.compile(lambda x: x.sin() + 1, backend="aot_eager", fullgraph=True)(torch.ones(3))
    torch.compiler.reset()
    assert [name for name in seen if "sin" in name or "add" in name] == ["aten.sin.default", "aten.add.Tensor"]


def test_numbers_of_autograd_nodes_tell_which_operator_made_them() -> None:
    y = torch.ones(2, requires_grad=True) * 2
    assert tc.forward_number(y.grad_fn) == tc.forward_number()


def test_specs_with_a_placement_of_ones_own_are_told_apart(mesh: DeviceMesh) -> None:
    packed = DTensor.from_local(torch.ones(2), mesh, [PackedShard(0, (2, 2))], run_check=False)
    plain = DTensor.from_local(torch.ones(2), mesh, [Shard(0)], run_check=False)
    assert packed.placements == plain.placements
    assert packed._spec != plain._spec
    assert plain.detach()._spec == plain._spec


def test_a_strided_shard_has_a_dim_and_a_factor() -> None:
    placement = tc.StridedShard(1, split_factor=2)
    assert (placement.dim, placement.split_factor) == (1, 2)


def test_the_gradient_of_to_local_is_seen(mesh: DeviceMesh) -> None:
    seen: list[Any] = []
    from_local = DTensor.from_local

    def watched(tensor: Any, device_mesh: Any = None, placements: Any = None, *args: Any, **kwargs: Any) -> DTensor:
        seen.append(tuple(placements))
        return from_local(tensor, device_mesh, placements, *args, **kwargs)

    x = from_local(torch.ones(2, 2, requires_grad=True), mesh, [Shard(0)], run_check=False)
    cls: Any = DTensor
    cls.from_local = staticmethod(watched)
    try:
        with tc.watched_to_local_backward(lambda _, placements: seen.append(tuple(placements))):
            x.to_local(grad_placements=[Shard(0)]).sum().backward()
    finally:
        cls.from_local = staticmethod(from_local)
    assert set(seen) == {(Shard(0),)}


def test_a_redistribution_unasked_for_names_its_operator(mesh: DeviceMesh) -> None:
    found, on_global_shapes = [], set()

    class Watch(tc.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if any(isinstance(a, DTensor) for a in tc.tree_leaves((args, kwargs))):
                return NotImplemented
            if "all_gather" in func.name():
                found.append((*tc.implicit_redistribution(tc.frames()), tc.inside_dtensor(tc.frames())))
            if func is torch.ops.aten.mm.default and tc.finds_output_shape(tc.frames()):
                on_global_shapes.add(tuple(args[0].shape))
            return func(*args, **(kwargs or {}))

    a = DTensor.from_local(torch.ones(2, 4), mesh, [Shard(1)], run_check=False)
    b = DTensor.from_local(torch.ones(8, 2), mesh, [Replicate()], run_check=False)
    bias = DTensor.from_local(torch.ones(2, 4), mesh, [Shard(0)], run_check=False)
    with Watch():
        torch.softmax(a, -1), a @ b
    assert bias.shape == (4, 4)
    assert on_global_shapes == {(2, 8)}
    before, after, operator, inside = found[0]
    assert (tuple(before), tuple(after)) == ((Shard(1),), (Replicate(),))
    assert "softmax" in operator
    assert inside


def test_files_of_torch_are_told_from_others() -> None:
    assert tc.path_in_torch(next(tc.frames())) is None
    inside: list[str | None] = []

    class Probe(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            inside.extend(tc.path_in_torch(frame) for frame in tc.frames())
            return x

    Probe()(torch.ones(1))
    assert "/nn/modules/module.py" in inside


def test_fake_tensors_have_no_memory() -> None:
    with tc.fake_tensors():
        x = torch.empty(1 << 40, dtype=torch.float32)
        assert tc.is_fake(x)
        with pytest.raises(RuntimeError) as raised:
            torch.ones(3).sum().item()
    assert tc.needs_values(raised.value)
    assert not tc.needs_values(RuntimeError())
    assert not tc.is_fake(torch.ones(1))


def test_code_can_run_as_it_is_exported() -> None:
    with tc.as_in_export():
        assert torch.compiler.is_exporting()
        assert torch.compiler.is_compiling()
    assert not torch.compiler.is_exporting()


def test_torchs_encoder_runs_on_a_mask_without_values() -> None:
    layer = nn.TransformerEncoderLayer(4, 2, 4, batch_first=True)
    encoder = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)

    def run() -> torch.Size:
        return encoder(torch.ones(1, 3, 4), mask=torch.zeros(3, 3)).shape

    with tc.fake_tensors():
        assert run() == (1, 3, 4)
    with tc.fake_tensor_mode(allow_non_fake_inputs=True), pytest.raises(RuntimeError) as raised:
        run()
    assert tc.needs_values(raised.value)


def test_graphs_are_traced_without_code_and_traces_and_still_run() -> None:
    class Doubled(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            with torch.no_grad():
                return 2 * x

    def exported() -> tuple[Any, set[bool]]:
        program = torch.export.export(Doubled(), (torch.ones(3),), strict=False)
        nodes = (node for node in program.graph.nodes if node.op == "call_function")
        return program, {bool(node.stack_trace) for node in nodes if not tc.is_higher_order(node.target)}

    with tc.graphs_alone():
        quick, quickly_traced = exported()
    usual, traced = exported()
    assert traced == {True}
    assert quickly_traced == {not hasattr(torch.fx.config, "do_not_emit_stack_traces")}
    assert [str(node) for node in quick.graph.nodes] == [str(node) for node in usual.graph.nodes]
    assert torch.equal(quick.module()(torch.ones(3)), 2 * torch.ones(3))


def test_an_index_that_code_writes_down_is_known_of_a_fake_tensor() -> None:
    with tc.fake_tensors():
        assert tc.constant_index(torch.tensor([-2])) == -2
        assert tc.constant_index(torch.zeros(1, dtype=torch.long)) is None
    assert tc.constant_index(torch.tensor([1])) is None


def test_numbers_that_code_wrote_into_a_tensor_are_read() -> None:
    seen: list[Any] = []

    class Reads(tc.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.extend(tc.written_numbers(x) for x in args if isinstance(x, torch.Tensor))
            return func(*args, **(kwargs or {}))

    with tc.fake_tensors(), Reads():
        torch.tensor([0.5, float("nan")]).neg()
        torch.zeros(2).neg()
    assert (0.5, "nan") in seen
    assert seen[-1] is None


def test_dtensors_are_seeded_on_gpus_alone(mesh: DeviceMesh) -> None:
    with pytest.warns(UserWarning, match="may not have complete support on cpu"):
        tc.seed_dtensors(0, mesh)


def test_ranks_are_simulated_side_by_side() -> None:
    dist.init_process_group("fake", store=tc.fake_store(), rank=0, world_size=2)
    try:
        with tc.local_tensor_mode(2):
            x = tc.from_tensors_of_ranks({0: torch.ones(2), 1: torch.zeros(2)})
            each = tc.tensors_of_ranks(x + 1)
            numbered = tc.tensors_of_ranks(tc.per_rank(lambda y, rank: y + rank, x, 0))
            weight = tc.from_tensors_of_ranks({0: torch.ones(2), 1: torch.full((2,), 3.0)}).requires_grad_()
            written = weight * 1
            written[:1].mul_(weight[1:])  # into a view
            written.t().sum().backward()
            values, gradient = tc.tensors_of_ranks(written.detach()), tc.tensors_of_ranks(weight.grad)
        assert each is not None
        assert numbered is not None
        assert values is not None
        assert gradient is not None
        assert [values[rank].tolist() for rank in (0, 1)] == [[1.0, 1.0], [9.0, 3.0]]
        assert [gradient[rank].tolist() for rank in (0, 1)] == [[1.0, 2.0], [3.0, 4.0]]
        assert [numbered[rank].tolist() for rank in (0, 1)] == [[1.0, 1.0], [1.0, 1.0]]
        assert tc.per_rank(lambda y, rank: y + rank, torch.ones(2), 1).tolist() == [2.0, 2.0]
        assert [each[rank].sum().item() for rank in (0, 1)] == [4.0, 2.0]
    finally:
        dist.destroy_process_group()


def test_functions_of_random_numbers_are_those_of_simulated_ranks_only_while_these_run() -> None:
    dist.init_process_group("fake", store=tc.fake_store(), rank=0, world_size=2)
    usual = torch.manual_seed
    try:
        with tc.local_tensor_mode(2) as mode:
            of_ranks = torch.manual_seed
            x = DTensor.from_local(
                tc.from_tensors_of_ranks({0: torch.ones(4), 1: torch.zeros(4)}),
                init_device_mesh("cpu", (2,)),
                [Shard(0)],
            )
            view = (x + 1).view(2, 4)  # an operation, and a view, within a DTensor's
            seen = [of_ranks, torch.manual_seed]
            with mode.disable():
                seen.append(torch.manual_seed)
            seen.append(torch.manual_seed)
            parts = tc.tensors_of_ranks(view.to_local())
        assert parts is not None
        assert [parts[rank].tolist() for rank in (0, 1)] == [[[2.0] * 4], [[1.0] * 4]]
        assert of_ranks is not usual
        assert [each is usual for each in (*seen, torch.manual_seed)] == [False, False, True, False, True]
    finally:
        dist.destroy_process_group()


def test_the_flight_recorder_counts_what_was_issued_and_what_ended() -> None:
    tc.record_collectives()
    assert tc.collective_counts() == {}
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        outputs = [torch.zeros(2), torch.zeros(1, 3)]
        tc.gather_into(outputs, [torch.ones(2), torch.ones(1, 3)], dist.group.WORLD).wait()
        assert all(bool(x.all()) for x in outputs)
        group, count, end = max(tc.collective_counts(), key=int), 1, time.monotonic() + 20
        while True:
            dist.all_reduce(torch.ones(2))
            count, until = count + 1, time.monotonic() + 2
            while tc.collective_counts()[group] != (count, count) and time.monotonic() < until:
                time.sleep(0.01)  # an end is recorded by a thread of its own
            started, ended = tc.collective_counts()[group]
            assert started == count
            # gloo's thread can end a call before torch has recorded its start: that end is lost, and the next is tried
            if (ended == count and count >= 3) or time.monotonic() > end:
                break
        assert ended == count
        last = tc.recorded_collectives()[-1]
        assert (last["profiling_name"], last["input_sizes"]) == ("gloo:all_reduce", [[2]])
        assert last["collective_seq_id"] == count
        assert pickle.loads(tc.flight_record())["entries"][-1]["collective_seq_id"] == count
    finally:
        dist.destroy_process_group()


def test_a_function_mode_sees_the_calls_of_torchs_attention() -> None:
    seen: list[Any] = []

    class Seen(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(func)
            return func(*args, **(kwargs or {}))

    torch.manual_seed(0)
    module, x = torch.nn.MultiheadAttention(8, 2), torch.randn(3, 1, 8)
    weights = module.in_proj_weight, module.in_proj_bias, None, None, False, 0.0
    given = (x, x, x, 8, 2, *weights, module.out_proj.weight, module.out_proj.bias)
    with Seen():
        out, _ = tc.open_attention()(*given, need_weights=False)
    assert torch.Tensor.view in seen
    torch.testing.assert_close(out, module(x, x, x, need_weights=False)[0])


def test_compilation_is_announced() -> None:
    seen: list[str] = []
    with tc.around_compilation(lambda: seen.append("start"), lambda: seen.append("end")):
        torch.compile(lambda x: x + 1, backend="eager")(torch.ones(2))
    torch.compile(lambda x: x + 2, backend="eager")(torch.ones(2))
    assert seen == ["start", "end"]


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_names_that_need_a_gpu() -> None:
    assert tc.raw_stream(0) == torch.cuda.current_stream(0).cuda_stream
    assert callable(tc.symmetric_memory().rendezvous)
    a = torch.ones(16, 16, device="cuda").to(torch.float8_e4m3fn)
    one = torch.ones((), device="cuda")
    assert tc.scaled_product(a, a.t(), scale_a=one, scale_b=one, out_dtype=torch.bfloat16)[0, 0] == 16


def test_operators_that_an_export_takes_apart_are_known() -> None:
    aten = torch.ops.aten
    assert [tc.is_decomposed_in_export(op) for op in (aten.reshape.default, aten.to.dtype)] == [True, True]
    assert [tc.is_decomposed_in_export(op) for op in (aten.linear.default, aten.mul.Tensor)] == [False, False]


def test_a_mode_sees_operators_as_an_export_does() -> None:
    class Mode(tc.PreDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    seen: list[str] = []
    layer, x = nn.Linear(3, 3), torch.ones(1, 3)
    with tc.python_dispatcher(), Mode():
        layer(x).reshape(3)
    assert seen == ["aten.linear.default", "aten.reshape.default"]


def test_a_module_has_other_tensors_and_attributes_for_a_while() -> None:
    layer = nn.Linear(3, 3)
    layer.calls = 0
    weight, other = layer.weight, torch.zeros(3, 3)
    with tc.attributes_put_back(layer), tc.fake_state(layer, {"weight": other}):
        layer.calls += 1
        assert layer.weight is other
    assert layer.weight is weight
    assert layer.calls == 0


def test_operators_run_by_their_python_decompositions() -> None:
    with tc.fake_tensor_mode() as mode:
        x = torch.empty(3)
        assert tc.fake_mode_of(x) is mode
        with tc.python_dispatcher(), torch.no_grad():
            assert torch.ops.aten.dropout.default(x, 0.5, False) is not x  # a copy, which the kernel does not make
        assert torch.ops.aten.dropout.default(x, 0.5, False) is x
    assert tc.fake_mode_of(torch.ones(1)) is None

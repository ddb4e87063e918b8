"""torch's private interfaces: the only package that touches them, one wrapper each.

colrow is tested with torch 2.11 and 2.13. A name that another torch has moved raises TorchMovedError, which says what
is gone and what colrow needs it for; `tests/test_torch_compat.py` calls every wrapper. Nothing here imports colrow.
"""

from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from colrow.torch_compat.dtensors import (
    NoRuleError,
    StridedShard,
    dtensor_handlers,
    finds_output_shape,
    frames,
    implicit_redistribution,
    inside_dtensor,
    local_shard,
    path_in_torch,
    propagated,
    replicas_of_fsdp2,
    seed_dtensors,
    tell_specs_apart,
    watched_conversions,
    watched_propagation,
    watched_to_local_backward,
)
from colrow.torch_compat.flight import (
    around_compilation,
    collective_counts,
    flight_record,
    record_collectives,
    recorded_collectives,
)
from colrow.torch_compat.fsdp import FsdpUnit, fsdp_units
from colrow.torch_compat.groups import (
    AsyncCollectiveTensor,
    all_gather,
    all_reduce,
    fake_group_beside,
    fake_store,
    finished_work,
    group_named,
    is_async,
    reduce_scatter,
)
from colrow.torch_compat.names import TESTED, TorchMovedError, private, replaced
from colrow.torch_compat.simulated import (
    constant_index,
    fake_tensor_mode,
    fake_tensors,
    from_tensors_of_ranks,
    is_fake,
    local_tensor_mode,
    per_rank,
    quiet_fake_tensors,
    tensors_of_ranks,
)
from colrow.torch_compat.tensors import (
    CompilableMode,
    apply_to_tensors,
    attention_backend,
    compiled_graph_count,
    current_autograd_node,
    foreach,
    forward_number,
    is_higher_order,
    open_attention,
    parameter_hooks,
    raw_stream,
    scaled_product,
    symmetric_memory,
    version,
)

"""torch's private interfaces: the only package that touches them, one wrapper each.

colrow is tested with torch 2.11 and 2.13. A name that another torch has moved raises TorchMovedError, which says what
is gone and what colrow needs it for; `tests/test_torch_compat.py` calls every wrapper. Nothing here imports colrow.
"""

from torch.utils._python_dispatch import TorchDispatchMode as TorchDispatchMode
from torch.utils._pytree import tree_flatten as tree_flatten
from torch.utils._pytree import tree_leaves as tree_leaves
from torch.utils._pytree import tree_unflatten as tree_unflatten

from colrow.torch_compat.dtensors import NoDTensorRuleError as NoDTensorRuleError
from colrow.torch_compat.dtensors import StridedShard as StridedShard
from colrow.torch_compat.dtensors import dtensor_handlers as dtensor_handlers
from colrow.torch_compat.dtensors import finds_output_shape as finds_output_shape
from colrow.torch_compat.dtensors import forget_shardings as forget_shardings
from colrow.torch_compat.dtensors import frames as frames
from colrow.torch_compat.dtensors import implicit_redistribution as implicit_redistribution
from colrow.torch_compat.dtensors import inside_dtensor as inside_dtensor
from colrow.torch_compat.dtensors import local_shard as local_shard
from colrow.torch_compat.dtensors import path_in_torch as path_in_torch
from colrow.torch_compat.dtensors import propagated as propagated
from colrow.torch_compat.dtensors import replicas_of_fsdp2 as replicas_of_fsdp2
from colrow.torch_compat.dtensors import seed_dtensors as seed_dtensors
from colrow.torch_compat.dtensors import tell_specs_apart as tell_specs_apart
from colrow.torch_compat.dtensors import watched_conversions as watched_conversions
from colrow.torch_compat.dtensors import watched_propagation as watched_propagation
from colrow.torch_compat.dtensors import watched_to_local_backward as watched_to_local_backward
from colrow.torch_compat.flight import around_compilation as around_compilation
from colrow.torch_compat.flight import collective_counts as collective_counts
from colrow.torch_compat.flight import flight_record as flight_record
from colrow.torch_compat.flight import record_collectives as record_collectives
from colrow.torch_compat.flight import recorded_collectives as recorded_collectives
from colrow.torch_compat.fsdp import FsdpUnit as FsdpUnit
from colrow.torch_compat.fsdp import fsdp_units as fsdp_units
from colrow.torch_compat.groups import AsyncCollectiveTensor as AsyncCollectiveTensor
from colrow.torch_compat.groups import all_gather as all_gather
from colrow.torch_compat.groups import all_reduce as all_reduce
from colrow.torch_compat.groups import fake_group_beside as fake_group_beside
from colrow.torch_compat.groups import fake_store as fake_store
from colrow.torch_compat.groups import finished_work as finished_work
from colrow.torch_compat.groups import gather_into as gather_into
from colrow.torch_compat.groups import group_named as group_named
from colrow.torch_compat.groups import is_async as is_async
from colrow.torch_compat.groups import reduce_scatter as reduce_scatter
from colrow.torch_compat.names import TESTED as TESTED
from colrow.torch_compat.names import TorchMovedError as TorchMovedError
from colrow.torch_compat.names import private as private
from colrow.torch_compat.names import replaced as replaced
from colrow.torch_compat.simulated import as_in_export as as_in_export
from colrow.torch_compat.simulated import constant_index as constant_index
from colrow.torch_compat.simulated import fake_tensor_mode as fake_tensor_mode
from colrow.torch_compat.simulated import fake_tensors as fake_tensors
from colrow.torch_compat.simulated import from_tensors_of_ranks as from_tensors_of_ranks
from colrow.torch_compat.simulated import is_fake as is_fake
from colrow.torch_compat.simulated import local_tensor_mode as local_tensor_mode
from colrow.torch_compat.simulated import needs_values as needs_values
from colrow.torch_compat.simulated import per_rank as per_rank
from colrow.torch_compat.simulated import quiet_fake_tensors as quiet_fake_tensors
from colrow.torch_compat.simulated import tensors_of_ranks as tensors_of_ranks
from colrow.torch_compat.simulated import written_numbers as written_numbers
from colrow.torch_compat.tensors import CompilableMode as CompilableMode
from colrow.torch_compat.tensors import apply_to_tensors as apply_to_tensors
from colrow.torch_compat.tensors import attention_backend as attention_backend
from colrow.torch_compat.tensors import compiled_graph_count as compiled_graph_count
from colrow.torch_compat.tensors import current_autograd_node as current_autograd_node
from colrow.torch_compat.tensors import foreach as foreach
from colrow.torch_compat.tensors import forward_number as forward_number
from colrow.torch_compat.tensors import inductor as inductor
from colrow.torch_compat.tensors import is_higher_order as is_higher_order
from colrow.torch_compat.tensors import is_transformed as is_transformed
from colrow.torch_compat.tensors import open_attention as open_attention
from colrow.torch_compat.tensors import parameter_hooks as parameter_hooks
from colrow.torch_compat.tensors import raw_stream as raw_stream
from colrow.torch_compat.tensors import scaled_product as scaled_product
from colrow.torch_compat.tensors import symmetric_memory as symmetric_memory
from colrow.torch_compat.tensors import tensors_in as tensors_in
from colrow.torch_compat.tensors import version as version

"""What each ATen operator does to a tensor that is split over ranks: one table, for derivation and for the check.

An operator stands here under its name without the overload and without the underscore of an in-place variant: `add` is
`aten.add.Tensor` and `aten.add_.Scalar`. An operator that does not stand here has no known facts: `derive` keeps every
dimension that it touches unsharded, and nothing may be taken for granted of it.

[Note: what is known of an operator]
Let f be the operator, x its input, and x_1 ... x_n what the ranks hold.

    rule     x_r shards of a dim:      which dims of f(x) the f(x_r) are shards of. The name of a rule of `derive`
    linear   x_r partial sums:         whether f(x_1) + ... + f(x_n) = f(x)
    fills    no use of x but its shape: zeros, a constant, unset memory, positions (arange), random numbers
    moves    each element of f(x) is an element of x, unchanged, and which one no tensor decides: what is known of x's
             elements holds for f(x)'s. Not so of a lookup: a rank may look up what it masks afterwards
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, auto
from functools import cache
from typing import Any


class Linear(Enum):
    """In which operands an operator is linear, so that it commutes with a sum over ranks."""

    FIRST = auto()
    """In its first operand, the others given: a view, a sum, a product with a known factor."""
    NUMERATOR = auto()
    """In its first operand, and in no other one."""
    EACH = auto()
    """In each operand while the other is given, not in both at once: x * y."""
    TERMS = auto()
    """In all operands together: of a partial sum and another term, the other one is summed over ranks as well."""
    WRITTEN = auto()
    """In the base and the values that are written into it together."""


class Filling(Enum):
    """What an operator fills its result with, when it does not compute it from its inputs' elements."""

    ZERO = auto()
    CONSTANT = auto()
    """One number everywhere: on each rank a smaller tensor is a shard."""
    UNSET = auto()
    """Memory that the model overwrites."""
    POSITION = auto()
    """Each element says where it stands: on each rank a smaller tensor is the first shard."""
    RANDOM = auto()


class Identity(Enum):
    """How a result with the elements and the shape of its input differs from it."""

    MEMORY = auto()
    """In nothing, or in where it lies."""
    DTYPE = auto()
    GRADIENT = auto()
    """No gradient flows back."""


class Runs(Enum):
    """Along which dims an operator runs. Every index of the other dims it treats alone, so that a shard of one of them
    gives a shard of the result."""

    DIMS = auto()
    """Those that its argument `dim`, `dims` or `dimension` names."""
    WINDOWS = auto()
    """The last ones, as many as its name says: the 2 of `avg_pool2d`."""
    MATRICES = auto()
    """The last two."""
    NONE = auto()
    """None: it acts element by element. So does every operator whose rule is `elementwise`."""


@dataclass(frozen=True)
class Operator:
    """The facts of one operator; see [Note: what is known of an operator].

    Attributes:
        rule: how it carries a sharded dim; empty: no rule, nothing may be sharded.
        linear: in which operands it commutes with a sum over ranks; None: in none.
        fills: what it fills its result with, whatever its inputs' elements are; None: computed from them.
        random: it draws random numbers (dropout: only in training), so each rank's own draws differ from one draw.
        moves: it copies elements, to places that do not depend on the values of an index.
        identity: its result equals its input, up to this.
        takes_part: it takes a piece of a dim by number: the same numbers on every rank are different elements.
        contracts: it sums products over a dim.
        addends: positions of tensor operands that are added to the rest; None: none. Of a sum over ranks such a term
            counts once for each rank.
        groups: position of its argument that counts groups of channels: on shards of channels there are fewer.
        counts: its integer arguments go into values (a scale, a count that is divided by), not into shapes.
        runs: along which dims it runs; None: not known, or not by such a rule.
        statistics: positions of the operands that it writes running statistics of the batch into, in training.
        collective: what it does between ranks (all_gather, reduce_scatter, ...); empty: nothing.
    """

    name: str
    rule: str = ""
    linear: Linear | None = None
    fills: Filling | None = None
    random: bool = False
    moves: bool = False
    identity: Identity | None = None
    takes_part: bool = False
    contracts: bool = False
    addends: tuple[int, ...] | None = None
    groups: int | None = None
    counts: bool = False
    runs: Runs | None = None
    statistics: tuple[int, ...] = ()
    collective: str = ""


EQUAL_AFTER = frozenset(("all_gather", "all_reduce", "broadcast"))
"""Collectives after which every rank holds the same values."""

OPERATORS: dict[str, Operator] = {}


def _known(names: str, rule: str = "", **facts: Any) -> None:
    for name in names.split():
        assert name not in OPERATORS, f"{name} stands in the table twice"
        OPERATORS[name] = Operator(name, rule, **facts)


# ---------------------------------------------------------------------- element by element

FIRST, TERMS = Linear.FIRST, Linear.TERMS
DIMS, WINDOWS, MATRICES, NONE = Runs

_known(
    """reciprocal square sqrt rsqrt abs sign exp exp2 expm1 log log1p log2 cos sin tan erf tanh sigmoid silu gelu relu
    relu6 leaky_relu elu celu selu softplus mish hardtanh hardswish hardsigmoid threshold logit log_sigmoid atan atan2
    sinh cosh maximum minimum clamp_min clamp_max lerp addcmul addcdiv xlogy nan_to_num
    bitwise_and bitwise_or bitwise_not bitwise_xor logical_and logical_or logical_not logical_xor __and__ __or__ __xor__
    ge le lt gt eq ne not_equal floor ceil round trunc isnan isinf isfinite _conj real softshrink hardshrink lgamma
    digamma erfc erfinv acos asin asinh atanh sinc fmin fmax hypot copysign logaddexp logaddexp2 frac sgn signbit polar
    complex angle isclose ldexp acosh i0 special_entr special_erfcx special_i0e special_i1
    special_i1e special_log_ndtr special_ndtr special_ndtri special_xlog1py""",
    "elementwise",
)
_known("where masked_fill copy", "elementwise")
_known("add sub subtract", "elementwise", linear=TERMS, addends=(0, 1), counts=True)
_known("rsub pow floor_divide remainder fmod clamp", "elementwise", counts=True)
_known("mul multiply", "elementwise", linear=Linear.EACH, counts=True)
_known("div divide true_divide", "elementwise", linear=Linear.NUMERATOR, counts=True)
_known("neg negative", "elementwise", linear=FIRST)
_known("dropout", "elementwise", linear=FIRST, random=True)
_known("rrelu", "elementwise", random=True)  # in training
_known("prelu", "prelu")
_known("broadcast_tensors", "broadcast", linear=TERMS, moves=True)
_known("native_dropout _fused_dropout", random=True)
_known("contiguous alias", "elementwise", linear=FIRST, moves=True, identity=Identity.MEMORY)
_known("clone", "elementwise", linear=FIRST, moves=True, identity=Identity.MEMORY)
_known("lift_fresh_copy", "elementwise", linear=FIRST, moves=True, identity=Identity.MEMORY)
# in no traced graph, so without a rule
_known("lift_fresh", linear=FIRST, moves=True, identity=Identity.MEMORY)
_known("_reshape_alias", linear=FIRST, moves=True)
_known("_assert_tensor_metadata", identity=Identity.MEMORY)
_known("detach", "elementwise", linear=FIRST, moves=True, identity=Identity.GRADIENT)
_known("to _to_copy", "elementwise", linear=FIRST, moves=True, identity=Identity.DTYPE)
# of the second operand only the type counts: it may have any shape
_known("type_as", "like", linear=FIRST, moves=True, identity=Identity.DTYPE, runs=NONE)
_known("boundary", "elementwise", linear=FIRST)  # the marker of a derivation's trace: it may change an extent

# ---------------------------------------------------------------------- made from nothing but a shape

_known("zeros new_zeros", "constant", fills=Filling.ZERO)
_known("full scalar_tensor ones new_ones new_full", "constant", fills=Filling.CONSTANT, counts=True)
_known("empty new_empty empty_strided new_empty_strided", "constant", fills=Filling.UNSET)
_known("arange linspace eye tril_indices triu_indices fft_fftfreq fft_rfftfreq", "constant", fills=Filling.POSITION)
_known("rand randn", "constant", fills=Filling.RANDOM, random=True)
_known("zeros_like", "like", fills=Filling.ZERO)
_known("ones_like full_like", "like", fills=Filling.CONSTANT, counts=True)
_known("empty_like", "like", fills=Filling.UNSET)
_known("rand_like randn_like", "like", fills=Filling.RANDOM, random=True)
_known("fill", "elementwise", fills=Filling.CONSTANT, counts=True)
_known("zero", fills=Filling.ZERO)
_known("bernoulli", "like", random=True)  # its input holds the probabilities
_known("uniform exponential", "like", fills=Filling.RANDOM, random=True)

# ---------------------------------------------------------------------- along a dim

_known("sum", "sum", linear=FIRST, runs=DIMS)
_known("mean", "mean", linear=FIRST, runs=DIMS)
_known("amax amin any all prod logsumexp argmax argmin", "reduce", runs=DIMS)
_known("softmax _softmax log_softmax _log_softmax _safe_softmax cumprod logcumsumexp cummax cummin", "along", runs=DIMS)
_known("cumsum", "along", linear=FIRST, runs=DIMS)
_known("flip roll", "reorder", linear=FIRST, moves=True, runs=DIMS)
_known("tril triu", "triangle", linear=FIRST, runs=MATRICES)
_known(
    """fft_fft fft_ifft fft_rfft fft_irfft fft_fft2 fft_ifft2 fft_rfft2 fft_irfft2 fft_fftn fft_ifftn fft_rfftn
    fft_irfftn fft_hfft fft_ihfft""",
    "fft",
    linear=FIRST,
)
_known("fft_fftshift fft_ifftshift", "reorder", linear=FIRST, moves=True)
_known("layer_norm rms_norm", "norm")
_known("native_layer_norm", "norm with statistics")
_known("constant_pad_nd pad", "pad")
_known("diff", "diff", linear=FIRST)
_known("topk sort", "sort", runs=DIMS)
_known("argsort", "argsort")
_known("max min", "max", runs=DIMS)
_known("histc bincount", "count")
_known("one_hot", "one_hot")
_known("nll_loss_forward nll_loss2d_forward nll_loss_backward nll_loss2d_backward")
_known("select_backward")
_known("var std linalg_vector_norm norm nansum nanmean", "reduce", runs=DIMS)
_known("var_mean std_mean aminmax median nanmedian mode kthvalue", "reduce", runs=DIMS)
_known("cosine_similarity pairwise_distance linalg_vecdot", "distance")
_known("cdist", "cdist")
_known("cross linalg_cross", "cross")
_known("glu", "glu", runs=DIMS)
_known("unfold", "unfold", linear=FIRST, runs=DIMS)
# in no traced graph, so without a rule
_known(
    """count_nonzero _softmax_backward_data _log_softmax_backward_data unfold_backward glu_backward _fft_r2c _fft_c2r
    _fft_c2c""",
    runs=DIMS,
)
_known(
    """avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_max_pool2d adaptive_max_pool3d upsample_nearest1d
    upsample_nearest2d _upsample_nearest_exact1d _upsample_nearest_exact2d upsample_linear1d upsample_bilinear2d
    upsample_bicubic2d replication_pad1d replication_pad2d reflection_pad1d reflection_pad2d""",
    "windows",
    runs=WINDOWS,
)
# composed of others where they run, so named in traced graphs alone
_known("max_pool1d max_pool2d max_pool3d adaptive_avg_pool2d adaptive_avg_pool3d adaptive_max_pool1d", "windows")
_known(
    """max_pool2d_with_indices max_pool3d_with_indices _adaptive_avg_pool2d _adaptive_avg_pool3d
    avg_pool2d_backward avg_pool3d_backward max_pool2d_with_indices_backward max_pool3d_with_indices_backward
    _adaptive_avg_pool2d_backward _adaptive_avg_pool3d_backward adaptive_max_pool2d_backward
    adaptive_max_pool3d_backward upsample_nearest1d_backward upsample_nearest2d_backward
    _upsample_nearest_exact1d_backward _upsample_nearest_exact2d_backward upsample_linear1d_backward
    upsample_bilinear2d_backward upsample_bicubic2d_backward replication_pad1d_backward replication_pad2d_backward
    reflection_pad1d_backward reflection_pad2d_backward""",
    runs=WINDOWS,
)
_known(
    """_cdist_forward _cdist_backward _euclidean_dist linalg_matrix_exp linalg_qr linalg_inv_ex linalg_cholesky_ex
    _linalg_svd _linalg_solve_ex _linalg_det linalg_solve_triangular""",
    runs=MATRICES,
)
_known(
    """hardswish_backward hardtanh_backward hardsigmoid_backward log_sigmoid_forward log_sigmoid_backward
    softshrink_backward hardshrink_backward leaky_relu_backward elu_backward
    _prelu_kernel _prelu_kernel_backward
    threshold_backward gelu_backward silu_backward mish_backward softplus_backward sigmoid_backward tanh_backward
    logit_backward heaviside nextafter imag _neg_view _conj_physical conj_physical""",
    runs=NONE,
)

# ---------------------------------------------------------------------- channels

_known("_native_batch_norm_legit_no_training batch_norm", "batch_norm")
_known("native_batch_norm _native_batch_norm_legit _batch_norm_with_update cudnn_batch_norm", statistics=(3, 4))
_known("instance_norm", "instance_norm")
_known("group_norm", "group_norm", groups=1)
_known("im2col", "im2col", linear=FIRST)
_known("_weight_norm", "weight_norm")
_known("lstm gru rnn_tanh rnn_relu lstm_cell gru_cell rnn_tanh_cell rnn_relu_cell", "recurrent")

# ---------------------------------------------------------------------- products

_known("linear", "linear", linear=Linear.EACH, contracts=True, addends=(2,))
_known("addmm baddbmm", "addmm", contracts=True, addends=(0,))
_known("matmul mm bmm", "matmul", linear=Linear.EACH, contracts=True)
_known("einsum", "einsum", linear=Linear.EACH, contracts=True)
_known("outer", "outer")
_known("tensordot", "tensordot", contracts=True)
_known("bilinear", "bilinear", contracts=True, addends=(3,))
_known("kron", "kron", linear=Linear.EACH)
_known("conv1d conv2d conv3d", "conv", contracts=True, addends=(2,), groups=6)
_known("conv_transpose1d conv_transpose2d conv_transpose3d", "conv", contracts=True, addends=(2,), groups=6)
_known("convolution", contracts=True)  # what these are when they run; in no traced graph, so without a rule
_known("_grouped_mm grouped_mm_fallback", "grouped_mm", contracts=True)
_known("scaled_dot_product_attention", "attention", contracts=True)
_known("_scaled_dot_product_flash_attention_for_cpu", contracts=True)

# ---------------------------------------------------------------------- views

_known("view reshape _unsafe_view flatten unflatten", "view", linear=FIRST, moves=True)
_known("transpose swapaxes swapdims", "transpose", linear=FIRST, moves=True)
_known("t numpy_T mT", "t", linear=FIRST, moves=True)
_known("permute", "permute", linear=FIRST, moves=True)
_known("movedim", "movedim", linear=FIRST, moves=True)
_known("unsqueeze", "unsqueeze", linear=FIRST, moves=True)
_known("squeeze", "squeeze", linear=FIRST, moves=True)
_known("expand broadcast_to", "expand", linear=FIRST, moves=True)
_known("repeat tile", "repeat", linear=FIRST, moves=True)
_known("repeat_interleave", "repeat_interleave", linear=FIRST, moves=True)
_known("view_as_complex", "view_as_complex", linear=FIRST, moves=True)
_known("view_as_real", "view_as_real", linear=FIRST, moves=True)
_known("slice", "slice", linear=FIRST, moves=True, takes_part=True)
_known("select", "select", linear=FIRST, moves=True, takes_part=True)
_known("narrow", "narrow", linear=FIRST, moves=True, takes_part=True)
_known("split split_with_sizes chunk", "split", linear=FIRST, moves=True)
_known("tensor_split", linear=FIRST, moves=True)
_known("unbind", "unbind", linear=FIRST, moves=True)
_known("getitem", "getitem", linear=FIRST, moves=True)
_known("cat concat concatenate hstack vstack row_stack column_stack dstack", "cat", linear=TERMS, moves=True)
_known("stack", "stack", linear=TERMS, moves=True)
_known("diagonal", "diagonal", linear=FIRST, moves=True)
_known("meshgrid", "meshgrid", linear=TERMS, moves=True)
_known("slice_scatter", "slice_scatter", linear=TERMS, moves=True)
_known("select_scatter", "select_scatter", linear=TERMS, moves=True)

# ---------------------------------------------------------------------- lookups and writes by index

_known("embedding", "embedding")
_known("embedding_bag", "embedding_bag")
_known("index", "index", linear=FIRST, takes_part=True)
_known("index_select", "index_select", linear=FIRST, takes_part=True, runs=DIMS)
_known("gather", "gather", linear=FIRST, runs=DIMS)
_known("take_along_dim", "take_along_dim", linear=FIRST)
_known("index_fill", "index_fill", runs=DIMS)
_known("index_put _unsafe_index_put", "index_put", linear=Linear.WRITTEN)
_known("index_add", "index_add", linear=TERMS, runs=DIMS)
_known("index_copy", "index_add", runs=DIMS)
_known("scatter", "scatter", linear=Linear.WRITTEN, runs=DIMS)
_known("scatter_add", "scatter", linear=TERMS, runs=DIMS)
_known("scatter_reduce", "scatter", runs=DIMS)

# ---------------------------------------------------------------------- between ranks

_known("all_gather_into_tensor all_gather_into_tensor_coalesced _allgather_base_", collective="all_gather")
_known("reduce_scatter_tensor reduce_scatter_tensor_coalesced _reduce_scatter_base_", collective="reduce_scatter")
_known("all_reduce all_reduce_coalesced allreduce", collective="all_reduce")
_known("all_to_all_single shard_dim_alltoall", collective="all_to_all")
_known("broadcast", collective="broadcast")


CUMULATIVE = frozenset(("cumsum", "cumprod", "logcumsumexp", "cummax", "cummin"))
"""Operators of which every element depends on those before it along their `dim`."""
NOTHING_KNOWN = Operator("")


def operator(name: str) -> Operator:
    """The facts of an operator by its ATen name, in place or not; none of one that is not in the table."""
    return OPERATORS.get(plain_name(name), NOTHING_KNOWN)


@cache
def operator_name(func: Any) -> str:
    """`add_` of `aten.add_.Tensor`: the operator's name without its namespace and its overload."""
    return str(func.name()).partition("::")[2].partition(".")[0]


def argument_of(func: Any, name: str, args: Any, kwargs: Any) -> Any:
    """The argument of this name in the operator's schema, or its default; None where the schema has none."""
    for position, argument in enumerate(func._schema.arguments):
        if argument.name == name:
            return args[position] if position < len(args) else kwargs.get(name, argument.default_value)
    return None


def plain_name(name: str) -> str:
    """`add_` is `add` in place: one operator. A name that begins with an underscore is kept as it is."""
    return name if name.startswith("_") else name.rstrip("_")

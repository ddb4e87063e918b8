"""Plans that are broken, each with the code that finds it, and plans that are sound."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import RowwiseParallel
from torch.nn.utils.parametrizations import weight_norm

from colrow.checking.options import COMPILED_BLOCKS_WAIT
from colrow.mesh import Mesh
from colrow.models.llama import Llama
from colrow.plans.plan import Plan
from helpers import broken_models as m
from helpers.broken_styles import BiasOnEveryRank, ColumnWithoutReduce, Detach, SumOfEqual, TakenAsEqual
from helpers.parity import MODELS

GATHER = {"style": "prepare_input", "input": ["shard(1)"], "desired": ["replicate"]}


def llama(name: str = "gqa", **options: Any) -> nn.Module:
    with torch.device("meta"):
        return Llama(replace(MODELS[name], **options))


shallow = partial(llama, num_hidden_layers=1)
"""For what one block shows, as `m.Gpt`; where a finding is one for all blocks, its case has two."""
two_blocks = partial(m.Gpt, layers=2)


def preset(name: str = "llama", loss: Any = "vocab_parallel", drop: str = "", **styles: Any) -> Plan:
    """A preset with one key dropped and others replaced; `__` is a dot, and a bare name is one of a layer."""
    plan = Plan.preset(name, loss)
    top = ("embed_tokens", "norm", "lm_head")
    changed = {key if key in top else "layers.*." + key.replace("__", "."): style for key, style in styles.items()}
    return replace(plan, modules={k: s for k, s in plan.modules.items() if k != drop} | changed)


def block_mlp(**styles: Any) -> dict[str, Any]:
    """An MLP on local tensors, of which the block sums the input's gradient and the output."""
    block = {"style": "local_block", "input": ["shard(1)"], "output": ["shard(1)"]}
    down = {"style": "packed_rowwise", "output": "partial"}
    inside = {"gate_proj": "packed_colwise", "up_proj": "packed_colwise", "down_proj": down} | styles
    return {"mlp": block} | {f"mlp__{name}": style for name, style in inside.items()}


def gpt_plan(loss: Any = "replicated", sequence: bool = False, **styles: Any) -> Plan:
    """Megatron's split of `Gpt`; `name=None` drops the key."""
    row = {"style": "rowwise", "output": "shard(1)"} if sequence else "rowwise"
    modules: dict[str, Any] = {
        "blocks.*.attn.qkv": "colwise",
        "blocks.*.attn.out": row,
        "blocks.*.mlp.up": "colwise",
        "blocks.*.mlp.down": row,
        "head": {"style": "colwise", "output": "replicate"},
    }
    if loss == "vocab_parallel":
        modules["head"] = {"style": "colwise", "use_local_output": False}
    if sequence:
        modules |= dict.fromkeys(("blocks.*.norm1", "blocks.*.norm2", "norm"), "sequence")
        modules |= {"blocks.*.attn": GATHER, "blocks.*.mlp": GATHER}
        modules |= {"embed": {"style": "rowwise", "input": "replicate", "output": "shard(1)"}}
        modules["head"] = {**modules["head"], "input": "shard(1)"}
    top = ("embed", "norm", "head")
    for key, style in styles.items():
        modules[key if key in top else "blocks.*." + key.replace("__", ".")] = style
    return Plan(modules={k: s for k, s in modules.items() if s is not None}, loss=loss, name="gpt")


HEADS = {"attn__qkv": None} | {f"attn__{n}": "colwise" for n in "qkv"}
FUSED_MLP = {"mlp__up": None, "mlp__gate_up": "colwise"}


def entropy_loss(logits: Tensor, inputs: tuple[Any, ...]) -> Tensor:
    flat, targets = logits.flatten(0, 1), inputs[0].roll(-1, 1).flatten()
    log_p = F.log_softmax(flat, dim=-1)
    entropy = -(log_p.exp() * log_p).sum(-1).mean()
    entropy = entropy.full_tensor() if isinstance(entropy, DTensor) else entropy
    return F.cross_entropy(flat, targets) - 0.1 * entropy


def smooth_loss(logits: Tensor, inputs: tuple[Any, ...]) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), inputs[0].flatten(), label_smoothing=0.1)


def shared_up() -> nn.Module:
    """Two layers with one weight between them."""
    model = two_blocks()
    first, second = (block.mlp.up for block in model.blocks)
    second.weight = first.weight
    return model


def shared_blocks() -> nn.Module:
    model = two_blocks()
    model.again = model.blocks[0].mlp.up  # type: ignore[assignment]
    return model


def shared_plan(style: str) -> Plan:
    plan = gpt_plan()
    return replace(plan, modules={**plan.modules, "again": style})


def second_name_plan() -> Plan:
    """Names the shared module by its second name alone."""
    named = gpt_plan().modules
    one = {"blocks.1.mlp.up": named["blocks.*.mlp.up"], "again": named["blocks.*.mlp.up"]}
    return Plan({key: style for key, style in named.items() if key != "blocks.*.mlp.up"} | one)


def frozen() -> nn.Module:
    return llama().requires_grad_(False)


def parallel_already() -> nn.Module:
    from colrow.dryrun.fake_world import fake_tp_mesh

    model = llama()
    with fake_tp_mesh(4) as mesh:
        weight = model.get_parameter("norm.weight")
        model.get_submodule("norm").register_parameter(
            "weight", nn.Parameter(distribute_tensor(weight.detach(), mesh, [Replicate()]))
        )
    return model


@dataclass(frozen=True)
class Case:
    """A broken plan; `folding` is the code where torch folds [B, T, D] to rows for a linear layer, and so refuses a
    sequence that is sharded (torch 2.11)."""

    code: str
    model: Callable[[], nn.Module]
    plan: Callable[[], Plan]
    where: str = ""
    options: dict[str, Any] | None = None
    folding: str = ""

    @property
    def expected(self) -> str:
        """The code on this torch."""
        folds = tuple(int(part) for part in torch.__version__.split(".")[:2]) < (2, 12)
        return self.folding if folds and self.folding else self.code


def computed_weight(layer: nn.Linear) -> nn.Linear:
    """As torch.nn.utils.weight_norm leaves it."""
    raw = layer.weight
    del layer.weight
    layer.raw, layer.weight = raw, raw / raw.norm()  # type: ignore[assignment]
    return layer


LOCAL_HEAD = {"style": "colwise", "input": "shard(1)"}
BROKEN: dict[str, Case] = {
    # names
    "misspelt key": Case("CR101", llama, lambda: preset(self_attn__q_porj="colwise"), "layers.*.self_attn.q_porj"),
    "key with model prefix": Case("CR101", llama, lambda: Plan({"model.norm": "sequence"}), "model.norm"),
    "key of one layer too many": Case("CR101", llama, lambda: Plan({"layers.7.mlp.up_proj": "colwise"})),
    "pattern of no layer": Case("CR101", llama, lambda: Plan({"layers.[7-9].mlp.up_proj": "colwise"})),
    "style on the model": Case("CR206", llama, lambda: replace(preset(), modules={**preset().modules, "": "colwise"})),
    "two patterns": Case(
        "CR102", llama, lambda: replace(preset(), modules={**preset().modules, "layers.0.mlp": GATHER})
    ),
    "wildcard for all": Case("CR102", llama, lambda: Plan({"*": "replicate", "norm": "sequence"}), "norm"),
    "shared module": Case("CR103", shared_blocks, lambda: shared_plan("rowwise"), "blocks.0.mlp.up"),
    "moving average of sequence shards": Case(
        "CR415", lambda: two_blocks(block=m.AveragingBlock), lambda: gpt_plan(sequence=True), "blocks.*.average"
    ),
    "buffer assigned from sequence shards": Case(
        "CR415", lambda: two_blocks(block=m.AssigningBlock), lambda: gpt_plan(sequence=True), "blocks.*.average"
    ),
    "batch norm of sequence shards": Case(
        "CR415",
        lambda: two_blocks(block=m.BatchNormBlock),
        lambda: gpt_plan(sequence=True, bn="grad_sum"),
        "blocks.*.bn.running_mean",
    ),
    "parallel already": Case("CR104", parallel_already, preset, "norm"),
    "empty plan": Case("CR105", shallow, lambda: Plan({}, name="empty"), "plan empty"),
    "changed model": Case("CR106", lambda: llama("tied"), lambda: preset().made_for(llama()), "plan llama"),
    # sizes
    "ffn": Case("CR201", lambda: llama(intermediate_size=90), preset, "layers.*.mlp.gate_proj"),
    "ffn, row": Case("CR201", lambda: llama(intermediate_size=90), lambda: Plan({"layers.*.mlp.down_proj": "rowwise"})),
    "query heads": Case("CR202", lambda: llama(num_attention_heads=6, num_key_value_heads=2), preset),
    "kv heads": Case(
        "CR203", lambda: llama("kv3"), lambda: preset(self_attn__k_proj="colwise", self_attn__v_proj="colwise")
    ),
    "one kv head": Case(
        "CR203", lambda: llama("kv1"), lambda: preset(self_attn__k_proj="colwise", self_attn__v_proj="colwise")
    ),
    "vocabulary": Case("CR204", lambda: llama(vocab_size=9), lambda: Plan({"embed_tokens": "rowwise"}), "embed_tokens"),
    "sequence": Case("CR205", llama, preset, "input", {"seq_len": 18}),
    "short sequence": Case("CR205", llama, lambda: preset("article"), "input", {"seq_len": 2}),
    "own linear class": Case(
        "CR206",
        lambda: two_blocks(mlp=lambda: nn.Sequential(m.OwnLinear(m.D, m.D))),
        lambda: gpt_plan(mlp__up=None, mlp__down=None, mlp__0="colwise"),
        "blocks.*.mlp.0",
    ),
    "colwise on a norm": Case("CR206", llama, lambda: preset(input_layernorm="colwise"), "layers.*.input_layernorm"),
    "packed_colwise on embedding": Case("CR206", llama, lambda: preset(embed_tokens="packed_colwise"), "embed_tokens"),
    "kv_replicate on embedding": Case("CR206", llama, lambda: preset(embed_tokens="kv_replicate"), "embed_tokens"),
    "weight norm": Case(
        "CR206",
        lambda: two_blocks(mlp=lambda: nn.Sequential(computed_weight(nn.Linear(m.D, m.D)))),
        lambda: gpt_plan(mlp__up=None, mlp__down=None, mlp__0="colwise"),
        "blocks.*.mlp.0",
    ),
    "weight norm, packed": Case(
        "CR206",
        lambda: two_blocks(mlp=lambda: nn.Sequential(computed_weight(nn.Linear(m.D, m.D)))),
        lambda: gpt_plan(mlp__up=None, mlp__down=None, mlp__0="packed_rowwise"),
        "blocks.*.mlp.0",
    ),
    "weight norm by a parametrization": Case(
        "CR206",
        lambda: two_blocks(mlp=lambda: nn.Sequential(weight_norm(nn.Linear(m.D, m.D)))),
        lambda: gpt_plan(mlp__up=None, mlp__down=None, mlp__0="colwise"),
        "blocks.*.mlp.0",
    ),
    "weight norm by a parametrization, row": Case(
        "CR206",
        lambda: two_blocks(mlp=lambda: nn.Sequential(weight_norm(nn.Linear(m.D, m.D)))),
        lambda: gpt_plan(mlp__up=None, mlp__down=None, mlp__0={"style": "rowwise", "input": "replicate"}),
        "blocks.*.mlp.0",
    ),
    "adapter inside": Case(
        "CR207",
        lambda: two_blocks(mlp=lambda: nn.Sequential(m.LoraLinear(m.D, m.D))),
        lambda: gpt_plan(mlp__up=None, mlp__down=None, mlp__0="colwise"),
        "blocks.*.mlp.0",
    ),
    "adapter inside a row linear": Case(  # right, with its own gather
        "CR408",
        lambda: two_blocks(mlp=lambda: nn.Sequential(nn.Linear(m.D, m.D), m.LoraLinear(m.D, m.D))),
        lambda: gpt_plan(mlp__up=None, mlp__down=None, mlp__0="colwise", mlp__1="rowwise"),
        "blocks.*.mlp.1.b",
    ),
    "fused qkv, chunk": Case("CR208", lambda: two_blocks(lambda: m.Attention("parts")), gpt_plan, "blocks.*.attn"),
    "fused qkv, view": Case("CR208", lambda: two_blocks(lambda: m.Attention("view")), gpt_plan, "blocks.*.attn"),
    "fused gate and up, chunk": Case(
        "CR208", lambda: two_blocks(mlp=m.GatedMLP), lambda: gpt_plan(**FUSED_MLP), "blocks.*.mlp"
    ),
    "fused gate and up, split": Case(
        "CR208", lambda: m.Gpt(mlp=lambda: m.GatedMLP("split")), lambda: gpt_plan(**FUSED_MLP)
    ),
    "head count, view": Case("CR209", lambda: two_blocks(m.HeadCount), lambda: gpt_plan(**HEADS), "blocks.*.attn"),
    "head count, unflatten": Case("CR209", lambda: m.Gpt(lambda: m.HeadCount("unflatten")), lambda: gpt_plan(**HEADS)),
    "head count, reshape": Case("CR209", lambda: m.Gpt(lambda: m.HeadCount("reshape")), lambda: gpt_plan(**HEADS)),
    "inputs of unequal number": Case(
        "CR211", llama, lambda: preset(mlp={"style": "prepare_input", "input": ["shard(1)"]})
    ),
    "shards of a dim that is not there": Case(
        "CR211", llama, lambda: preset(lm_head={"style": "local_shards", "shards": {"weight": 9}}), "lm_head"
    ),
    "sequence on a block": Case("CR206", llama, lambda: preset(mlp="sequence"), "layers.*.mlp"),
    "heads that nobody states": Case("CR211", lambda: m.Gpt(), lambda: gpt_plan(attn__qkv="kv_replicate")),
    "buffer": Case(
        "CR212",
        lambda: two_blocks(mlp=lambda: nn.Sequential(m.ScaledLinear(m.D, m.D))),
        lambda: gpt_plan(mlp__up=None, mlp__down=None, mlp__0="colwise"),
        "blocks.*.mlp.0",
    ),
    "segments": Case(
        "CR210",
        lambda: m.Gpt(lambda: m.Attention("parts")),
        lambda: gpt_plan(attn__qkv={"style": "packed_colwise", "segments": [30, 34, 32]}),
    ),
    "whole keys and values beside split queries": Case(
        "CR213",
        lambda: llama(num_attention_heads=8),
        lambda: preset(self_attn__k_proj="local_shards", self_attn__v_proj="local_shards"),
        "layers.*.self_attn",
        options={"mesh": Mesh(tp=2)},
    ),
    "whole values that do not divide": Case(
        "CR213", llama, lambda: preset(self_attn__v_proj="local_shards"), "layers.0.self_attn"
    ),
    # head, loss, ties
    "local logits": Case("CR301", llama, lambda: preset(lm_head=LOCAL_HEAD), "lm_head"),
    "local logits, ordinary loss": Case(
        "CR301", llama, lambda: preset(loss="replicated", lm_head=LOCAL_HEAD), "lm_head"
    ),
    "local logits, fast styles": Case("CR301", shallow, lambda: preset("llama-fast", lm_head="fast_column"), "loss"),
    "local logits, fast styles and ordinary loss": Case(
        "CR301", shallow, lambda: preset("llama-fast", "replicated", lm_head="fast_column"), "loss"
    ),
    "local logits of a gpt": Case("CR301", m.Gpt, lambda: gpt_plan(head="colwise"), "head"),
    "gathered logits": Case("CR302", shallow, lambda: preset(lm_head={**LOCAL_HEAD, "output": "replicate"}), "lm_head"),
    "head without style": Case("CR302", m.Gpt, lambda: gpt_plan("vocab_parallel", head=None), "loss"),
    "split logits, ordinary loss": Case(
        "CR303", shallow, lambda: preset(loss="replicated", lm_head={**LOCAL_HEAD, "use_local_output": False})
    ),
    "tie, one left out": Case("CR304", lambda: m.Gpt(tied=True), gpt_plan, "embed.weight"),
    "tie, both split differently": Case(
        "CR304", lambda: shallow("tied"), lambda: preset(embed_tokens={"style": "colwise", "output": "shard(1)"})
    ),
    "entropy in the loss": Case("CR305", shallow, preset, "loss", {"loss": entropy_loss}),
    "tie over stages": Case(
        "CR307", lambda: llama("tied"), preset, "embed_tokens.weight", {"mesh": Mesh(pp=2, tp=4), "seq_len": 16}
    ),
    "layers shared over stages": Case(
        "CR307", shared_up, gpt_plan, "blocks.0.mlp.up.weight", {"mesh": Mesh(pp=2, tp=4), "seq_len": 16}
    ),
    "label smoothing": Case("CR306", shallow, preset, "loss", {"loss": smooth_loss}),
    # activations
    "row linear missing": Case(
        "CR401", shallow, lambda: preset(drop="layers.*.mlp.down_proj"), "layers.0.mlp.down_proj"
    ),
    "column for row": Case("CR407", shallow, lambda: preset(mlp__down_proj="colwise")),
    "row for column": Case("CR401", shallow, lambda: preset(mlp__up_proj={"style": "rowwise", "input": "replicate"})),
    "q_proj missing": Case(
        "CR402", shallow, lambda: preset(drop="layers.*.self_attn.q_proj"), "layers.0.self_attn.q_proj"
    ),
    "head missing": Case("CR402", shallow, lambda: preset(drop="lm_head"), "lm_head", folding="CR404"),
    "heads stay DTensors": Case(
        "CR402", shallow, lambda: preset(self_attn__q_proj={"style": "colwise", "use_local_output": False})
    ),
    "keyword input": Case("CR403", lambda: m.Gpt(mlp=m.KeywordMLP), gpt_plan),
    "arguments of unequal number": Case(
        "CR403",
        shallow,
        lambda: preset(mlp={"style": "prepare_input", "input": ["shard(1)", "none"], "desired": ["replicate", "none"]}),
    ),
    "softmax over a part of the features": Case(
        "CR413", lambda: two_blocks(mlp=m.SoftmaxMLP), gpt_plan, "blocks.*.mlp"
    ),
    "attention on DTensors": Case(
        "CR404", m.Gpt, lambda: gpt_plan(attn__qkv={"style": "colwise", "use_local_output": False}), "blocks.0.attn"
    ),
    "parts put together that are none": Case(
        "CR405",
        m.Gpt,
        lambda: gpt_plan(
            attn={"style": "prepare_output", "output": "shard(1)", "desired": "replicate"},
            attn__out={"style": "rowwise", "output": "shard(2)"},
        ),
    ),
    "control flow on values": Case(
        "CR410",
        lambda: m.Gpt(m.HeadCount, m.ValueMLP),
        lambda: gpt_plan(attn__qkv=None, attn__out=None),
        "blocks.0.mlp",
    ),
    "embedding whole": Case(
        "CR406",
        shallow,
        lambda: preset(embed_tokens={"style": "rowwise", "input": "replicate"}),
        "layers.0.input_layernorm",
    ),
    "embedding missing": Case("CR406", shallow, lambda: preset(drop="embed_tokens"), "layers.0.input_layernorm"),
    "mlp output whole": Case("CR406", m.Gpt, lambda: gpt_plan(norm="sequence")),
    "shard taken for whole": Case(
        "CR407",
        llama,
        lambda: preset(
            mlp={"style": "prepare_input", "input": ["replicate"], "desired": ["replicate"]},
            post_attention_layernorm={"style": "sequence", "use_local_output": True},
        ),
        "layers.*.mlp",
    ),
    "no gather before attention": Case("CR408", shallow, lambda: preset(drop="layers.*.self_attn"), folding="CR404"),
    "no gather before mlp": Case("CR408", shallow, lambda: preset(drop="layers.*.mlp"), folding="CR404"),
    "bias on every rank": Case(
        "CR409",
        lambda: two_blocks(mlp=lambda: m.MLP(bias=True)),
        lambda: gpt_plan(mlp__down=BiasOnEveryRank()),
        "blocks.*.mlp.down",
    ),
    "sum of equal values": Case("CR409", two_blocks, lambda: gpt_plan(norm1=SumOfEqual()), "blocks.*.norm1"),
    "sums in bf16": Case(
        "CR411", shallow, preset, "tp", {"param_dtype": torch.bfloat16, "reduce_dtype": torch.float32}
    ),
    "norm over a part of the features": Case(
        "CR414", lambda: two_blocks(mlp=m.NormedMLP), gpt_plan, "blocks.*.mlp", {"mesh": Mesh(tp=2)}
    ),
    # gradients
    "norm missing": Case(
        "CR501", llama, lambda: preset(drop="layers.*.input_layernorm"), "layers.*.input_layernorm.weight"
    ),
    "norm after attention missing": Case("CR501", shallow, lambda: preset(drop="layers.*.post_attention_layernorm")),
    "last norm missing": Case("CR501", shallow, lambda: preset(drop="norm"), "norm.weight"),
    "norm missing in article": Case("CR501", shallow, lambda: preset("article", drop="layers.*.input_layernorm")),
    "q_norm missing": Case(
        "CR501",
        lambda: llama("qk_norm"),
        lambda: preset(drop="layers.*.self_attn.q_norm"),
        "layers.*.self_attn.q_norm.weight",
    ),
    "k_norm missing": Case("CR501", lambda: shallow("qk_norm"), lambda: preset(drop="layers.*.self_attn.k_norm")),
    "k_norm missing, kv heads whole": Case(
        "CR501", lambda: shallow("qk_norm_kv3"), lambda: preset(drop="layers.*.self_attn.k_norm")
    ),
    "scale on a part of the features": Case(
        "CR501", lambda: two_blocks(mlp=m.LatentNormMLP), gpt_plan, "blocks.*.mlp.scale.weight"
    ),
    "adapter on sequence shards": Case(
        "CR501",
        lambda: two_blocks(block=m.AdapterBlock),
        lambda: gpt_plan(sequence=True, norm2={"style": "sequence", "use_local_output": True}),
        "blocks.*.a.weight",
    ),
    "norms of a gpt missing": Case("CR501", m.Gpt, lambda: gpt_plan(sequence=True, norm1=None)),
    "a block and a column in it sum the gradient": Case(
        "CR502", llama, lambda: preset(**block_mlp(gate_proj="colwise")), "layers.*.mlp"
    ),
    "q_norm summed where whole": Case(
        "CR502",
        lambda: llama("qk_norm"),
        lambda: preset("article", self_attn__q_norm="grad_sum"),
        "layers.*.self_attn.q_norm.weight",
    ),
    "norm summed where whole": Case("CR502", m.Gpt, lambda: gpt_plan(norm="grad_sum")),
    "activation gradient": Case(
        "CR504",
        m.Gpt,
        lambda: gpt_plan(
            sequence=True,
            mlp=TakenAsEqual(),
            mlp__up=ColumnWithoutReduce(),
            norm2={"style": "sequence", "use_local_output": True},
        ),
    ),
    "cut off from the graph": Case("CR503", m.Gpt, lambda: gpt_plan(norm=Detach()), "norm.bias"),
    "all frozen": Case("CR505", frozen, preset, "model"),
}


class HandedOn(RowwiseParallel):
    """A vocabulary split of a user's own: its output is handed on while the collective runs."""


def handed_on() -> Plan:
    return gpt_plan(sequence=True, embed=HandedOn(input_layouts=Replicate(), output_layouts=Shard(1)))


if not COMPILED_BLOCKS_WAIT:
    BROKEN["compiled block after a collective"] = Case("CR412", m.Gpt, handed_on, "blocks.0", {"compiled": True})

"""A model and a plan from a seed; and every step alone, at every place.

Half of the composed cases hold something that is likely to be wrong on a shard, and the rest holds the same kinds of
code where the tensor is complete, or where a shard is enough. That is a matter of sampling: what a case is, `truth`
says.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from benchmarks.composed.models import (
    FUSED,
    GROUPS,
    STATISTICS,
    WITHOUT_DIM,
    Architecture,
    Model,
    Sizes,
    Step,
)
from benchmarks.composed.modules import MODULES
from colrow.plans.loss import Loss
from colrow.plans.plan import Plan

SIZES = (
    Sizes(),
    Sizes(batch=4, tokens=8, features=24, heads=4, hidden=48, vocabulary=32),
    Sizes(batch=2, tokens=16, features=16, heads=4, hidden=16, vocabulary=16),  # sizes that say nothing
)
DIMS = {"queries": 4, "scores": 4, "heads": 4, "joined": 3, "features": 3, "stream": 3, "normed": 3, "embedded": 3,
        "final": 3, "logits": 3}  # fmt: skip
"""Places, and how many dims a tensor has there."""
ATTENTION = ("separate", "fused", "fused by split", "by view", "by heads")
GATHER = {"style": "prepare_input", "input": ["shard(1)"], "desired": ["replicate"]}
TP = 2


@dataclass(frozen=True)
class Split:
    """What the plan splits, and how."""

    attention: str = "column"  # column, packed, or empty
    mlp: str = "column"  # column, packed, block, gathered, or empty
    sequence: bool = False
    local_norms: bool = False
    loss: Loss = "replicated"
    embedding: str = ""
    head: bool = True
    fast: bool = False
    """By the fast styles: each rank has a shard of the flattened tokens, on local tensors."""

    def dim(self, place: str) -> int | None:
        """The sharded dim of local tensors at a place."""
        if place in ("queries", "scores", "heads"):
            return 1 if self.attention else None
        if place == "joined":
            return 2 if self.attention else None
        if place == "features":
            return 2 if self.mlp not in ("", "gathered") else None
        if place in ("stream", "embedded") or (place in ("normed", "final") and self.local_norms):
            return 1 if self.sequence else None
        return None


@dataclass(frozen=True)
class Case:
    """A model, and a plan for it."""

    name: str
    made: Architecture
    modules: dict[str, Any] = field(hash=False)
    loss: Loss
    train: bool = True
    suspect: str = ""
    """What of it is likely to be wrong, if anything."""

    def model(self) -> nn.Module:
        model = Model(self.made)
        return model if self.train else model.eval()

    def plan(self) -> Plan:
        return Plan(modules=self.modules, loss=self.loss, name="composed")


def plan_modules(made: Architecture, split: Split) -> dict[str, Any]:
    """The keys of the plan."""
    modules = _fast_modules(made, split) if split.fast else _plain_modules(made, split)
    for (layer, place), steps in made.steps.items():
        for i, step in enumerate(steps):
            if step.group == "module" and step.style is not None:
                modules |= _styled(layer, place, i, step)
    return modules


def _fast_modules(made: Architecture, split: Split) -> dict[str, Any]:
    """As `llama-fast` does."""
    s = made.sizes
    modules: dict[str, Any] = dict.fromkeys(("blocks.*.norm1", "blocks.*.norm2", "norm"), "grad_sum")
    modules["embed"] = "fast_embedding"
    modules["head"] = "fast_head" if split.loss == "vocab_parallel" else {"style": "fast_head", "gather": True}
    if "attention" in made.sublayers:
        columns = ["q", "k", "v"] if made.attention == "separate" else ["qkv"]
        in_one = made.attention not in ("separate", "by heads")
        style = {"style": "fast_colwise", "segments": [s.features] * 3} if in_one else "fast_colwise"
        modules["blocks.*.attn"] = {"style": "fast_gather", "columns": columns}
        modules |= {f"blocks.*.attn.{n}": style for n in columns} | {"blocks.*.attn.out": "fast_rowwise"}
    if "mlp" in made.sublayers:
        columns = {"plain": ["up"], "gated": ["gate", "up"]}.get(made.mlp, ["gate_up"])
        in_one = made.mlp not in ("plain", "gated", "interleaved", "by pairs")
        segments = {"segments": [s.hidden] * 2} if in_one else {}
        if split.mlp == "block":
            modules["blocks.*.mlp"] = {"style": "fast_block", "gather": [0], "scatter": [0]}
            modules |= {f"blocks.*.mlp.{n}": {"style": "packed_colwise", **segments} for n in columns}
            modules["blocks.*.mlp.down"] = {"style": "packed_rowwise", "output": "partial"}
        else:
            modules["blocks.*.mlp"] = {"style": "fast_gather", "columns": columns}
            modules |= {f"blocks.*.mlp.{n}": {"style": "fast_colwise", **segments} for n in columns}
            modules["blocks.*.mlp.down"] = "fast_rowwise"
    return modules


def _plain_modules(made: Architecture, split: Split) -> dict[str, Any]:
    s, sequence = made.sizes, split.sequence
    inside, outside = ("shard(1)", "shard(1)") if sequence else ("replicate", "replicate")
    row = {"style": "rowwise", "output": "shard(1)"} if sequence else "rowwise"
    packed_row = {"style": "packed_rowwise", "output": outside}
    modules: dict[str, Any] = {}
    if split.attention and "attention" in made.sublayers:
        if made.attention == "separate":
            style = {"style": "packed_colwise", "input": "replicate"} if split.attention == "packed" else "colwise"
            modules |= {f"blocks.*.attn.{n}": style for n in "qkv"}
        elif made.attention == "by heads":
            modules["blocks.*.attn.qkv"] = "colwise"
        else:
            modules["blocks.*.attn.qkv"] = {"style": "packed_colwise", "segments": [s.features] * 3} | (
                {"input": "replicate"}
            )
        modules["blocks.*.attn.out"] = packed_row if split.attention == "packed" else row
    fused = made.mlp not in ("plain", "gated")
    columns = {"plain": ["up"], "gated": ["gate", "up"]}.get(made.mlp, ["gate_up"])
    segments = {"segments": [s.hidden] * 2} if fused and made.mlp not in ("interleaved", "by pairs") else {}
    if "mlp" not in made.sublayers:
        pass
    elif split.mlp == "block":
        modules["blocks.*.mlp"] = {"style": "local_block", "input": [inside], "output": [outside]}
        modules |= {f"blocks.*.mlp.{n}": {"style": "packed_colwise", **segments} for n in columns}
        modules["blocks.*.mlp.down"] = {"style": "packed_rowwise", "output": "partial"}
    elif split.mlp == "gathered":
        modules |= {f"blocks.*.mlp.{n}": {"style": "colwise", "output": "replicate"} for n in columns}
        modules["blocks.*.mlp.down"] = {"style": "rowwise", "input": "replicate", "output": outside}
    elif split.mlp:
        packed = {"style": "packed_colwise", "input": "replicate", **segments}
        style = packed if segments or split.mlp == "packed" else "colwise"
        modules |= {f"blocks.*.mlp.{n}": style for n in columns}
        modules["blocks.*.mlp.down"] = packed_row if split.mlp == "packed" else row
    if sequence:
        local = {"style": "sequence", "use_local_output": True}
        modules |= dict.fromkeys(
            ("blocks.*.norm1", "blocks.*.norm2", "norm"), local if split.local_norms else "sequence"
        )
        absent = {"attention": "norm1", "mlp": "norm2"}
        for sublayer in absent.keys() - set(made.sublayers):  # its output meets the residual stream's local tensors
            modules[f"blocks.*.{absent[sublayer]}"] = local
        if "attention" in made.sublayers:
            modules["blocks.*.attn"] = GATHER
        if "mlp" in made.sublayers and split.mlp != "block":
            modules["blocks.*.mlp"] = GATHER
        modules["embed"] = {"style": "rowwise", "input": "replicate", "output": "shard(1)"}
    elif split.embedding and not made.tied:
        modules["embed"] = {"style": split.embedding, "output": "replicate"} | (
            {"input": "replicate"} if split.embedding == "rowwise" else {}
        )
    if split.loss == "vocab_parallel":
        modules["head"] = {"style": "colwise", "use_local_output": False}
    elif split.head or sequence:
        modules["head"] = {"style": "colwise", "output": "replicate"}
    if sequence:
        modules["head"] = {**modules["head"], "input": "shard(1)"}
    if made.tied and not sequence:
        modules["embed"] = {"style": "rowwise", "input": "replicate"}
    return modules


def _styled(layer: int, place: str, i: int, step: Step) -> dict[str, Any]:
    owner = "" if place in ("embedded", "final", "logits") else f"blocks.{layer}."
    owner += {"features": "mlp.", "queries": "attn.", "scores": "attn.", "heads": "attn.", "joined": "attn."}.get(
        place, ""
    )
    path = f"{owner}at_{place}.step{i}"
    holders = [
        n for n, m in MODULES[step.name](4).named_modules() if next(m.parameters(recurse=False), None) is not None
    ]
    return {f"{path}.{n}" if n else path: step.style for n in holders}


def random_split(rng: random.Random) -> Split:
    sequence = rng.random() < 0.4
    # a module that the plan leaves out cannot take a shard of the tokens
    complete = () if sequence else ("",)
    gathered = () if sequence else ("gathered",)
    return Split(
        attention=rng.choice(("column", "column", "packed", *complete)),
        mlp=rng.choice(("column", "column", "column", "packed", "block", *complete, *gathered)),
        sequence=sequence,
        local_norms=sequence and rng.random() < 0.6,
        loss=rng.choice(("replicated", "vocab_parallel")),
        embedding=rng.choice(("", "rowwise", "colwise")),
        head=rng.random() < 0.7,
    )


def compose(seed: int, *, fast: bool = False) -> Case:
    """The case of a seed; `fast`: of another list, whose plans are of the fast styles."""
    rng = random.Random(f"fast {seed}" if fast else f"composed {seed}")
    split = random_split(rng)
    if fast:
        split = replace(split, fast=True, sequence=True, local_norms=True, attention="column", embedding="")
        split = replace(split, mlp="block" if split.mlp == "block" else "column", head=True)
    sizes = rng.choice(SIZES)
    made = Architecture(
        sizes,
        sublayers=rng.choice((("attention", "mlp"), ("attention",), ("mlp",))),
        layers=rng.choice((1, 1, 1, 2)),
        attention=rng.choice(ATTENTION),
        kv_heads=sizes.heads,
        mlp=rng.choice(("plain", "plain", "gated", *FUSED)),
        bias=rng.random() < 0.4,
        written_out=rng.random() < 0.3,
        rotary=rng.random() < 0.3,
        tied=rng.random() < 0.15,
        wrapped=rng.random() < 0.3,
    )
    if fast:  # a table for both is refused
        made = replace(made, tied=False)
    if made.attention == "separate" and rng.random() < 0.3:
        made = replace(made, kv_heads=sizes.heads // 2)
    suspect, plain = "", False
    steps: dict[tuple[int, str], list[Step]] = {}

    def add(place: str, step: Step) -> None:
        layer = 0 if place in ("embedded", "final", "logits") else rng.randrange(made.layers)
        here = steps.setdefault((layer, place), [])
        here.insert(rng.randrange(len(here) + 1), step)

    if rng.random() < 0.7:
        made, plain, suspect = _with_suspect(rng, made, split, add)
    for _ in range(rng.choice((1, 2, 2, 3))):
        add(*_harmless(rng, made, split))
    made = replace(made, steps={key: tuple(value) for key, value in steps.items()})
    if rng.random() < 0.1:
        made = replace(made, parameter_hooks=((rng.choice(("norm.weight", "blocks.0.norm1.bias")), "halved"),))
    modules = plan_modules(made, split)
    if plain:  # a fused weight whose segments are not split each on its own
        for key in ("blocks.*.attn.qkv", "blocks.*.mlp.gate_up"):
            if isinstance(modules.get(key), dict) and "segments" in modules[key]:
                modules[key] = "colwise"
    return Case(_text(seed, made, split, suspect), made, modules, split.loss, rng.random() < 0.8, suspect)


def _places(made: Architecture) -> list[str]:
    absent = {"attention": ("queries", "scores", "heads", "joined"), "mlp": ("features",)}
    gone = {place for sublayer, places in absent.items() if sublayer not in made.sublayers for place in places}
    return [place for place in DIMS if place not in gone]


def _with_suspect(rng: random.Random, made: Architecture, split: Split, add: Any) -> tuple[Architecture, bool, str]:
    """Add one thing that is likely to be wrong: the architecture, whether fused weights are split as one, its name."""
    places = [place for place in _places(made) if split.dim(place) is not None]
    kinds = ["step"] * 12 + ["module"] * 4 + ["output"] * 2 + ["weight", "fused", "fused"]
    kind = rng.choice(kinds)
    has_mlp = "mlp" in made.sublayers
    if kind == "fused" and (split.mlp or split.attention):
        return made, True, "fused weights split as one"
    if (
        kind == "weight" and has_mlp and split.mlp in ("packed", "block", "")
    ):  # else it is a DTensor, and meets plain tensors
        return replace(made, weight=rng.choice(STATISTICS)), False, "a statistic of a weight"
    if kind == "output":
        extra = rng.choice(("activity", "stream") if has_mlp else ("stream",))
        return replace(made, extra=extra), False, f"the output's {extra}"
    if not places:
        return made, False, ""
    place = rng.choice(places)
    if kind == "module":
        step = Step("module", rng.choice(GROUPS["module"]), style=rng.choice((None, "grad_sum")))
    else:
        group = rng.choice(("along",) * 4 + ("all", "random", "dropout", "function", "gradient", "hook", "module hook"))
        dim = split.dim(place)
        assert dim is not None
        step = Step(group, rng.choice(GROUPS[group]), dim)
    add(place, step)
    return made, False, f"{place}: {step}"


def _harmless(rng: random.Random, made: Architecture, split: Split) -> tuple[str, Step]:
    """A step where the tensor is complete, along another dim, or element by element."""
    place = rng.choice(_places(made))
    sharded = split.dim(place)
    groups = ["element", "element", "along", "along", "along", "function", "gradient", "hook", "module hook"]
    if sharded is None and place != "logits":
        groups += ["all", "random", "dropout", "module", "module"]
    elif sharded is not None and sharded < DIMS[place] - 1:
        groups += ["module"]
    group = rng.choice(groups)
    names, style = GROUPS[group], None
    if group == "module" and sharded is not None:
        names, style = (
            ["scale", "shift", "temperature", "LayerNorm", "RMSNorm", "linear", "adapter", "PReLU"],
            "grad_sum",
        )
    if group in ("gradient", "hook", "module hook"):
        of_all = ("all" in name or name == "noise" for name in names)
        names = [n for n, bad in zip(names, of_all, strict=True) if sharded is None or not bad]
    dims = [d for d in range(DIMS[place]) if d != sharded]
    return place, Step(group, rng.choice(names), rng.choice(dims), style)


def _text(seed: int, made: Architecture, split: Split, suspect: str) -> str:
    steps = "; ".join(f"{place}: {step}" for (_, place), found in made.steps.items() for step in found)
    sizes = f"{made.sizes.tokens} tokens, {' and '.join(made.sublayers)}"
    plan = ", ".join(f"{k}={v}" for k, v in vars(split).items() if v)
    return f"{seed}: {made.attention}, {made.mlp}, {sizes} | {plan} | {steps}" + (
        f" | suspect {suspect}" if suspect else ""
    )


def singles() -> Iterator[Case]:
    """Every step alone at every place, of every dim."""
    sequence = Split(sequence=True, local_norms=True)
    for place, ndim in DIMS.items():
        for split in (Split(), sequence) if place in ("stream", "normed", "final") else (Split(),):
            for group, names in GROUPS.items():
                for name in names:
                    for dim in (0,) if group in WITHOUT_DIM else range(1, ndim):
                        for style in (None, "grad_sum") if group == "module" and split.dim(place) else (None,):
                            step = Step(group, name, dim, style)
                            made = Architecture(steps={(0, place): (step,)})
                            suspect = f"{place}: {step}" if split.dim(place) in (dim, None) else ""
                            text = f"{place}{', sequence' if split.sequence else ''}: {step}"
                            yield Case(text, made, plan_modules(made, split), split.loss, True, suspect)
    for fused in FUSED:
        for mlp in ("column", "packed", "block", "gathered"):
            made, split = Architecture(mlp=fused), Split(mlp=mlp)
            modules = plan_modules(made, split)
            yield Case(f"{fused}: {mlp}", made, modules, "replicated")
            modules = modules | {"blocks.*.mlp.gate_up": "colwise"}
            yield Case(f"{fused}: {mlp}, as one", made, modules, "replicated")
    for attention in ATTENTION:
        for how in ("column", "packed"):
            for kv in (8, 4):
                made, split = Architecture(attention=attention, kv_heads=kv, rotary=True), Split(attention=how)
                modules = plan_modules(made, split)
                yield Case(f"{attention}: {how}, {kv}", made, modules, "replicated")
                if attention != "separate":
                    yield Case(f"{attention}: as one", made, modules | {"blocks.*.attn.qkv": "colwise"}, "replicated")
    for weight in STATISTICS:
        for mlp in ("column", "packed", "block", "gathered", ""):
            made, split = Architecture(weight=weight), Split(mlp=mlp)
            yield Case(f"weight {weight}: {mlp}", made, plan_modules(made, split), "replicated")
    for extra in ("activity", "stream", "z loss"):
        for split in (Split(), Split(sequence=True), Split(loss="vocab_parallel"), Split(mlp="gathered")):
            made = Architecture(extra=extra)
            yield Case(f"output {extra}: {split}", made, plan_modules(made, split), split.loss)

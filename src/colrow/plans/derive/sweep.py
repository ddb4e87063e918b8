"""Derive and prove a plan for every causal language model of the installed transformers, on tiny configurations.

    python -m colrow.plans.derive.sweep --tp 2 -o docs/models.md [NAME ...]

Each model runs in a process of its own under a time limit. A model is

    full          at least two reductions a layer, and most of its matrices split
    partial       something is split; the reason names what is not
    whole         nothing is split; the reason says why
    fails         the plan raises when it runs (never a wrong number)
    untraceable   torch.export cannot trace it
    not built     a tiny configuration does not give a model that runs
    WRONG         loss or a gradient differs from the unsharded model: must never stand in the table
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from colrow.errors import PlanError
from colrow.plans.derive.derivation import Derivation, derive
from colrow.plans.derive.parity import parity
from colrow.plans.derive.trace import default_inputs, trace

TOLERANCE = 1e-9
TOLERANCE_FP32 = 1e-5
"""For models that compute norms or a router in fp32 whatever the weights are."""
WRONG = 1e-4
"""Beyond this it is no rounding."""

SIZES: dict[str, int] = {
    **dict.fromkeys(("vocab_size",), 256),
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "dim", "word_embed_proj_dim", "embedding_size"), 64),
    **dict.fromkeys(
        ("intermediate_size", "ffn_dim", "n_inner", "d_ff", "ffn_hidden_size", "decoder_ffn_dim", "encoder_ffn_dim"),
        128,
    ),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "num_layers", "n_layers", "decoder_layers", "encoder_layers"), 2),
    **dict.fromkeys(
        ("num_attention_heads", "n_head", "num_heads", "n_heads", "decoder_attention_heads", "encoder_attention_heads"),
        8,
    ),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads", "multi_query_group_num"), 4),
    **dict.fromkeys(("head_dim", "attention_head_dim", "kv_channels", "rotary_dim"), 8),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len", "n_ctx"), 128),
    **dict.fromkeys(("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k"), 2),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "expert_ffn_hidden_size"), 32),
    **dict.fromkeys(("kv_lora_rank",), 16),
    **dict.fromkeys(("q_lora_rank",), 24),
    **dict.fromkeys(("qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim", "qk_head_dim"), 8),
    **dict.fromkeys(("n_group", "topk_group"), 1),
    **dict.fromkeys(("first_k_dense_replace",), 1),
}
ZERO = (
    "attn_pdrop",
    "resid_pdrop",
    "embd_pdrop",
    "dropout",
    "attention_dropout",
    "hidden_dropout",
    "hidden_dropout_prob",
)


def causal_models() -> list[str]:
    """Model types of every causal language model that the installed transformers knows."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def classes(kind: str) -> tuple[Any, Any]:
    """Configuration class and model class of one type; only its own modules are imported."""
    import transformers
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    name = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[kind]
    return CONFIG_MAPPING[kind], getattr(transformers, name if isinstance(name, str) else name[0])


def tiny(config_class: Any, model_class: Any, seed: int = 0) -> nn.Module:
    """A two-layer model with small prime-free sizes, weights from `seed`, norms that are not all ones."""
    names = vars(config_class()).keys() | {k for k in SIZES if hasattr(config_class(), k)}
    chosen: dict[str, Any] = {k: v for k, v in SIZES.items() if k in names}
    chosen |= {k: 0.0 for k in ZERO if k in names}
    if "pad_token_id" in names:
        chosen["pad_token_id"] = 0
    for name in ("layer_types", "mlp_layer_types"):
        kinds = getattr(config_class(), name, None)
        if isinstance(kinds, list) and kinds:
            chosen[name] = (kinds[:1] + [k for k in kinds if k != kinds[0]][:1] + kinds)[:2]
    torch.manual_seed(seed)
    try:
        model = model_class(config_class(**chosen))
    except Exception:
        chosen.pop("num_key_value_heads", None)
        model = model_class(config_class(**chosen))
    with torch.no_grad():
        for param in model.parameters():
            if param.dim() == 1:
                param.add_(0.1 * torch.randn_like(param))
    return model.eval()


def examine(kind: str, tp: int) -> dict[str, Any]:
    """One model: its class, how much is split, the worst gradient error, and the reason for what is not split."""
    row: dict[str, Any] = {"model": kind, "tp": tp}
    try:
        config, cls = classes(kind)
        model = tiny(config, cls)
        inputs = default_inputs(model, tp)
        generator = torch.Generator().manual_seed(0)
        inputs = (torch.randint(3, 200, inputs[0].shape, generator=generator),)
        with torch.no_grad():
            model(input_ids=inputs[0], use_cache=False)
    except Exception as error:
        return row | {"verdict": "not built", "reason": _short(error)}
    try:
        model = model.double()
        with torch.no_grad():
            model(input_ids=inputs[0], use_cache=False)
    except Exception:
        model = model.float()
    try:
        trace(model, inputs)
    except PlanError as error:
        return row | {"verdict": "untraceable", "reason": _short(error)}
    derivation = derive(model, tp, inputs=inputs)
    row |= {
        "share": round(derivation.share, 3),
        "sequence_parallel": derivation.sequence_parallel,
        "loss": derivation.loss,
        "legal": derivation.legal,
    }
    try:
        proof = parity(model, derivation.plan(), tp, inputs)
    except Exception as error:
        return row | {"verdict": "fails", "reason": _short(error)}
    row |= {"loss_error": proof.loss, "gradient_error": proof.worst}
    if max(proof.loss, proof.worst) > WRONG:
        worst = max(proof.gradients, key=lambda n: proof.gradients[n])
        return row | {"verdict": "WRONG", "reason": f"{worst} {proof.worst:.1e}"}
    verdict, reason = judge(derivation, model)
    return row | {"verdict": verdict, "reason": reason}


def judge(derivation: Derivation, model: nn.Module) -> tuple[str, str]:
    """full, partial or whole, and why not full."""
    matrices = {
        n: p.numel() for n, p in model.named_parameters() if p.dim() >= 2 and any(c.isdigit() for c in n.split("."))
    }
    split = sum(size for name, size in matrices.items() if name in set(derivation.sharded))
    layers = len({".".join(n.split(".")[: [c.isdigit() for c in n.split(".")].index(True) + 1]) for n in matrices}) or 1
    inner = sum(count for name, count in derivation.reductions.items() if "*" in name)
    share = split / max(1, sum(matrices.values()))
    if share >= 0.7 and inner >= 2 * layers:
        return "full", ""
    reasons = [n for n in derivation.notes if not n.startswith("no sequence shards")]
    if not reasons:
        reasons = [f"{n}: {w}" for n, w in derivation.whole.items() if n in matrices]
    if derivation.unknown:
        reasons.append("no rule for " + ", ".join(sorted(derivation.unknown)[:4]))
    reason = "; ".join(dict.fromkeys(reasons[:2] + reasons[-1:])) or f"{inner} reductions in {layers} layers"
    return ("partial" if derivation.sharded else "whole"), reason[:220]


def _short(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:160]}"


def run(kinds: Iterable[str], tp: int, limit: float) -> list[dict[str, Any]]:
    """Each model in a process of its own, `limit` seconds at most."""
    rows = []
    for kind in kinds:
        command = [sys.executable, "-m", "colrow.plans.derive.sweep", "--one", kind, "--tp", str(tp)]
        start = time.monotonic()
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=limit, check=False)
            lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
            row = json.loads(lines[-1]) if lines else None
            if row is None:
                tail = (done.stderr.strip().splitlines() or ["no output"])[-1]
                row = {"model": kind, "tp": tp, "verdict": "fails", "reason": f"exit {done.returncode}: {tail[:160]}"}
        except subprocess.TimeoutExpired:
            row = {"model": kind, "tp": tp, "verdict": "untraceable", "reason": f"no result within {limit:.0f} s"}
        row["seconds"] = round(time.monotonic() - start, 1)
        rows.append(row)
        print(f"{kind:28s} {row['verdict']:12s} {row['seconds']:6.1f} s  {row.get('reason', '')[:90]}", flush=True)
    return rows


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown: one line a model, and the counts of each verdict."""
    counts: dict[str, int] = {}
    for row in rows:
        counts[row["verdict"]] = counts.get(row["verdict"], 0) + 1
    lines = [", ".join(f"{n} {verdict}" for verdict, n in sorted(counts.items())) + ".", ""]
    lines += [
        "| model | tp | verdict | parameters split | sequence shards | worst gradient error | reason |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        share = f"{row['share']:.0%}" if "share" in row else ""
        error = f"{row['gradient_error']:.0e}" if "gradient_error" in row else ""
        shards = {True: "yes", False: "no"}.get(row.get("sequence_parallel"), "")  # type: ignore[arg-type]
        reason = row.get("reason", "").replace("|", "/")
        lines.append(f"| {row['model']} | {row['tp']} | {row['verdict']} | {share} | {shards} | {error} | {reason} |")
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m colrow.plans.derive.sweep", description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", help="model types; all unless given")
    parser.add_argument("--tp", type=int, default=2)
    parser.add_argument("--limit", type=float, default=120.0, help="seconds for one model")
    parser.add_argument("-o", "--output", type=Path, help="where the markdown table goes")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    given = parser.parse_args(argv)
    if given.one:
        print(json.dumps(examine(given.one, given.tp)), flush=True)
        return 0
    known = causal_models()
    unknown = [m for m in given.models if m not in known]
    if unknown:
        parser.error(f"no causal language model is called {', '.join(unknown)}")
    rows = run(given.models or known, given.tp, given.limit)
    text = table(rows)
    if given.output:
        given.output.write_text(text, encoding="utf-8")
    else:
        print(text)
    return 1 if any(row["verdict"] == "WRONG" for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())

"""Language models that are not causal models of transformers, which have a sweep of their own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.models.foreign.registry import model

Built = tuple[nn.Module, Any]
VOCABULARY = 256


def ids(length: int = 34) -> Tensor:
    return torch.randint(0, VOCABULARY, (2, length))


@model("x-transformers", "Decoder")
def decoder() -> Built:
    from x_transformers import Decoder, TransformerWrapper

    layers = Decoder(dim=64, depth=2, heads=4, attn_dim_head=16, rotary_pos_emb=True, ff_glu=True)
    return TransformerWrapper(num_tokens=VOCABULARY, max_seq_len=64, attn_layers=layers), (ids(),)


@model("x-transformers", "Encoder, flash, few kv heads")
def encoder() -> Built:
    from x_transformers import Encoder, TransformerWrapper

    layers = Encoder(dim=64, depth=2, heads=4, attn_dim_head=16, attn_flash=True, attn_kv_heads=2)
    return TransformerWrapper(num_tokens=VOCABULARY, max_seq_len=64, attn_layers=layers), (ids(),)


@model("x-transformers", "Decoder, talking heads, sandwich norms")
def talking_heads() -> Built:
    from x_transformers import Decoder, TransformerWrapper

    mixed = {"attn_pre_talking_heads": True, "attn_post_talking_heads": True, "sandwich_norm": True}
    layers = Decoder(dim=64, depth=2, heads=4, attn_dim_head=16, rotary_pos_emb=True, **mixed)
    return TransformerWrapper(num_tokens=VOCABULARY, max_seq_len=64, attn_layers=layers), (ids(),)


@model("reformer-pytorch", "ReformerLM")
def reformer() -> Built:
    from reformer_pytorch import ReformerLM

    sizes = {"dim": 64, "depth": 2, "heads": 4, "max_seq_len": 32, "bucket_size": 8, "n_hashes": 2}
    return ReformerLM(num_tokens=VOCABULARY, causal=True, **sizes), (ids(32),)


@model("routing-transformer", "RoutingTransformerLM")
def routing() -> Built:
    from routing_transformer import RoutingTransformerLM

    class Logits(nn.Module):
        """RoutingTransformerLM returns an auxiliary loss beside them."""

        def __init__(self) -> None:
            super().__init__()
            sizes = {"dim": 64, "depth": 2, "heads": 4, "max_seq_len": 32, "window_size": 8, "n_local_attn_heads": 2}
            self.inner = RoutingTransformerLM(num_tokens=VOCABULARY, causal=True, **sizes)

        def forward(self, x: Tensor) -> Tensor:
            logits: Tensor = self.inner(x)[0]
            return logits

    return Logits(), (ids(32),)


@model("mambapy", "Mamba")
def mamba() -> Built:
    from mambapy.mamba import Mamba, MambaConfig, RMSNorm

    layers = Mamba(MambaConfig(d_model=64, n_layers=2, pscan=False))
    parts = (nn.Embedding(VOCABULARY, 64), layers, RMSNorm(64), nn.Linear(64, VOCABULARY, bias=False))
    return nn.Sequential(*parts), (ids(),)


@model("performer-pytorch", "PerformerLM")
def performer() -> Built:
    from performer_pytorch import PerformerLM

    sizes = {"dim": 64, "depth": 2, "heads": 4, "dim_head": 16}
    return PerformerLM(num_tokens=VOCABULARY, max_seq_len=34, **sizes, causal=False, no_projection=True), (ids(),)


@model("megabyte-pytorch", "MEGABYTE")
def megabyte() -> Built:
    from MEGABYTE_pytorch import MEGABYTE

    sizes = {"dim": (64, 48), "depth": (2, 1), "max_seq_len": (16, 4), "dim_head": 16, "heads": 4}
    return MEGABYTE(num_tokens=VOCABULARY, **sizes, flash_attn=False), (ids(36),)


@model("linear-attention-transformer", "LinearAttentionTransformerLM")
def linear_attention() -> Built:
    from linear_attention_transformer import LinearAttentionTransformerLM

    sizes = {"dim": 64, "depth": 2, "heads": 4, "dim_head": 16, "max_seq_len": 34}
    return LinearAttentionTransformerLM(num_tokens=VOCABULARY, **sizes), (ids(),)


@model("palm-rlhf-pytorch", "PaLM")
def palm() -> Built:
    from palm_rlhf_pytorch import PaLM

    return PaLM(num_tokens=VOCABULARY, dim=64, depth=2, heads=4, dim_head=16), (ids(),)


@model("transformers", "T5ForConditionalGeneration")
def t5() -> Built:
    from transformers import T5Config, T5ForConditionalGeneration

    sizes = {"d_model": 64, "d_ff": 256, "d_kv": 16, "num_heads": 4, "num_layers": 2, "vocab_size": VOCABULARY}
    inputs = {"input_ids": ids(), "decoder_input_ids": ids(18)}
    return T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0)), inputs


@model("transformers", "BertForMaskedLM")
def bert() -> Built:
    from transformers import BertConfig, BertForMaskedLM

    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 256}
    return BertForMaskedLM(BertConfig(**sizes, vocab_size=VOCABULARY, max_position_embeddings=64)), (ids(),)


@model("transformers", "DebertaV2ForMaskedLM")
def deberta() -> Built:
    from transformers import DebertaV2Config, DebertaV2ForMaskedLM

    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 256}
    options = {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 8}
    config = DebertaV2Config(**sizes, **options, vocab_size=VOCABULARY, max_position_embeddings=64)
    return DebertaV2ForMaskedLM(config), (ids(),)

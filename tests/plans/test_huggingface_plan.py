"""Plans that Hugging Face models state for themselves: mapped, corrected, refused with a reason."""

from __future__ import annotations

import pytest
import torch

transformers = pytest.importorskip("transformers")

from colrow.errors import PlanError  # noqa: E402
from colrow.plans.huggingface import STYLES, map_styles  # noqa: E402
from colrow.plans.plan import Plan  # noqa: E402
from colrow.verifying.verify import parity  # noqa: E402

BASE = {
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}


def build(name: str) -> torch.nn.Module:
    torch.manual_seed(0)
    T = transformers
    models = {
        "llama-tied": lambda: T.LlamaForCausalLM(T.LlamaConfig(**BASE, tie_word_embeddings=True)),
        "qwen3": lambda: T.Qwen3ForCausalLM(T.Qwen3Config(**BASE, head_dim=8)),
        "phi3": lambda: T.Phi3ForCausalLM(T.Phi3Config(**BASE, pad_token_id=0)),
        "mixtral": lambda: T.MixtralForCausalLM(T.MixtralConfig(**BASE, num_local_experts=4, num_experts_per_tok=2)),
        "gpt2": lambda: T.GPT2LMHeadModel(T.GPT2Config(vocab_size=128, n_embd=32, n_layer=1, n_head=4)),
    }
    return models[name]().eval()


@pytest.mark.parametrize("name", ["llama-tied", "qwen3", "phi3", "mixtral"])
def test_the_stated_plan_trains_right(name: str) -> None:
    model = build(name)
    if name != "mixtral":
        model = model.double()
    with torch.no_grad():
        for param in model.parameters():
            if param.dim() == 1:
                param.add_(0.1 * torch.randn_like(param))
    ids = torch.randint(1, 128, (2, 16))
    assert parity(model, Plan.from_huggingface(model), 2, (ids,)).worst < 1e-5


def test_a_model_without_a_plan_is_refused() -> None:
    with pytest.raises(PlanError, match=r"states no tensor-parallel plan: use Plan\.derive"):
        Plan.from_huggingface(build("gpt2"))


def test_what_cannot_be_mapped_is_reported() -> None:
    model = build("phi3")
    reported = {"model.layers.*.self_attn.o_proj": "mla_kv_a_proj", "model.layers.*.mlp.down_proj": "made_up"}
    modules, unmapped = map_styles(model, reported)
    assert not [key for key in modules if "layers" in key]
    assert unmapped.keys() == reported.keys()
    assert "made_up: unknown" in unmapped["model.layers.*.mlp.down_proj"]


def test_every_mapped_style_is_known() -> None:
    from colrow.styles.base import STYLES as KNOWN

    assert all(style is None or style["style"] in KNOWN for style in STYLES.values())

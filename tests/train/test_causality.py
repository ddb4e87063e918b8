"""A model that sees later tokens is no causal language model: a run would train it on what it can read off."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from colrow.config import RunConfig
from colrow.errors import ConfigError
from colrow.models.build import Source, parameters_on_meta
from colrow.run import preflight
from colrow.train import causality
from colrow.train.causality import require_causal
from colrow.train.objective import auxiliary_weights

SIZES = {"vocab_size": 90, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
SIZES |= {"intermediate_size": 96}


def of_transformers(name: str, **more: Any) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = getattr(transformers, name.partition("For")[0].removesuffix("LMHeadModel") + "Config")(**SIZES, **more)
    with parameters_on_meta():
        model: nn.Module = getattr(transformers, name)(config)
    return model


class Own(nn.Module):
    """A block of a user's: attention with any mask over [tokens, tokens], or a convolution over the tokens."""

    def __init__(self, mask: Callable[[int], Tensor | None] = lambda n: None, padding: int | None = None) -> None:
        super().__init__()
        self.config = SimpleNamespace(vocab_size=50)
        self.embed, self.head = nn.Embedding(50, 16), nn.Linear(16, 50)
        self.qkv, self.mask, self.padding = nn.Linear(16, 48), mask, padding
        self.convolution = nn.Conv1d(16, 16, 3)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        if self.padding is not None:
            padded = F.pad(x.transpose(1, 2), (self.padding, 2 - self.padding))
            return self.head(x + self.convolution(padded).transpose(1, 2))
        q, k, v = self.qkv(x).chunk(3, -1)
        return self.head(x + F.scaled_dot_product_attention(q, k, v, attn_mask=self.mask(ids.shape[1])))


class ExpertChoice(Own):
    """Each expert takes the quarter of a sequence's tokens that it likes best: later tokens push earlier ones out."""

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        chosen = (x @ self.head.weight[:4].t()).transpose(1, 2).topk(max(1, ids.shape[1] // 4), -1).indices
        taken = torch.zeros(*ids.shape, dtype=x.dtype).scatter_add(
            1, chosen.flatten(1), torch.ones(chosen.flatten(1).shape)
        )
        return self.head(x * (1 + taken[..., None]))


class AlwaysDrawing(Own):
    """Drops elements in evaluation too; with `from_outside` by numbers that no seed gives again."""

    def __init__(self, mask: Callable[[int], Tensor | None], from_outside: bool = False) -> None:
        super().__init__(mask)
        self.from_outside = from_outside

    def forward(self, ids: Tensor) -> Tensor:
        if self.from_outside:
            return super().forward(ids) * (1 + torch.tensor(list(os.urandom(50))) / 256)
        return F.dropout(super().forward(ids), 0.3)


def causal(n: int) -> Tensor:
    return torch.ones(n, n, dtype=torch.bool).tril()


def window(n: int) -> Tensor:
    return causal(n).triu(-3)


def prefix(n: int) -> Tensor:
    mask = causal(n)
    mask[: n // 2, : n // 2] = True  # a prompt, whose tokens see each other
    return mask


def neighbours(n: int) -> Tensor:
    return torch.ones(n, n, dtype=torch.bool).tril(1).triu(-1)


@pytest.mark.parametrize(
    "build",
    [
        lambda: of_transformers("BertForMaskedLM"),
        lambda: of_transformers("BertLMHeadModel"),  # what transformers calls a causal model of a BERT's folder
        # most layers see a window to both sides
        pytest.param(lambda: of_transformers("ModernBertForMaskedLM", pad_token_id=0), marks=pytest.mark.exhaustive),
        Own,
        lambda: Own(neighbours),
        lambda: Own(padding=1),
        lambda: AlwaysDrawing(neighbours),
    ],
    ids=[
        *("bert", "bert-causal-class", "modernbert", "no-mask", "window-to-both-sides", "centred-convolution"),
        "dropout-in-evaluation",
    ],
)
def test_a_bidirectional_model_is_refused_by_name(build: Callable[[], nn.Module]) -> None:
    model = build()
    state = torch.get_rng_state()
    with pytest.raises(ConfigError, match=f"^{type(model).__name__} of folder is bidirectional") as error:
        require_causal(Source(model, "folder", None, "folder"))
    assert ("set is_decoder to true" in str(error.value)) == type(model).__name__.startswith("Bert")
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize(
    "build",
    [
        lambda: of_transformers("BertLMHeadModel", is_decoder=True),  # as the refusal advises
        lambda: of_transformers("MistralForCausalLM", num_key_value_heads=2, sliding_window=4),
        pytest.param(
            lambda: of_transformers("MixtralForCausalLM", num_key_value_heads=2, num_local_experts=4),
            marks=pytest.mark.exhaustive,
        ),
        pytest.param(lambda: of_transformers("MambaForCausalLM"), marks=pytest.mark.exhaustive),
        lambda: Own(causal),
        pytest.param(lambda: Own(window), marks=pytest.mark.exhaustive),
        pytest.param(lambda: Own(prefix), marks=pytest.mark.exhaustive),
        lambda: Own(padding=2),
        ExpertChoice,
        lambda: AlwaysDrawing(causal),
        lambda: AlwaysDrawing(causal, from_outside=True),
    ],
    ids=[
        *("decoder", "sliding", "experts", "mamba", "mask", "own-window", "prefix", "convolution", "expert-choice"),
        *("dropout-in-evaluation", "numbers-without-a-seed"),
    ],
)
def test_a_causal_model_is_not(build: Callable[[], nn.Module]) -> None:
    require_causal(Source(build(), "folder", None, "folder"))


def test_a_run_of_one_does_not_start(
    config: Callable[..., RunConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "none.yaml").write_text("name: none\nloss: replicated\nmodules: {}\n")
    run = config(**{"mesh.tp": 1, "plan": str(tmp_path / "none.yaml")})
    source = Source(Own(), "mine:build", None, "built")
    monkeypatch.setattr(preflight, "build_source", lambda *_: source)
    with pytest.raises(ConfigError, match="Own of mine:build is bidirectional"):
        preflight.check(run)
    monkeypatch.setattr(causality, "_LEAST", 1e9)  # without the comparison it would start
    assert preflight.check(run).source.model is source.model


class Longer(Own):
    """Tokens of its own before those that it gets, as prompts of PEFT."""

    def forward(self, ids: Tensor, labels: Tensor | None = None) -> Any:
        logits = super().forward(F.pad(ids, (4, 0)))
        loss = F.cross_entropy(logits[:, 4:].flatten(0, 1), ids.flatten())
        return logits if labels is None else SimpleNamespace(loss=loss, logits=logits)


class LastToken(Own):
    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids)[:, -1]


@pytest.mark.parametrize(("cls", "shape"), [(Longer, r"\[\d, \d+, 50\]"), (LastToken, r"\[\d, 50\]")])
def test_a_model_without_logits_of_each_token_is_refused(cls: type[Own], shape: str) -> None:
    source = Source(cls(causal), "mine", None, "built")
    assert auxiliary_weights(source, None) == {}
    with pytest.raises(ConfigError, match=rf"{cls.__name__} returns a tensor of {shape} for tokens of .* by a loop"):
        require_causal(source)

"""Whether a model's logits see later tokens: trained on next tokens, it would read off what it is to predict.

[Note: probe]
A reduced model runs in evaluation mode on random tokens, then with another last token in each sequence. The logits of
the token before are compared: attention without a causal mask changes them in every sequence, whatever its window, and
so does a convolution that is centred. Sliding windows, and a mask that lets the tokens of a prompt see each other, do
not reach the last token. A router that compares tokens changes them in a sequence now and then, and is no such model.
Each forward draws the same random numbers, for there are models that drop elements in evaluation too; of one whose
logits change with nothing changed (it asks the operating system, say) nothing is known.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from colrow.dryrun.calls import Inputs, call_model, example_inputs, is_huggingface, vocabulary
from colrow.errors import ConfigError
from colrow.models.build import Source
from colrow.parallel.outputs import main_tensor
from colrow.parallel.random_state import Generators
from colrow.train.objective import small_model

_SEQUENCES, _TOKENS = 8, 12
_LEAST = 1e-4
"""Change of a logit, as a share of the largest: rounding is 1e-6 where an operator groups tokens in another way."""


def require_causal(source: Source) -> None:
    """Refuse a model whose logits see later tokens. Takes a fraction of a second. A model whose reduced form does not
    run on a CPU is not looked at.

    Raises:
        ConfigError: it does; for a class of transformers that can be causal, with the key of its config. Or it returns
            no logits of each token, as with prompts of PEFT before them.
    """
    if source.config is not None or not _sees_later_tokens(source.model):  # colrow's own Llama is causal
        return
    fix = "train a causal model, or this one by a loop of your own (docs/guide/library.md)"
    config: Any = getattr(source.model, "config", None)
    may_decode = is_huggingface(source.model) and getattr(config, "is_decoder", None) is False
    if may_decode and not _sees_later_tokens(source.model, as_decoder=True):
        fix = f"set is_decoder to true in its config.json, or {fix}"
    raise ConfigError(
        f"{type(source.model).__name__} of {source.name} is bidirectional: the logits of a token change with the token "
        f"after it, so training on next tokens would show it what it is to predict: {fix}"
    )


@torch.no_grad()
def _sees_later_tokens(model: nn.Module, *, as_decoder: bool = False) -> bool:
    """`as_decoder`: of the model that its config makes with is_decoder.

    Raises:
        ConfigError: it returns no logits of each token.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        try:
            small = small_model(model)
            if as_decoder:
                config: Any = copy.deepcopy(small.config)
                config.is_decoder = True
                small = small_model(type(small)(config))
            stated = getattr(getattr(small, "config", None), "vocab_size", None)
            vocab = min(n for n in (stated, vocabulary(small) or 2) if isinstance(n, int))
            before = example_inputs(small, _SEQUENCES, _TOKENS).within(vocab)  # the first embedding may be of positions
            if len(before) != 1 or before[0].is_floating_point() or before[0].dim() != 2:
                return False  # no tokens
            small.eval()
            generators = Generators([small], "cpu")

            def logits_of(ids: Inputs) -> Tensor:
                with generators.preserved():
                    generators.seed(0)
                    return main_tensor(call_model(small, ids))

            after = before.map(lambda ids: torch.cat([ids[:, :-1], (ids[:, -1:] + 1) % vocab], 1))
            logits = [logits_of(before), logits_of(after), logits_of(before)]
        except Exception:  # it does not run on a CPU, say
            return False
    if logits[0].shape[:-1] != (_SEQUENCES, _TOKENS):
        raise ConfigError(
            f"{type(model).__name__} returns a tensor of {list(logits[0].shape)} for tokens of "
            f"[{_SEQUENCES}, {_TOKENS}], and a run trains on logits [sequences, tokens, vocabulary]: let "
            "forward return those of each token, or train the model by a loop of your own (docs/guide/library.md)"
        )
    if not torch.equal(logits[0], logits[2]):
        return False  # the change may be another
    change = (logits[0] - logits[1])[:, -2].abs().amax(-1)
    return bool((change > _LEAST * logits[0].abs().amax()).all())

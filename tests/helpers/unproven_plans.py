"""Plans that split a dim which the model's code then uses as if it were all of it, and ones that look alike and are
right: as two ranks in fp64 against one process say (`test_the_labels_are_what_two_ranks_compute`). Their models are in
`unproven_models`."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from helpers import broken_models as m
from helpers.broken_plans import HEADS, gpt_plan
from helpers.unproven_models import (
    Case,
    ChangedLogits,
    CheckpointedMLP,
    CheckpointedNoise,
    FeatureMLP,
    MappedAttention,
    NormalisedGradient,
    NormInTraining,
    OwnAttention,
    OwnLoop,
    PartDoubled,
    Scaled,
    TokenBlock,
    WrittenSizes,
    alibi,
    attention,
    auxiliary,
    block_twice,
    causal_convolution,
    each_row,
    fast_plan,
    features,
    flattened,
    gated,
    gumbel,
    halves,
    hooked,
    last_block_differs,
    logits,
    noisy_gradient,
    normed_inside,
    on_stream,
    one_kv_head,
    sloped,
    tokens,
    turned_pairs,
    viewed,
)

OLD_TORCH = torch.__version__.startswith("2.11.")

WRONG = {
    "norm of features": features(lambda h: h / h.norm(dim=-1, keepdim=True)),
    "layer norm of features": features(lambda h: F.layer_norm(h, h.shape[-1:])),
    "largest feature": features(lambda h: h / (1e-3 + h.abs().amax(-1, keepdim=True))),
    "median feature": features(lambda h: h * (h >= h.quantile(0.5, dim=-1, keepdim=True))),
    "features rolled": features(lambda h: h.roll(1, -1)),
    "product of features": features(lambda h: h.sigmoid().cumprod(-1)),
    "noise": features(lambda h: h * torch.poisson(h.exp()), train=True),
    "softmax of features under vmap": features(torch.vmap(lambda h: h.softmax(-1))),
    "features weighed by position": features(lambda h: h * torch.arange(h.shape[-1], dtype=h.dtype)),
    "every third feature of a rank": features(lambda h: h * (torch.arange(h.shape[-1], dtype=h.dtype) % 3)),
    "positions rounded, modulo two": features(
        lambda h: h * (torch.arange(h.shape[-1]).to(torch.float8_e5m2).to(h.dtype) % 2)
    ),
    "halves by slices": gated(halves),
    "halves by glu": gated(lambda h: F.glu(h, -1)),
    "slopes of local heads": attention(scores=alibi),
    "mean of heads": attention(output=lambda o: o - o.sum(1, keepdim=True) / o.shape[1]),
    "scale shared by heads": Case(
        lambda: m.Gpt(lambda: OwnAttention(output=Scaled())), lambda: gpt_plan(**HEADS, attn__out="rowwise")
    ),
    "tokens shifted": tokens(lambda h: F.pad(h, (0, 0, 1, -1))),
    "position of the largest token": tokens(lambda h: h * (1 + 0.1 * h.argmax(1, keepdim=True))),
    "first token": tokens(lambda h: h[:, :1].expand_as(h)),
    "causal convolution": on_stream(causal_convolution, sequence=True, stream__1="grad_sum"),
    "batch norm of tokens": on_stream(lambda: nn.BatchNorm1d(m.D), train=True, sequence=True, stream="grad_sum"),
    "norm in training alone": Case(lambda: m.Gpt(mlp=NormInTraining), train=True),
    "backward normalises": features(NormalisedGradient.apply),
    "norm inside of a block, whose gradient nothing sums": normed_inside("replicate"),
    "function of the last block": Case(last_block_differs),
    "shift in the model's loop": Case(lambda: OwnLoop(layers=5), lambda: gpt_plan(sequence=True)),
    # of the same kinds
    "a query head for k": one_kv_head(kv=(0, -1)),
    "slopes of samples for heads": sloped(outer=2),
    "features flipped": features(lambda h: h.flip(-1)),
    "features summed": features(lambda h: h * h.sum(-1, keepdim=True)),
    "features narrowed": features(lambda h: F.pad(h.narrow(-1, 0, h.shape[-1] // 2), (0, h.shape[-1] // 2))),
    "kth feature": features(lambda h: h - h.kthvalue(2, dim=-1, keepdim=True).values),
    "features in fourier space": features(lambda h: torch.fft.fft(h).real),
    "features normalised by einsum": features(lambda h: h * torch.einsum("btf,btf->bt", h, h)[..., None]),
    "norm of all groups of features, in code with sizes": viewed(lambda h: h / h.norm(dim=(-2, -1), keepdim=True)),
    "norm of everything": features(lambda h: h / h.norm()),
    "a local width in a tensor": features(lambda h: h * torch.tensor(1 / h.shape[-1], dtype=h.dtype)),
    "filled with a local width": features(lambda h: h * torch.full_like(h, 1 / h.shape[-1])),
    "features flattened and viewed in another order": features(
        lambda h: h.flatten().view(h.shape[0], h.shape[2], h.shape[1]).logcumsumexp(1).reshape(h.shape)
    ),
    "slopes drawn for features": features(lambda h: F.rrelu(h, training=True), train=True),
    "features pooled": features(lambda h: h - F.avg_pool1d(h, 3, stride=1, padding=1)),
    "last token": tokens(lambda h: h[:, -1:].expand_as(h)),
    "tokens rolled": tokens(lambda h: h.roll(1, 1)),
    "tokens summed": tokens(lambda h: h.cumsum(1)),
    "slopes drawn on a DTensor": Case(
        lambda: m.Gpt(block=partial(TokenBlock, normed=lambda h: F.rrelu(h, training=True))),
        lambda: gpt_plan(sequence=True),
        train=True,
    ),
    "truth values of a DTensor": Case(
        lambda: m.Gpt(block=partial(TokenBlock, normed=lambda h: h * (h > 1).any(1, keepdim=True))),
        lambda: gpt_plan(sequence=True),
    ),
    "a part of the logits written": Case(lambda: PartDoubled(2), lambda: gpt_plan("vocab_parallel")),
    "samples compared, of flattened tokens": flattened(lambda h: h - h.mean(0, keepdim=True)),
    "samples in another order, of flattened tokens": flattened(lambda h: h.flip(0)),
    "a number drawn for each sample, of flattened tokens": flattened(
        lambda h: h * torch.rand(len(h), 1, 1), train=True
    ),
    "samples changed in pairs, of flattened tokens": flattened(
        lambda h: h.unflatten(0, (-1, 2)).flip(1).flatten(0, 1) if len(h) > 1 else h
    ),
    "tokens shifted, of flattened ones": flattened(lambda h: F.pad(h, (0, 0, 1, -1))),
    "a cumulative sum of the logits": logits(lambda x: x.cumsum(-1) / 8),
    "the largest of all logits": logits(lambda x: x / x.amax()),
    # torch makes one number a channel and then gives it other strides in place
    "mean of tokens by adaptive pooling": tokens(lambda h: h * F.adaptive_avg_pool1d(h.mT, 1).mT.tanh()),
    "largest feature, its dim taken away in place": features(
        lambda h: h / (1 + h.detach().amax(-1, keepdim=True).squeeze_(-1))[..., None]
    ),
    "a sum over no dims, which means all": features(lambda h: h / (1 + h.square().nansum(()))),
    "an auxiliary loss of a shard": auxiliary(lambda h: h.norm(), 0.1),
    "noise in a recomputed function": Case(lambda: m.Gpt(mlp=lambda: CheckpointedNoise(function=True)), train=True),
    "noise in the gradient of split logits": Case(
        lambda: ChangedLogits(noisy_gradient), lambda: gpt_plan("vocab_parallel"), train=True
    ),
    "noise in the gradient of token shards": Case(
        lambda: m.Gpt(block=partial(TokenBlock, normed=noisy_gradient)), lambda: gpt_plan(sequence=True), train=True
    ),
    "sum over ranks left out": Case(
        lambda: m.Gpt(mlp=lambda: FeatureMLP(lambda h: h)),
        lambda: gpt_plan(attn__out={"style": "rowwise", "output": "partial"}),
    ),
}
RIGHT = {
    "gumbel noise": features(gumbel, train=True),
    "a mask by size": features(lambda h: h * (torch.rand(h.shape) > 0.2), train=True),
    "a mask by probabilities": features(lambda h: h * torch.bernoulli(torch.full_like(h, 0.8)), train=True),
    "a mask by a DTensor's values": Case(
        lambda: m.Gpt(block=partial(TokenBlock, normed=lambda h: h * torch.bernoulli(h.sigmoid()))),
        lambda: gpt_plan(sequence=True),
        train=True,
    ),
    "one k and v head by index": one_kv_head(),
    "slopes of a rank's heads": sloped(),
    "hook on a gradient": Case(hooked),  # parallelize keeps it
    "norm inside of a block": normed_inside("grad_sum"),
    "every other feature": gated(lambda h: F.silu(h[..., ::2]) * h[..., 1::2]),
    "batch norm of all tokens": on_stream(lambda: nn.BatchNorm1d(m.D), train=True),
    "logits of a part of the tokens written": Case(lambda: PartDoubled(1), lambda: gpt_plan("vocab_parallel")),
    "capped logits": logits(lambda x: 5 * torch.tanh(x / 5), sequence=True),
    "log-probabilities for logits": logits(lambda x: 0.5 * F.log_softmax(x, -1)),
    "an auxiliary loss of weight 0": auxiliary(lambda h: h.softmax(-1).square().mean() + h.norm(), 0.0),
    "checkpointed": Case(lambda: m.Gpt(mlp=CheckpointedMLP)),
    "noise in a recomputed module": Case(lambda: m.Gpt(mlp=lambda: CheckpointedNoise(function=False)), train=True),
    "noise in the gradient of all logits": Case(lambda: ChangedLogits(noisy_gradient), train=True),
    "block used twice": Case(block_twice, lambda: gpt_plan(sequence=True)),
    # of the same kinds
    "features clamped": features(lambda h: h.clamp(-1, 1) + torch.ones_like(h) * 0.5),
    "attention written out": attention(),
    "the number of tokens in a tensor": features(lambda h: h / torch.tensor(h.shape[1], dtype=h.dtype)),
    "features flattened": features(lambda h: h.flatten().tanh().view(h.shape)),
    "statistics that nothing needs": features(lambda h: (h.softmax(-1).sum(), h.mean().sqrt(), h)[-1]),
    "conjugates": features(lambda h: torch.complex(h, h.tanh()).conj().abs()),
    "heads under vmap": Case(lambda: m.Gpt(MappedAttention), lambda: gpt_plan(**HEADS, attn__out="rowwise")),
    "scores capped": attention(scores=lambda s: 5 * torch.tanh(s / 5)),
    "pairs of features turned": Case(lambda: m.Gpt(block=partial(TokenBlock, normed=turned_pairs))),
    "dims added and taken away in place": features(
        lambda h: h.sin().unsqueeze_(0).squeeze_(0).mT.sin().transpose_(1, 2)
    ),
    "tokens changed alone": tokens(lambda h: h / (1e-3 + h.norm(dim=-1, keepdim=True))),
    "flattened tokens changed alone": flattened(lambda h: h / (1e-3 + h.norm(dim=-1, keepdim=True))),
    "channels of flattened tokens dropped": flattened(
        lambda h: F.dropout2d(h.unsqueeze(-1), 0.3).view(h.shape), train=True
    ),
    "sizes of flattened tokens": Case(
        WrittenSizes, lambda: fast_plan(**{"": {"style": "replicate", "sizes": {"view(-1, *, *)": "*, /tp, *"}}})
    ),
    "norm of each group of features, in code with sizes": viewed(lambda h: h / h.norm(dim=-1, keepdim=True)),
    "features at their own positions": features(lambda h: h[..., torch.arange(h.shape[-1])]),
    "every second feature masked": features(lambda h: h * (torch.arange(h.shape[-1], dtype=h.dtype)[None, None] % 2)),
    "position of the largest token, of a DTensor": Case(
        lambda: m.Gpt(block=partial(TokenBlock, normed=lambda h: h * (1 + 0.1 * h.argmax(1, keepdim=True)))),
        lambda: gpt_plan(sequence=True),
    ),
    "heads in turn": attention(output=lambda o: o * (torch.arange(o.shape[1]).view(-1, 1, 1) % 2 + 0.5)),
    "norm of each head": attention(output=lambda o: F.layer_norm(o, (m.E,))),
    "causal convolution of all tokens": on_stream(causal_convolution),
    "dropout of all tokens": on_stream(lambda: nn.Dropout(0.1), train=True),
    "a norm of the features that nothing reads": features(lambda h: (h.detach().norm(), h)[1]),
}
if not OLD_TORCH:  # where the sharded dry run raises an IndexError, so that it is unproven
    RIGHT["samples and features in one dim, under vmap"] = features(lambda h: each_row(h.movedim(0, -1)).movedim(-1, 0))

"""Models of sound and speech."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.models.foreign.registry import model

Built = tuple[nn.Module, Any]


@model("openai-whisper", "Whisper")
def whisper() -> Built:
    from whisper.model import ModelDimensions, Whisper

    sizes = ModelDimensions(80, 17, 64, 4, 2, 256, 32, 64, 4, 2)
    return Whisper(sizes), (torch.randn(2, 80, 34), torch.randint(0, 256, (2, 9)))


@model("conformer", "Conformer")
def conformer() -> Built:
    from conformer import Conformer

    sizes = {"depth": 2, "dim_head": 16, "heads": 4, "ff_mult": 4, "conv_expansion_factor": 2, "conv_kernel_size": 7}
    return Conformer(64, **sizes), (torch.randn(2, 34, 64),)


@model("torchaudio", "Conformer")
def torchaudio_conformer() -> Built:
    from torchaudio.models import Conformer

    class Frames(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = Conformer(64, 4, 256, 2, 7)
            self.head = nn.Linear(64, 40)

        def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
            return self.head(self.encoder(x, lengths)[0])

    return Frames(), (torch.randn(2, 34, 64), torch.tensor([34, 34]))


@model("torchaudio", "wav2vec2")
def torchaudio_wav2vec2() -> Built:
    from torchaudio.models import wav2vec2_model

    layers = [(32, 10, 5), (32, 3, 2)]
    sizes = (64, 0.0, 16, 4, 2, 4, 0.0, 256, 0.0, 0.0, False, 0.0, 32)
    return wav2vec2_model("layer_norm", layers, True, *sizes), (torch.randn(2, 700),)


@model("bs-roformer", "BSRoformer")
def roformer() -> Built:
    from bs_roformer import BSRoformer

    bands = (2,) * 8 + (17,)
    stft = {"stft_n_fft": 64, "stft_hop_length": 16, "stft_win_length": 64, "freqs_per_bands": bands}
    sizes = {"depth": 1, "time_transformer_depth": 1, "freq_transformer_depth": 1, "heads": 4, "dim_head": 16}
    return BSRoformer(dim=64, **sizes, **stft, flash_attn=False), (torch.randn(2, 1, 512),)


@model("encodec", "SEANetEncoder")
def encodec() -> Built:
    from encodec.modules import SEANetEncoder

    return SEANetEncoder(channels=1, dimension=64, n_filters=8, ratios=[4, 2], lstm=1), (torch.randn(2, 1, 256),)


@model("transformers", "Wav2Vec2ForCTC")
def wav2vec2() -> Built:
    from transformers import Wav2Vec2Config, Wav2Vec2ForCTC

    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 256}
    conv = {"conv_dim": (32, 32), "conv_stride": (5, 2), "conv_kernel": (10, 3), "num_feat_extract_layers": 2}
    rest = {"vocab_size": 40, "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4}
    return Wav2Vec2ForCTC(Wav2Vec2Config(**sizes, **conv, **rest, mask_time_prob=0.0)), (torch.randn(2, 700),)


@model("transformers", "ASTForAudioClassification")
def spectrogram() -> Built:
    from transformers import ASTConfig, ASTForAudioClassification

    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 256}
    config = ASTConfig(**sizes, max_length=64, num_mel_bins=32, patch_size=8, frequency_stride=8, time_stride=8)
    return ASTForAudioClassification(config), (torch.randn(2, 64, 32),)


@model("speechbrain", "TransformerASR")
def recognizer() -> Built:
    from speechbrain.lobes.models.transformer.TransformerASR import TransformerASR

    class Recognizer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            sizes = {"d_model": 64, "nhead": 4, "num_encoder_layers": 2, "num_decoder_layers": 2, "d_ffn": 256}
            self.body = TransformerASR(tgt_vocab=40, input_size=32, **sizes, normalize_before=True, causal=False)
            self.head = nn.Linear(64, 40)

        def forward(self, frames: Tensor, ids: Tensor) -> Tensor:
            return self.head(self.body(frames, ids)[1])

    return Recognizer(), (torch.randn(2, 20, 32), torch.randint(1, 40, (2, 9)))

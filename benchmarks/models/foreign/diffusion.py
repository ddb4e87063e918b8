"""Diffusion models."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from benchmarks.models.foreign.registry import model

Built = tuple[nn.Module, Any]


def steps() -> torch.Tensor:
    return torch.tensor([3, 7])


@model("diffusers", "DiTTransformer2DModel")
def dit() -> Built:
    from diffusers import DiTTransformer2DModel

    sizes = {"num_attention_heads": 4, "attention_head_dim": 16, "num_layers": 2, "sample_size": 8}
    inputs = {"hidden_states": torch.randn(2, 4, 8, 8), "timestep": steps(), "class_labels": torch.tensor([1, 2])}
    return DiTTransformer2DModel(**sizes, in_channels=4, patch_size=2, num_embeds_ada_norm=16), inputs


@model("diffusers", "PixArtTransformer2DModel")
def pixart() -> Built:
    from diffusers import PixArtTransformer2DModel

    sizes = {"num_attention_heads": 4, "attention_head_dim": 16, "num_layers": 2, "sample_size": 8}
    options = {"in_channels": 4, "out_channels": 4, "cross_attention_dim": 64, "caption_channels": 48}
    inputs = {"hidden_states": torch.randn(2, 4, 8, 8), "encoder_hidden_states": torch.randn(2, 9, 48)}
    built = PixArtTransformer2DModel(**sizes, **options, use_additional_conditions=False)
    return built, inputs | {"timestep": steps()}


@model("diffusers", "SD3Transformer2DModel")
def sd3() -> Built:
    from diffusers import SD3Transformer2DModel

    sizes = {"num_attention_heads": 4, "attention_head_dim": 16, "num_layers": 2, "sample_size": 8}
    options = {"joint_attention_dim": 48, "caption_projection_dim": 64, "pooled_projection_dim": 40}
    built = SD3Transformer2DModel(**sizes, **options, in_channels=4, out_channels=4, patch_size=2)
    inputs = {"hidden_states": torch.randn(2, 4, 8, 8), "encoder_hidden_states": torch.randn(2, 9, 48)}
    return built, inputs | {"pooled_projections": torch.randn(2, 40), "timestep": steps()}


@model("diffusers", "FluxTransformer2DModel")
def flux() -> Built:
    from diffusers import FluxTransformer2DModel

    sizes = {"num_attention_heads": 4, "attention_head_dim": 16, "num_layers": 1, "num_single_layers": 1}
    options = {"joint_attention_dim": 48, "pooled_projection_dim": 40, "axes_dims_rope": (4, 4, 8)}
    built = FluxTransformer2DModel(in_channels=4, patch_size=1, **sizes, **options)
    inputs = {"hidden_states": torch.randn(2, 16, 4), "encoder_hidden_states": torch.randn(2, 9, 48)}
    inputs |= {"pooled_projections": torch.randn(2, 40), "timestep": torch.tensor([0.3, 0.7])}
    return built, inputs | {"img_ids": torch.zeros(16, 3), "txt_ids": torch.zeros(9, 3)}


@model("diffusers", "UNet2DModel")
def unet() -> Built:
    from diffusers import UNet2DModel

    blocks = {"down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D")}
    sizes = {"block_out_channels": (32, 64), "layers_per_block": 1, "norm_num_groups": 8, "attention_head_dim": 8}
    return UNet2DModel(8, 3, 3, **blocks, **sizes), {"sample": torch.randn(2, 3, 8, 8), "timestep": steps()}


@model("diffusers", "UNet2DConditionModel")
def conditional() -> Built:
    from diffusers import UNet2DConditionModel

    blocks = {
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    }
    sizes = {"block_out_channels": (32, 64), "layers_per_block": 1, "norm_num_groups": 8, "attention_head_dim": 4}
    built = UNet2DConditionModel(8, 4, 4, **blocks, **sizes, cross_attention_dim=48)
    return built, {
        "sample": torch.randn(2, 4, 8, 8),
        "timestep": steps(),
        "encoder_hidden_states": torch.randn(2, 9, 48),
    }


@model("denoising-diffusion-pytorch", "Unet")
def lucid_unet() -> Built:
    from denoising_diffusion_pytorch import Unet

    return Unet(32, dim_mults=(1, 2), attn_heads=4, attn_dim_head=16), (torch.randn(2, 3, 16, 16), steps())


@model("diffusers", "WanTransformer3DModel")
def wan() -> Built:
    from diffusers import WanTransformer3DModel

    sizes = {"num_attention_heads": 4, "attention_head_dim": 16, "num_layers": 2, "ffn_dim": 256, "text_dim": 48}
    options = {"patch_size": (1, 2, 2), "freq_dim": 32, "cross_attn_norm": True, "rope_max_seq_len": 32}
    built = WanTransformer3DModel(in_channels=4, out_channels=4, **sizes, **options, qk_norm="rms_norm_across_heads")
    inputs = {"hidden_states": torch.randn(2, 4, 2, 8, 8), "encoder_hidden_states": torch.randn(2, 9, 48)}
    return built, inputs | {"timestep": steps()}

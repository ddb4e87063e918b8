"""Models of images."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.models.foreign.registry import model

Built = tuple[nn.Module, Any]


def image(size: int = 32) -> tuple[Tensor, ...]:
    return (torch.randn(2, 3, size, size),)


@model("timm", "VisionTransformer")
def vit() -> Built:
    from timm.models.vision_transformer import VisionTransformer

    return VisionTransformer(32, 8, embed_dim=64, depth=2, num_heads=4, num_classes=16), image()


@model("timm", "Eva (EVA-02)")
def eva() -> Built:
    from timm.models.eva import Eva

    options = {"swiglu_mlp": True, "use_rot_pos_emb": True, "ref_feat_shape": (4, 4), "qkv_fused": False}
    return Eva(32, 8, embed_dim=64, depth=2, num_heads=4, num_classes=16, mlp_ratio=4, **options), image()


@model("timm", "SwinTransformer")
def timm_swin() -> Built:
    from timm.models.swin_transformer import SwinTransformer

    options = {"depths": (2, 2), "num_heads": (4, 8), "window_size": 4, "num_classes": 16}
    return SwinTransformer(32, 2, embed_dim=64, **options), image()


@model("timm", "ConvNeXt")
def timm_convnext() -> Built:
    from timm.models.convnext import ConvNeXt

    return ConvNeXt(num_classes=16, depths=(1, 1, 1, 1), dims=(32, 64, 64, 128)), image(64)


@model("timm", "MlpMixer")
def timm_mixer() -> Built:
    from timm.models.mlp_mixer import MlpMixer

    return MlpMixer(16, 32, patch_size=8, num_blocks=2, embed_dim=64), image()


@model("timm", "Beit")
def beit() -> Built:
    from timm.models.beit import Beit

    return Beit(32, 8, embed_dim=64, depth=2, num_heads=4, num_classes=16, use_rel_pos_bias=True), image()


@model("torchvision", "VisionTransformer")
def torchvision_vit() -> Built:
    from torchvision.models import VisionTransformer

    return VisionTransformer(32, 8, 2, 4, 64, 256, num_classes=16), image()


@model("torchvision", "SwinTransformer")
def torchvision_swin() -> Built:
    from torchvision.models import SwinTransformer

    return SwinTransformer([2, 2], 64, [2, 2], [4, 8], [4, 4], num_classes=16, stochastic_depth_prob=0.0), image()


@model("torchvision", "ConvNeXt")
def torchvision_convnext() -> Built:
    from torchvision.models.convnext import CNBlockConfig, ConvNeXt

    return ConvNeXt([CNBlockConfig(64, 128, 2), CNBlockConfig(128, None, 2)], 0.0, num_classes=16), image(64)


@model("vit-pytorch", "ViT")
def lucid_vit() -> Built:
    from vit_pytorch import ViT

    sizes = {"dim": 64, "depth": 2, "heads": 4, "dim_head": 16, "mlp_dim": 256}
    return ViT(image_size=32, patch_size=8, num_classes=16, **sizes), image()


@model("vit-pytorch", "SimpleViT")
def simple_vit() -> Built:
    from vit_pytorch import SimpleViT

    sizes = {"dim": 64, "depth": 2, "heads": 4, "dim_head": 16, "mlp_dim": 256}
    return SimpleViT(image_size=32, patch_size=8, num_classes=16, **sizes), image()


@model("vit-pytorch", "CaiT")
def cait() -> Built:
    from vit_pytorch.cait import CaiT

    sizes = {"dim": 64, "depth": 2, "cls_depth": 1, "heads": 4, "dim_head": 16, "mlp_dim": 256}
    return CaiT(image_size=32, patch_size=8, num_classes=16, **sizes), image()


@model("mlp-mixer-pytorch", "MLPMixer")
def mixer() -> Built:
    from mlp_mixer_pytorch import MLPMixer

    return MLPMixer(image_size=32, channels=3, patch_size=8, dim=64, depth=2, num_classes=16), image()


@model("perceiver-pytorch", "Perceiver")
def perceiver() -> Built:
    from perceiver_pytorch import Perceiver

    sizes = {"num_latents": 12, "latent_dim": 64, "cross_heads": 2, "latent_heads": 4, "num_classes": 16}
    data = {"input_channels": 3, "input_axis": 2, "num_freq_bands": 4, "max_freq": 10.0}
    options = {"cross_dim_head": 16, "latent_dim_head": 16, "self_per_cross_attn": 1}
    return Perceiver(depth=2, **data, **sizes, **options), (torch.randn(2, 9, 9, 3),)


@model("segmentation-models-pytorch", "Segformer (mit_b0)")
def segformer() -> Built:
    import segmentation_models_pytorch as smp

    return smp.Segformer("mit_b0", encoder_weights=None, decoder_segmentation_channels=64, classes=8), image(64)


@model("open-clip-torch", "CLIP")
def clip() -> Built:
    from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg

    class Pairs(nn.Module):
        """Similarities of images and texts."""

        def __init__(self) -> None:
            super().__init__()
            vision = CLIPVisionCfg(layers=2, width=64, head_width=16, patch_size=8, image_size=32)
            text = CLIPTextCfg(context_length=17, vocab_size=256, width=64, heads=4, layers=2)
            self.clip = CLIP(48, vision, text)

        def forward(self, pixels: Tensor, ids: Tensor) -> Tensor:
            images, texts, scale = self.clip(pixels, ids)
            return scale * images @ texts.mT

    return Pairs(), (*image(), torch.randint(0, 256, (2, 17)))


@model("timm", "GlobalContextVit")
def global_context() -> Built:
    from timm.models.gcvit import GlobalContextVit

    sizes = {"depths": (1, 1), "num_heads": (4, 8), "window_size": (4, 4), "embed_dim": 32}
    return GlobalContextVit(img_size=(64, 64), **sizes, num_classes=16), image(64)


@model("vit-pytorch", "NaViT")
def navit() -> Built:
    from vit_pytorch.na_vit import NaViT

    class Packed(nn.Module):
        """Images of two sizes in one sequence."""

        def __init__(self) -> None:
            super().__init__()
            sizes = {"dim": 64, "depth": 2, "heads": 4, "dim_head": 16, "mlp_dim": 256}
            self.vit = NaViT(image_size=32, patch_size=8, num_classes=16, **sizes)

        def forward(self, images: Tensor) -> Tensor:
            return self.vit([[images[0], images[1, :, :16]]])

    return Packed(), image()


@model("segment-anything", "MaskDecoder")
def mask_decoder() -> Built:
    from segment_anything.modeling import MaskDecoder, TwoWayTransformer

    class Masks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.decoder = MaskDecoder(transformer_dim=64, transformer=TwoWayTransformer(2, 64, 4, 256))

        def forward(self, image: Tensor, positions: Tensor, points: Tensor, dense: Tensor) -> Tensor:
            return self.decoder(image, positions, points, dense, multimask_output=True)[0]

    return Masks(), (*(torch.randn(1, 64, 8, 8) for _ in range(2)), torch.randn(1, 3, 64), torch.randn(1, 64, 8, 8))

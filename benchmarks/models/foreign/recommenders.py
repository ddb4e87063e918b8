"""Recommenders and models of tables."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from benchmarks.models.foreign.registry import model

Built = tuple[nn.Module, Any]


def _clicks() -> tuple[list[Any], tuple[torch.Tensor, ...]]:
    from deepctr_torch.inputs import DenseFeat, SparseFeat

    columns = [*(SparseFeat(f"s{i}", 256, 16) for i in range(6)), *(DenseFeat(f"d{i}", 1) for i in range(3))]
    rows = torch.cat([torch.randint(0, 256, (34, 6)).float(), torch.randn(34, 3)], 1)
    return columns, (rows,)


@model("deepctr-torch", "DeepFM")
def deepfm() -> Built:
    from deepctr_torch.models import DeepFM

    columns, rows = _clicks()
    return DeepFM(columns, columns, dnn_hidden_units=(256, 128)), rows


@model("deepctr-torch", "DCNMix")
def dcn() -> Built:
    from deepctr_torch.models import DCNMix

    columns, rows = _clicks()
    return DCNMix(columns, columns, dnn_hidden_units=(256, 128)), rows


@model("deepctr-torch", "AutoInt")
def autoint() -> Built:
    from deepctr_torch.models import AutoInt

    columns, rows = _clicks()
    return AutoInt(columns, columns, att_layer_num=2, att_head_num=4, dnn_hidden_units=(256, 128)), rows


@model("torch-rechub", "WideDeep")
def wide_deep() -> Built:
    from torch_rechub.basic.features import DenseFeature, SparseFeature
    from torch_rechub.models.ranking import WideDeep

    sparse = [SparseFeature(f"s{i}", 256, embed_dim=16) for i in range(6)]
    dense = [DenseFeature(f"d{i}") for i in range(3)]
    mlp = {"dims": [256, 128], "dropout": 0.0, "activation": "relu"}

    class Named(nn.Module):
        """WideDeep takes one mapping."""

        def __init__(self) -> None:
            super().__init__()
            self.inner = WideDeep(wide_features=dense, deep_features=sparse, mlp_params=mlp)

        def forward(self, ids: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
            named = {f"s{i}": ids[:, i] for i in range(6)} | {f"d{i}": values[:, i] for i in range(3)}
            return self.inner(named)

    return Named(), (torch.randint(0, 256, (34, 6)), torch.randn(34, 3))


@model("torch-rechub", "SASRec")
def sasrec() -> Built:
    from torch_rechub.basic.features import SequenceFeature
    from torch_rechub.models.matching import SASRec

    names = ("seq", "pos", "neg")
    features = [SequenceFeature(name, 256, embed_dim=64, pooling="concat") for name in names]

    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = SASRec(features, max_len=17, dropout_rate=0.0, num_blocks=2, num_heads=4)

        def forward(self, seq: torch.Tensor, pos: torch.Tensor, neg: torch.Tensor) -> torch.Tensor:
            liked, other = self.inner({"seq": seq, "pos": pos, "neg": neg})
            return liked - other

    return Named(), tuple(torch.randint(1, 256, (3, 17)) for _ in names)


@model("rtdl-revisiting-models", "FTTransformer")
def ft_transformer() -> Built:
    from rtdl_revisiting_models import FTTransformer

    sizes = {"n_cont_features": 5, "cat_cardinalities": [32, 32, 32], "d_out": 16, "n_blocks": 2, "d_block": 64}
    drops = {"attention_dropout": 0.0, "ffn_dropout": 0.0, "residual_dropout": 0.0}
    built = FTTransformer(**sizes, **drops, attention_n_heads=4, ffn_d_hidden=None, ffn_d_hidden_multiplier=4)
    return built, (torch.randn(6, 5), torch.randint(0, 32, (6, 3)))


@model("rtdl-revisiting-models", "ResNet")
def resnet() -> Built:
    from rtdl_revisiting_models import ResNet

    sizes = {"d_in": 24, "d_out": 16, "n_blocks": 2, "d_block": 64, "d_hidden": None, "d_hidden_multiplier": 4}
    return ResNet(**sizes, dropout1=0.0, dropout2=0.0), (torch.randn(34, 24),)


@model("tab-transformer-pytorch", "TabTransformer")
def tab_transformer() -> Built:
    from tab_transformer_pytorch import TabTransformer

    sizes = {"categories": (32, 32, 32), "num_continuous": 5, "dim": 64, "depth": 2, "heads": 4, "dim_out": 16}
    return TabTransformer(**sizes, mlp_act=nn.ReLU()), (torch.randint(0, 32, (6, 3)), torch.randn(6, 5))


@model("tabm", "TabM")
def tabm() -> Built:
    from tabm import TabM

    return TabM.make(n_num_features=12, d_out=16, n_blocks=2, d_block=256, dropout=0.0), (torch.randn(34, 12),)

"""Time series, proteins and graphs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.models.foreign.registry import model

Built = tuple[nn.Module, Any]


@model("iTransformer", "iTransformer", "time series")
def inverted() -> Built:
    from iTransformer import iTransformer

    sizes = {"num_variates": 11, "lookback_len": 34, "dim": 64, "depth": 2, "heads": 4, "dim_head": 16}

    class Forecast(nn.Module):
        """iTransformer returns a mapping from horizons."""

        def __init__(self) -> None:
            super().__init__()
            self.inner = iTransformer(**sizes, pred_length=12)

        def forward(self, x: Tensor) -> Tensor:
            found = self.inner(x)
            return found[12] if isinstance(found, dict) else found

    return Forecast(), (torch.randn(2, 34, 11),)


@model("chronos-forecasting", "ChronosBolt", "time series")
def chronos() -> Built:
    from chronos.chronos_bolt import ChronosBoltModelForForecasting
    from transformers import T5Config

    sizes = {"d_model": 64, "d_ff": 256, "d_kv": 16, "num_heads": 4, "num_layers": 2, "vocab_size": 2}
    bolt = {"context_length": 32, "prediction_length": 8, "input_patch_size": 8, "input_patch_stride": 8}
    options = {"quantiles": [0.1, 0.5, 0.9], "use_reg_token": False}
    config = T5Config(**sizes, decoder_start_token_id=0, chronos_config=bolt | options)
    return ChronosBoltModelForForecasting(config), {"context": torch.randn(3, 32)}


@model("transformers", "PatchTSTForPrediction", "time series")
def patches() -> Built:
    from transformers import PatchTSTConfig, PatchTSTForPrediction

    sizes = {"d_model": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "ffn_dim": 256}
    data = {"num_input_channels": 5, "context_length": 36, "patch_length": 4, "patch_stride": 4, "prediction_length": 8}
    return PatchTSTForPrediction(PatchTSTConfig(**sizes, **data)), {"past_values": torch.randn(3, 36, 5)}


@model("fair-esm", "ESM2", "proteins")
def esm2() -> Built:
    from esm import ESM2

    return ESM2(num_layers=2, embed_dim=64, attention_heads=4), (torch.randint(4, 24, (2, 34)),)


@model("transformers", "EsmForMaskedLM", "proteins")
def esm() -> Built:
    from transformers import EsmConfig, EsmForMaskedLM

    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 256}
    options = {"position_embedding_type": "rotary", "pad_token_id": 1, "mask_token_id": 32, "token_dropout": False}
    return EsmForMaskedLM(EsmConfig(**sizes, **options, vocab_size=48)), (torch.randint(4, 24, (2, 34)),)


@model("egnn-pytorch", "EGNN_Network", "proteins")
def egnn() -> Built:
    from egnn_pytorch import EGNN_Network

    class Features(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = EGNN_Network(num_tokens=21, dim=64, depth=2, m_dim=32)

        def forward(self, ids: Tensor, places: Tensor) -> Tensor:
            return self.inner(ids, places)[0]

    return Features(), (torch.randint(0, 21, (2, 17)), torch.randn(2, 17, 3))


@model("graph-transformer-pytorch", "GraphTransformer", "graphs")
def graph_transformer() -> Built:
    from graph_transformer_pytorch import GraphTransformer

    class Nodes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = GraphTransformer(dim=64, depth=2, heads=4, dim_head=16, edge_dim=32, with_feedforwards=True)

        def forward(self, nodes: Tensor, edges: Tensor) -> Tensor:
            return self.inner(nodes, edges)[0]

    return Nodes(), (torch.randn(2, 17, 64), torch.randn(2, 17, 17, 32))


def _graph() -> tuple[Tensor, Tensor]:
    return torch.randn(34, 48), torch.randint(0, 34, (2, 90))


@model("torch-geometric", "GCN", "graphs")
def gcn() -> Built:
    from torch_geometric.nn.models import GCN

    return GCN(48, 128, 3, out_channels=16), _graph()


@model("torch-geometric", "GAT", "graphs")
def gat() -> Built:
    from torch_geometric.nn.models import GAT

    return GAT(48, 128, 3, out_channels=16, heads=4), _graph()


@model("torch-geometric", "TransformerConv", "graphs")
def transformer_conv() -> Built:
    from torch_geometric.nn import TransformerConv

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = TransformerConv(48, 16, heads=4)
            self.second = TransformerConv(64, 16, heads=4)
            self.up, self.down = nn.Linear(64, 256), nn.Linear(256, 16)

        def forward(self, x: Tensor, edges: Tensor) -> Tensor:
            x = self.second(self.first(x, edges).relu(), edges)
            return self.down(self.up(x).relu())

    return Net(), _graph()


@model("torch-geometric", "GPSConv", "graphs")
def gps() -> Built:
    from torch_geometric.nn import GINEConv, GPSConv

    class Layers(nn.Module):
        """Attention over all nodes beside messages along edges."""

        def __init__(self) -> None:
            super().__init__()
            self.nodes, self.edges, self.head = nn.Embedding(28, 64), nn.Embedding(4, 64), nn.Linear(64, 1)
            mlps = (nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64)) for _ in range(2))
            self.layers = nn.ModuleList(GPSConv(64, GINEConv(mlp), heads=4) for mlp in mlps)

        def forward(self, nodes: Tensor, index: Tensor, kinds: Tensor) -> Tensor:
            x, edges = self.nodes(nodes), self.edges(kinds)
            for layer in self.layers:
                x = layer(x, index, None, edge_attr=edges)
            return self.head(x.mean(0))

    return Layers(), (torch.randint(0, 28, (15,)), torch.randint(0, 15, (2, 40)), torch.randint(0, 4, (40,)))

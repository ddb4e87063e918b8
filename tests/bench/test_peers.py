"""Another package's trainer as an arm: what is refused, what its lines say, and files of other cards."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from colrow.bench import peers, report
from colrow.bench.measure import Job
from colrow.bench.peers import check_peer, is_peer, measure_peer, windows_of
from colrow.cli.bench import Flags, base_config
from colrow.config import RunConfig
from colrow.config_sections import ModelSection
from colrow.errors import ConfigError
from colrow.mesh import Mesh

LINES = [
    "[rank0]:[titan] step:  1  loss: 12.2  grad_norm:  3.1  memory: 58.40GiB(73%)  tps: 1,000  tflops: 9  mfu: 1%",
    "[rank0]:[titan] step:  5  loss: 11.2  grad_norm:  3.1  memory: 58.40GiB(73%)  tps: 18,000  tflops: 9  mfu: 1%",
    "[rank0]:[titan] step: 10  loss: 10.2  grad_norm:  3.1  memory: 58.44GiB(73%)  tps: 17,137  tflops: 9  mfu: 1%",
    "[rank0]:[titan] step: 15  loss:  9.2  grad_norm:  3.1  memory: 58.44GiB(73%)  tps: 16,750  tflops: 9  mfu: 1%",
]


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    (tmp_path / "torchtitan").mkdir()
    (tmp_path / "torchtitan" / "train.py").touch()
    return tmp_path


def base(**flags: Any) -> RunConfig:
    return base_config(Flags(**{"shape": "llama3-8b", "layers": 16, "dp_shard": 2, "seq_len": 8192, **flags}))


@pytest.mark.parametrize(
    ("flags", "words"), [({"shape": "laptop"}, "no model of shape laptop"), ({"accumulate": 2}, "accumulation")]
)
def test_what_a_peer_cannot_run_is_refused(checkout: Path, flags: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        check_peer(f"torchtitan:{checkout}", base(**flags))
    with pytest.raises(ConfigError, match="no torchtitan in"):
        check_peer(f"torchtitan:{checkout / 'other'}", base())


def test_a_peers_row_has_its_best_window_after_the_first(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert windows_of(LINES) == [(58.4, 18_000.0), (58.44, 17_137.0), (58.44, 16_750.0)]
    seen: dict[str, str] = {}

    def output(command: list[str], folder: Path, environment: dict[str, str]) -> list[str]:
        seen.update(environment, folder=str(folder))
        assert (Path(environment["COLROW_PEER_DATA"]) / "data.jsonl").exists()
        return LINES

    monkeypatch.setattr(peers, "_output_of", output)
    arm = f"torchtitan:{checkout}"
    assert is_peer(arm)
    assert not is_peer("fast:train.compile=false")
    job = Job(arm=arm, config=base(), warmup=1, steps=1)
    row = measure_peer(job, "NVIDIA H100 80GB HBM3", 989e12)
    assert row["tokens_per_second_per_gpu"] == 17_137
    assert row["step_ms"] == pytest.approx(8192 / 17_137 * 1e3)
    assert row["peak_reserved_gib"] == 58.44
    assert 0.3 < row["mfu_causal"] < 0.6
    assert seen["folder"] == str(checkout)
    console = Console(record=True, width=160, file=None)
    report.show([row], {"device": "x", "torch": "y", "commit": "z", "date": "d"}, console)
    assert "17,137" in console.export_text()
    monkeypatch.setattr(peers, "_output_of", lambda *_: ["ModuleNotFoundError: No module named 'tyro'"])
    with pytest.raises(ConfigError, match="No module named 'tyro'"):
        measure_peer(job, "CPU", None)


def test_results_of_another_card_are_warned_of(tmp_path: Path) -> None:
    path, here = tmp_path / "results.json", {"device": "NVIDIA H200", "torch": "2.11.0"}
    row = {"arm": "plain", "mesh": {"tp": 2}, "tokens_per_second_per_gpu": 17_583.0, "model": "m", "seq_len": 8}
    path.write_text(json.dumps({"environment": {**here, "date": "d"}, "results": [row]}))
    for environment, warned in ((here, False), ({**here, "device": "NVIDIA H100 80GB HBM3"}, True)):
        console = Console(record=True, width=160)
        report.show_beside(path, environment, console)
        text = console.export_text()
        assert "plain: 17,583 tok/s/GPU" in text
        assert ("of another card, NVIDIA H200" in text) == warned
    bad: list[Any] = [{}, [], {"environment": 1, "results": []}, {"environment": here, "results": [1]}]
    bad += [{"environment": here, "results": [row | {key: []}]} for key in ("mesh", "tokens_per_second_per_gpu")]
    for text in ("[" * 100_000, *map(json.dumps, bad)):
        path.write_text(text)
        with pytest.raises(ConfigError, match="holds no results"):
            report.read(path)


@pytest.mark.exhaustive
@pytest.mark.distributed
def test_transformers_own_tensor_parallelism_is_an_arm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.Qwen3Config(vocab_size=64, num_key_value_heads=2, head_dim=8, **sizes)
    transformers.Qwen3ForCausalLM(config).save_pretrained(tmp_path / "tiny")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    flags = {"shape": "laptop", "layers": None, "dp_shard": None, "tp": 2, "seq_len": 16, "device": "cpu"}
    of_folder = base(**flags).model_copy(update={"model": ModelSection(huggingface=str(tmp_path / "tiny"))})
    row = measure_peer(Job(arm="transformers", config=of_folder, warmup=2, steps=3), "CPU", None)
    assert len(row["steps_ms"]) == 3
    assert row["tokens_per_second_per_gpu"] == pytest.approx(16 / 2 / row["step_ms"] * 1e3)
    assert row["loss_last"] != row["loss_first"]
    assert "parameters sharded by its own plan" in row["ran"]
    with pytest.raises(ConfigError, match=r"model\.huggingface is a folder"):
        check_peer("transformers", base())
    with pytest.raises(ConfigError, match="tp alone"):
        check_peer("transformers", of_folder.model_copy(update={"mesh": Mesh(dp_shard=2)}))

"""Everything that can be known to be wrong is reported before a process starts, with the fix."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from colrow.checking.check import Findings, check_step
from colrow.checkpoint.distributed import Checkpoints
from colrow.cli import main
from colrow.config import RunConfig, load_config
from colrow.data.prepare import prepare
from colrow.derive import judged
from colrow.dryrun.planned_step import PlannedStep
from colrow.errors import CheckpointError, ColrowError, ConfigError, DataError, PlanError
from colrow.models.huggingface import config_to_huggingface
from colrow.models.llama import Llama
from colrow.models.shapes import shape
from colrow.plans.plan import Plan
from colrow.run import decision, plan_check, preflight
from colrow.run.outputs import output_lines
from colrow.run.run_folder import CHECKPOINTS, write_folder
from helpers.started import without_ranks

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"train.global_batch": 6}, "train.global_batch to 4 or 8"),
        ({"mesh.dp_shard": 3}, "train.global_batch to 12"),
        ({"mesh.tp": 3}, "n_heads=8 of laptop is not divisible by mesh.tp=3: set mesh.tp to 1, 2, 4 or 8"),
        ({"model.shape": "article", "mesh.tp": 5}, "n_heads=12 of article"),
        ({"data.seq_len": 31}, r"CR205 .*\n.*seq_len=31 is not divisible by tp=2 .*\n.*use 30 or 32"),
        ({"data.seq_len": 31, "check": False}, r"sequence parallel splits dim 1.: set data.seq_len to 30 or 32"),
        ({"data.seq_len": 512}, "longer than the 256 positions of laptop: set data.seq_len to 256"),
        ({"mesh.pp": 4}, "set mesh.pp to 2$"),
        ({"train.warmup_steps": 100}, "set train.warmup_steps to 99 or less"),
        (
            {"plan": "lama"},
            r"choose from .*llama.*, huggingface, derive, derive-fast, derive-overlap, or give the path",
        ),
        (
            {"derive.split": ["lm_head"]},
            "requests to a derived plan, and plan is llama: set plan to derive, derive-fast or",
        ),
        ({"plan": "derive", "derive.keep_whole": ["model.*.head"]}, r"keep_whole: 'model.\*.head' matches no"),
        ({"plan": "none.yaml"}, "no file 'none.yaml'"),
        ({"model.shape": "laptob"}, "did you mean 'laptop'"),
        ({"model": {"python": "no.such:thing"}}, "No module named 'no'"),
        ({"model": {"python": "pathlib:nothing"}}, "write package.module:callable"),
        ({"model": {"python": "pathlib:Path"}}, "it must return an nn.Module"),
        ({"device": "cuda"}, "use --device cpu"),
        ({"train.fp8": "tensorwise"}, "plan llama has no style with the option fp8"),
        ({"train.fp8": "tensorwise", "mesh.tp": 1}, "the mesh is 1 process: set train.fp8 to null"),
        ({"train.cuda_graph": True}, "train.cuda_graph needs a GPU"),
        ({"train.cuda_graph": True, "mesh.dp_shard": 2}, "train.cuda_graph cannot capture FSDP2"),
        ({"train.cuda_graph": True, "mesh.pp": 2}, "train.cuda_graph cannot capture a pipeline"),
        (
            {"train.cuda_graph": True, "train.activation_checkpoint": "full"},
            "recomputation, .*set train.cuda_graph to false$",
        ),
    ],
)
def test_an_impossible_run_names_the_fix(
    changes: dict[str, Any], text: str, config: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    if "model.shape" in changes:
        changes = {"model.layers": 1, **changes}
    with pytest.raises(ColrowError, match=text):
        preflight.check(config(**changes))


def test_state_that_no_checkpoint_keeps_is_named_before_the_run(
    config: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    preflight.check(config())
    monkeypatch.setattr(Llama, "get_extra_state", lambda self: {"calls": 3})
    with pytest.raises(CheckpointError, match=r"^the model \(Llama\) has an extra state"):
        preflight.check(config())


def test_more_ranks_than_gpus_names_meshes(config: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(
        ConfigError, match=r"2 ranks need 2 GPUs and this host has 1 .*set mesh.tp to 1, or device to cpu$"
    ):
        preflight.check(config(device="auto"))
    assert preflight.check(config(device="cpu")).device_type == "cpu"


def test_a_possible_run_passes(config: Callable[..., RunConfig]) -> None:
    checked = preflight.check(config())
    assert checked.plan.name == "llama"
    assert checked.newest is None
    assert not checked.finished(config())
    assert all(param.is_meta for param in checked.source.model.parameters())


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_shipped_config_can_run(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 64)
    config = load_config(path, {"run.dir": str(tmp_path / "run")})
    assert preflight.check(config).plan.loss == ("linear" if path.stem == "laptop" else "vocab_parallel")


def test_configs_are_shipped() -> None:
    assert {"laptop", "article", "article-2d", "llama3-8b-tp4", "llama3-8b-tp2-fsdp2"} <= {p.stem for p in CONFIGS}


def test_a_huggingface_folder_brings_its_tokenizer(config: Callable[..., RunConfig], tmp_path: Path) -> None:
    folder = tmp_path / "hf"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config_to_huggingface(shape("laptop"), torch.float32)))
    plain = config(model={"huggingface": str(folder), "implementation": "colrow"})
    assert preflight.resolve(plain) == plain
    (folder / "tokenizer.model").write_text("")  # refused where it is read: no other tokenizer is trained
    assert preflight.resolve(plain).data.tokenizer.path == folder
    (folder / "tokenizer.model").unlink()
    (folder / "tokenizer.json").write_text("{}")
    assert preflight.resolve(plain).data.tokenizer.path == folder
    own = config(**{"data.tokenizer": {"vocab_size": 300}, "model.implementation": "colrow"})
    assert preflight.resolve(own) == own


def test_who_computes_a_model_is_resolved(config: Callable[..., RunConfig], tmp_path: Path) -> None:
    ours = config_to_huggingface(shape("laptop"), torch.float32)
    (tmp_path / "config.json").write_text(json.dumps(ours))
    folder = config(model={"huggingface": str(tmp_path)})
    assert preflight.resolve(config()).model.implementation == "colrow"
    assert preflight.resolve(folder).model.implementation == "colrow"
    (tmp_path / "config.json").write_text(json.dumps(ours | {"model_type": "mixtral"}))
    assert preflight.resolve(folder).model.implementation == "transformers"
    required = config(model={"huggingface": str(tmp_path), "implementation": "colrow"})
    assert preflight.resolve(required) == required
    with pytest.raises(ConfigError, match="'mixtral' is not one that colrow's Llama computes"):
        preflight.check(required)


def saved_by_another(config: RunConfig, layers: int, vocabulary: str, extra: dict[str, Any] | None = None) -> None:
    from dataclasses import replace

    model = Llama(replace(shape("laptop"), num_hidden_layers=layers))
    Checkpoints(config.run.dir / CHECKPOINTS, vocabulary=vocabulary).save(100, model, None, extra or {})


def written(config: RunConfig, folder: Path, *, without: str = "", more: dict[str, Any] | None = None) -> Path:
    """The run's YAML, its plan a file: the llama preset with a key left out and others put in."""
    from colrow.config import dump_config

    modules = {key: style for key, style in Plan.preset("llama").modules.items() if key != without}
    Plan(modules | (more or {}), "vocab_parallel", "mine").save(folder / "plan.yaml")
    (folder / "run.yaml").write_text(dump_config(config))
    return folder / "run.yaml"


DATA = {"data.validation_fraction": 0.3, "data.tokenizer": {"vocab_size": 300}}


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[int]:
    """The numbers of ranks that were to be started; none is."""
    (tmp_path / "a.txt").write_text("\n\n".join(f"{i} and {i * i}." for i in range(3000)))
    monkeypatch.chdir(tmp_path)
    return without_ranks(monkeypatch)


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"without": "norm"}, "error CR501 partial-gradient at norm.weight"),
        ({"without": "layers.*.mlp.down_proj"}, "error CR401 fails-in-parallel at layers.0.mlp.down_proj"),
        ({"more": {"layers.*.mlp.gate": "colwise"}}, "error CR101 key-matches-nothing at layers.*.mlp.gate"),
    ],
)
def test_a_broken_plan_stops_before_the_ranks_start(
    change: dict[str, Any],
    code: str,
    config: Callable[..., RunConfig],
    tmp_path: Path,
    launched: list[int],
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = written(config(**{"plan": "plan.yaml", **DATA}), tmp_path, **change)
    assert main(["train", str(run)]) == 2
    reported = capsys.readouterr().err
    assert code in reported
    assert f"docs/checks/{code.split()[1]}.md" in reported
    assert "1 error in plan mine for laptop at tp=2, and nothing was started" in reported
    assert launched == []
    if change == {"without": "norm"}:  # what is only wrong, and not impossible, starts when asked to
        assert main(["train", str(run), "--check", "False"]) == 0
        assert launched == [2]


def test_warnings_are_a_line_each_and_the_ranks_start(
    config: Callable[..., RunConfig], tmp_path: Path, launched: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    gathered = {"style": "colwise", "input": "shard(1)", "output": "replicate"}
    run = written(config(**{"plan": "plan.yaml", **DATA}), tmp_path, more={"lm_head": gathered})
    assert main(["train", str(run)]) == 0
    warnings = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning")]
    assert len(warnings) == 1
    assert "CR302 whole-logits at lm_head: " in warnings[0]
    assert "docs/checks/CR302.md" in warnings[0]
    assert launched == [2]


CAPPED = """
import torch
from colrow.models.llama import Llama, LlamaConfig
from helpers.started import without_ranks

class Capped(Llama):
    def forward(self, x, positions=None, *, seq_len=None):
        return torch.tanh(super().forward(x, positions, seq_len=seq_len) / 5)

def build():
    return Capped(LlamaConfig(vocab_size=320, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
                              num_attention_heads=4, num_key_value_heads=4, head_dim=4, max_position_embeddings=64))
"""


def test_a_pipeline_of_a_model_of_the_users_own_is_compared_with_it(
    config: Callable[..., RunConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "capped_model.py").write_text(CAPPED)
    monkeypatch.syspath_prepend(str(tmp_path))
    own = {"model.shape": None, "model.layers": None, "model.python": "capped_model:build", "mesh.tp": 1, "mesh.pp": 2}
    run = config(**{**own, "data.seq_len": 32})
    with pytest.raises(ConfigError, match=r"Capped cannot be parted into pipeline stages: .* set mesh.pp to 1"):
        preflight.check(run)
    preflight.check(run.with_values({"verify": "never"}))
    preflight.check(run.with_values({"mesh.pp": 1}))


def test_a_derived_plan_is_checked_once(
    config: Callable[..., RunConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checked: list[tuple[int, int]] = []

    def counted(step: PlannedStep, *options: Any) -> Findings:
        checked.append((step.batch_size, step.seq_len))
        return check_step(step, *options)

    monkeypatch.setattr(judged, "check_step", counted)
    monkeypatch.setattr(decision, "check_step", counted)
    run = config(**{"plan": "derive", "model.layers": 1})
    found = preflight.check(run)
    lines = plan_check.check_plan(run, found.source, found.plan, found.judgement)
    assert checked == [(run.train.micro_batch, run.data.seq_len)]
    assert lines == ["split      100% of the parameters and 100% of the FLOPs are split over tp=2"]
    assert plan_check.check_plan(run, found.source, found.plan)[1:] == lines  # as the run's folder has kept it
    assert len(checked) == 1
    another = config(**{"plan": "derive", "model.layers": 1, "run.dir": str(tmp_path / "another")})
    plan_check.check_plan(another, found.source, found.plan)
    assert len(checked) == 2


@pytest.mark.exhaustive
def test_the_first_rank_checks_the_plan_where_no_launcher_did(config: Callable[..., RunConfig], tmp_path: Path) -> None:
    written(config(), tmp_path, without="norm")
    with pytest.raises(PlanError, match=r"error CR501 partial-gradient at norm\.weight"):
        plan_check.check_plan_apart(config(), Plan.load(tmp_path / "plan.yaml"))
    assert not torch.distributed.is_initialized()


def test_a_checkpoint_of_another_model_or_vocabulary_is_refused(
    config: Callable[..., RunConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text("\n\n".join(f"{i} and {i * i}." for i in range(3000)))
    run = config(**{"data.validation_fraction": 0.3, "data.tokenizer": {"vocab_size": 300}})
    tokenizer = prepare(run.data, 4096, progress=False).tokenizer
    saved_by_another(run, 2, tokenizer.digest)
    preflight.require_vocabulary_of(preflight.check(run), run, tokenizer)
    saved_by_another(run, 2, "another")
    with pytest.raises(CheckpointError, match="another vocabulary"):
        preflight.require_vocabulary_of(preflight.check(run), run, tokenizer)
    write_folder(run, Plan.preset("llama"), tokenizer)
    advised = {"data.tokenizer.path": run.run.dir / "tokenizer.json", "data.tokenizer.vocab_size": None}
    with pytest.raises(CheckpointError, match=rf"data.tokenizer.path to {advised['data.tokenizer.path']} and .* null"):
        preflight.require_vocabulary_of(preflight.check(run), run, tokenizer)
    preflight.check(run.with_values(advised))  # not refused as another config
    with pytest.raises(ConfigError, match=r"data\.tokenizer\.vocab_size: 300 -> 310"):
        preflight.check(run.with_values({"data.tokenizer.vocab_size": 310}))
    saved_by_another(run, 1, tokenizer.digest)
    with pytest.raises(CheckpointError, match="another model"):
        preflight.check(run)


def test_another_text_than_the_checkpoints_is_refused_before_it_is_tokenized(
    config: Callable[..., RunConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    text = "\n\n".join(f"{i} and {i * i}." for i in range(3000))
    (tmp_path / "a.txt").write_text(text)
    run = config(**{**DATA, "train.steps": 200})
    data = prepare(run.data, 4096, progress=False)
    saved_by_another(run, 2, data.tokenizer.digest, {"corpus": data.fingerprint})
    same_text = partial(preflight.require_text_of, preflight.check(run), run)
    assert prepare(run.data, 4096, progress=False, accept=same_text).fingerprint == data.fingerprint
    (tmp_path / "a.txt").write_text(text + " More.")
    made = sorted(run.data.cache.glob("tokens-*/meta.json"))
    with pytest.raises(DataError, match=r"holds other text than when the run in .* began: restore the previous text"):
        prepare(run.data, 4096, progress=False, accept=same_text)
    assert sorted(run.data.cache.glob("tokens-*/meta.json")) == made


def test_damaged_checkpoints_are_named_and_not_trained_over(config: Callable[..., RunConfig], tmp_path: Path) -> None:
    run, folder = config(**{"model.layers": 1, "train.steps": 200}), tmp_path / "run" / CHECKPOINTS
    saved_by_another(run, 1, "any")
    shutil.copytree(folder / "step-100", folder / "step-101")
    (folder / "step-101" / "manifest.json").write_text("{")
    checked = preflight.check(run)
    assert checked.newest is not None
    assert checked.newest.step == 100
    (line, *_) = output_lines(run, checked.source, checked.stored)
    assert "step-101 is damaged (" in " ".join(line.split())
    assert "the run continues from step 100" in " ".join(line.split())
    shutil.rmtree(folder / "step-100")
    with pytest.raises(CheckpointError, match=r"no complete checkpoint, and step-101 is damaged .*: set run\.dir to"):
        preflight.check(run)
    assert preflight.check(config(**{"run.dir": str(tmp_path / "another")})).newest is None  # as is advised
    folder.rename(tmp_path / "away")
    assert preflight.check(run).newest is None


def test_a_finished_run_says_so(
    config: Callable[..., RunConfig], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from colrow.config import dump_config

    run = config(**{"run.dir": str(tmp_path / "my run")})
    saved_by_another(run, 2, "any")
    (tmp_path / "run.yaml").write_text(dump_config(run))
    assert main(["train", str(tmp_path / "run.yaml")]) == 0
    text = capsys.readouterr().out
    assert "is finished: 100 of 100 steps" in text
    commands = [shlex.split(command) for command in re.findall(r"`(colrow [^`]*)`", text)]
    assert [command[1:3] for command in commands] == [["export", str(run.run.dir)], ["generate", str(run.run.dir)]]


def test_flags_stand_over_the_file(config: Callable[..., RunConfig], tmp_path: Path) -> None:
    from colrow.cli.config_flags import read_flags
    from colrow.config import dump_config

    (tmp_path / "run.yaml").write_text(dump_config(config()))
    flags = [
        "--mesh.tp",
        "1",
        "--train.betas",
        "0.8",
        "0.99",
        "--train.grad_clip",
        "None",
        "--checkpoint.export",
        "False",
    ]
    read = preflight.resolve(load_config(tmp_path / "run.yaml", read_flags(flags)))
    want = {"mesh.tp": 1, "train.betas": (0.8, 0.99), "train.grad_clip": None, "checkpoint.export": False}
    assert read == config(**want, **{"model.implementation": "colrow"})

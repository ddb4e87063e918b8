"""What users launch with on several hosts: each file parses, and its command line is one that colrow accepts."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from colrow.cli.config_flags import read_flags
from colrow.config import RunConfig, load_config
from colrow.run import preflight

ROOT = Path(__file__).parents[1]
LAUNCH = ROOT / "examples" / "launch"


def split_command(words: list[str]) -> tuple[dict[str, str], list[str]]:
    """torchrun's flags, and what follows `-m colrow train`."""
    at = words.index("-m")
    assert words[at : at + 3] == ["-m", "colrow", "train"]
    flags = words[words.index("torchrun") + 1 : at]
    assert len(flags) % 2 == 0
    return dict(zip(flags[::2], flags[1::2], strict=True)), words[at + 3 :]


def script_command(name: str) -> tuple[dict[str, str], list[str]]:
    """The torchrun command of a shell script, with its variables as they stand."""
    text = (LAUNCH / name).read_text(encoding="utf-8").replace("\\\n", " ")
    lines = [line for line in text.splitlines() if re.match(r"(srun )?torchrun ", line)]
    assert len(lines) == 1
    return split_command(shlex.split(lines[0]))


def accepted(arguments: list[str], hosts: int, ranks: int) -> RunConfig:
    """The config of `colrow train ARGUMENTS`, whole enough to start on so many hosts with so many ranks each."""
    config = preflight.resolve(load_config(ROOT / arguments[0], read_flags([*arguments[1:], "--device", "cpu"])))
    config.mesh.require_world_size(hosts * ranks)
    assert config.mesh.warning_across_hosts(ranks) is None
    preflight.check(config)
    assert 0 < config.checkpoint.every < config.train.steps  # what a restart goes back to
    return config


def directives() -> dict[str, str]:
    """sbatch's options: it reads them until the first command."""
    found = {}
    for line in (LAUNCH / "slurm.sbatch").read_text(encoding="utf-8").splitlines():
        if line and not line.startswith("#"):
            break
        if match := re.fullmatch(r"#SBATCH --([a-z-]+)(?:=(\S+))?", line):
            found[match[1]] = match[2] or ""
        else:
            assert not line.startswith("#SBATCH"), line
    return found


@pytest.mark.parametrize("name", ["torchrun-two-hosts.sh", "slurm.sbatch"])
def test_the_scripts_parse(name: str, tmp_path: Path) -> None:
    bash = shutil.which("bash")
    assert bash is not None
    assert subprocess.run([bash, "-n", str(LAUNCH / name)]).returncode == 0
    broken = tmp_path / name
    broken.write_text((LAUNCH / name).read_text(encoding="utf-8") + "\nif true; then\n", encoding="utf-8")
    assert subprocess.run([bash, "-n", str(broken)], capture_output=True).returncode != 0


def test_the_command_for_two_hosts_is_accepted() -> None:
    torchrun, arguments = script_command("torchrun-two-hosts.sh")
    assert torchrun.keys() >= {"--nnodes", "--nproc-per-node", "--max-restarts", "--rdzv-endpoint", "--rdzv-id"}
    accepted(arguments, int(torchrun["--nnodes"]), int(torchrun["--nproc-per-node"]))


def test_the_slurm_job_asks_for_what_its_command_uses() -> None:
    torchrun, arguments = script_command("slurm.sbatch")
    requested = directives()
    assert requested.keys() >= {"job-name", "nodes", "ntasks-per-node", "gpus-per-node", "time", "signal", "requeue"}
    assert requested["ntasks-per-node"] == "1"  # torchrun starts the ranks of a host
    assert requested["gpus-per-node"] == torchrun["--nproc-per-node"]
    assert re.fullmatch(r"\d+(-\d+)?(:\d\d){1,2}", requested["time"])
    assert re.fullmatch(r"([RB]+:)?(SIG)?[A-Z]+\d?@\d+", requested["signal"])
    accepted(arguments, int(requested["nodes"]), int(requested["gpus-per-node"]))


def test_the_train_job_has_its_fields_and_an_accepted_command() -> None:
    job = yaml.safe_load((LAUNCH / "kubeflow-trainjob.yaml").read_text(encoding="utf-8"))
    assert (job["apiVersion"], job["kind"]) == ("trainer.kubeflow.org/v1alpha1", "TrainJob")
    assert re.fullmatch(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?", job["metadata"]["name"])
    spec = job["spec"]
    assert spec.keys() <= {"runtimeRef", "initializer", "trainer", "labels", "annotations", "podTemplateOverrides"}
    assert spec["runtimeRef"]["name"] == "torch-distributed"
    trainer = spec["trainer"]
    assert trainer.keys() <= {"image", "command", "args", "env", "numNodes", "resourcesPerNode", "numProcPerNode"}
    assert all(isinstance(word, str) for word in trainer["command"] + trainer["args"])
    assert trainer["resourcesPerNode"]["limits"]["nvidia.com/gpu"] == str(trainer["numProcPerNode"])
    torchrun, arguments = split_command(trainer["command"] + trainer["args"])
    assert torchrun == {}  # the runtime sets torchrun's PET_ variables
    config = accepted(arguments, trainer["numNodes"], trainer["numProcPerNode"])
    (pods,) = spec["podTemplateOverrides"]
    (container,) = pods["spec"]["containers"]
    mounted = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    assert mounted.keys() == {volume["name"] for volume in pods["spec"]["volumes"]}
    for path in (config.run.dir, config.data.cache):  # all pods read and write both
        assert any(path.is_relative_to(mount) for mount in mounted.values())


def test_a_wrong_flag_and_a_wrong_mesh_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    """The negative control of `accepted`."""
    torchrun, arguments = script_command("torchrun-two-hosts.sh")
    with pytest.raises((SystemExit, ValueError)) as refusal:
        load_config(ROOT / arguments[0], read_flags([*arguments[1:], "--mesh.tensor", "4"]))
    assert "mesh.tensor" in f"{refusal.value} {capsys.readouterr()}"
    with pytest.raises(ValueError, match="needs 16 ranks, but there are 8"):
        accepted([*arguments, "--mesh.tp", "8"], int(torchrun["--nnodes"]), int(torchrun["--nproc-per-node"]))

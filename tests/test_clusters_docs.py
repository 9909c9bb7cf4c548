"""The files for clusters are what their programs read, and every option in them is one of ours."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest
import yaml

from orchestrator.command_line import parser, resolve
from orchestrator.output import Output

ROOT = Path(__file__).resolve().parents[1]
CLUSTERS = ROOT / "docs/clusters"
SBATCH = CLUSTERS / "sweep.sbatch"
JOB = yaml.safe_load((CLUSTERS / "rayjob.yaml").read_text(encoding="utf-8"))
DOCKERFILE = (ROOT / "Dockerfile").read_text(encoding="utf-8")


def joined(text: str) -> list[str]:
    """The lines without comments, those that go on in the next one joined with it."""
    lines = "\n".join(line for line in text.splitlines() if not line.lstrip().startswith("#"))
    return [line.strip() for line in re.sub(r"\\\n", " ", lines).splitlines() if line.strip()]


def sweeps(text: str) -> list[list[str]]:
    """The arguments of each `streamllm sweep` in it."""
    return [shlex.split(line.split("streamllm sweep", 1)[1]) for line in joined(text) if "streamllm sweep" in line]


def code_of(page: Path) -> str:
    return "\n".join(re.findall(r"^```bash\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE))


COMMANDS = {
    "sweep.sbatch": sweeps(SBATCH.read_text(encoding="utf-8")),
    "rayjob.yaml": sweeps(JOB["spec"]["entrypoint"]),
    **{
        page.name: sweeps(code_of(page)) for page in sorted(CLUSTERS.glob("*.md")) if "streamllm sweep" in code_of(page)
    },
}


@pytest.mark.parametrize("name", COMMANDS)
def test_the_options_are_ours(name):
    assert COMMANDS[name]
    for command in COMMANDS[name]:
        parser().parse_args(command)


def test_the_batch_file_is_bash():
    subprocess.run(["bash", "-n", SBATCH], check=True)
    if shutil.which("shellcheck"):
        subprocess.run(["shellcheck", SBATCH], check=True)


def test_slurm_reads_its_directives():
    """They count only before the first command, and the sweep's own time is up before Slurm's."""
    lines = SBATCH.read_text(encoding="utf-8").splitlines()
    first = next(number for number, line in enumerate(lines) if line and not line.startswith("#"))
    directives = dict(
        re.fullmatch(r"#SBATCH --([a-z-]+)(?:=(\S+))?", line).groups() for line in lines if line.startswith("#SBATCH")
    )
    assert not any(line.startswith("#SBATCH") for line in lines[first:])
    assert directives["ntasks-per-node"] == "1" and {"nodes", "exclusive", "requeue"} <= directives.keys()
    hours, minutes, _ = map(int, directives["time"].split(":"))
    (command,) = COMMANDS["sweep.sbatch"]
    from orchestrator.command_line import seconds

    assert seconds(parser().parse_args(command).time_budget) < 60 * (60 * hours + minutes)


def test_the_batch_file_runs_the_sweep_on_its_own_ray(tmp_path):
    """With stand-ins for Slurm's commands and Ray's, of two nodes."""
    (tmp_path / "bin").mkdir()
    (tmp_path / ".venv/bin").mkdir(parents=True)
    (tmp_path / ".venv/bin/activate").write_text("")
    stand_ins = {
        "scontrol": 'printf "n1\\nn2\\n"',
        "srun": 'while [[ $1 == --* ]]; do shift; done; exec "$@"',
        "hostname": "echo 10.0.0.1 fe80::1",
        "ray": 'printf "%s\\n" "$@"',
    }
    for name, body in stand_ins.items():
        (tmp_path / "bin" / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    settings = {"SLURM_SUBMIT_DIR": str(tmp_path), "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_JOB_ID": "1234567"}
    settings |= {"SLURM_JOB_NUM_NODES": "2", "SLURM_CPUS_PER_TASK": "64", "SLURM_GPUS_ON_NODE": "8"}
    settings["PATH"] = f"{tmp_path / 'bin'}:/usr/bin:/bin"
    done = subprocess.run(["bash", SBATCH], env=settings, capture_output=True, text=True, check=True)
    words = done.stdout.splitlines()
    split = words.index("--")
    ray, command = words[:split], words[split + 1 :]
    assert ray[:5] == ["symmetric-run", "--address", "10.0.0.1:24567", "--min-nodes", "2"]
    assert ray[-4:] == ["--num-cpus", "64", "--num-gpus", "8"]
    assert command[:2] == ["streamllm", "sweep"]
    found = parser().parse_args(command[2:])
    assert found.address == "10.0.0.1:24567" and found.output == str(tmp_path / "sweeps/pythia")


def test_the_ray_that_is_required_has_symmetric_run():
    from ray.scripts.symmetric_run import symmetric_run

    assert {option.name for option in symmetric_run.params} >= {"address", "min_nodes"}
    (required,) = [one for one in project()["dependencies"] if one.startswith("ray>=")]
    assert tuple(map(int, required.removeprefix("ray>=").split("."))) >= (2, 49)


def test_the_rayjob_is_one():
    assert (JOB["apiVersion"], JOB["kind"]) == ("ray.io/v1", "RayJob")
    spec = JOB["spec"]
    assert set(spec) <= {
        "entrypoint", "backoffLimit", "shutdownAfterJobFinishes", "ttlSecondsAfterFinished", "rayClusterSpec",
        "activeDeadlineSeconds", "runtimeEnvYAML", "submissionMode", "suspend",
    }  # fmt: skip
    cluster = spec["rayClusterSpec"]
    (pinned,) = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line.startswith("ray==")]
    assert cluster["rayVersion"] == pinned.removeprefix("ray==")
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    for group in groups:
        assert all(isinstance(value, str) for value in group["rayStartParams"].values()), "Kubernetes takes strings"
        (container,) = group["template"]["spec"]["containers"]
        assert container["image"] and container["resources"]["limits"] == container["resources"]["requests"]
    for group in cluster["workerGroupSpecs"]:
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"] and group["groupName"]


def test_the_rayjobs_results_outlive_its_pods():
    (command,) = COMMANDS["rayjob.yaml"]
    assert Output.of(parser().parse_args(command).output).copy is not None


def project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def instructions(name: str) -> list[str]:
    return [line.split(maxsplit=1)[1] for line in joined(DOCKERFILE) if line.startswith(f"{name} ")]


def test_what_the_image_copies_is_there_and_not_ignored():
    ignored = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and not line.startswith("#")]
    assert ignored[0] == "*"
    taken = {line[1:] for line in ignored if line.startswith("!")}
    copied = [source for line in instructions("COPY") for source in line.split()[:-1]]
    assert set(copied) == taken and all((ROOT / source).exists() for source in copied)
    packages = [name.removesuffix("*") for name in setuptools()["packages"]["find"]["include"]]
    assert set(packages) <= taken
    assert {project()["readme"], *project()["license-files"]} - taken == {"streamllm/testbed/LICENSE-PSF.txt"}


def setuptools() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]


def test_the_image_installs_the_package_with_what_it_has():
    arguments = dict(line.partition("=")[::2] for line in instructions("ARG"))
    assert arguments["BASE"] and set(arguments["EXTRAS"].split(",")) <= project()["optional-dependencies"].keys()
    assert "ray[default]" in shlex.split(arguments["ALSO"])[0].split()
    installs = [line for line in instructions("RUN") if "pip install" in line]
    assert installs and all("-c constraints.txt" in line and ".[${EXTRAS}]" in line for line in installs)


def test_the_image_is_nobodys_root_and_starts_the_command():
    (user,) = instructions("USER")
    assert user != "root" and any("useradd" in line and user in line for line in instructions("RUN"))
    assert instructions("ENTRYPOINT") == ['["streamllm"]'] and "streamllm" in project()["scripts"]


def test_the_pages_of_docker_name_arguments_it_has():
    page = (CLUSTERS / "docker.md").read_text(encoding="utf-8")
    named = set(re.findall(r"--build-arg (\w+)", page)) | set(re.findall(r"^\| `(\w+)` \|", page, re.MULTILINE))
    assert named == {line.partition("=")[0] for line in instructions("ARG")}


def test_what_the_page_says_of_a_job_is_what_is_said(tmp_path, monkeypatch):
    folder = tmp_path / "session_x/runtime_resources/working_dir_files/_ray_pkg_x"
    folder.mkdir(parents=True)
    monkeypatch.chdir(folder)
    with pytest.raises(ValueError) as raised:
        resolve(parser().parse_args(["--study", "pythia"]))
    assert f"error: {raised.value}\n" in (CLUSTERS / "ray-job.md").read_text(encoding="utf-8")

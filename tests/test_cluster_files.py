"""The files in cluster/, as far as they can be checked where there is no cluster."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from rlcompress import spec
from tests.shell import ROOT

CLUSTER = ROOT / "cluster"
LAUNCHERS = ("local", "aws", "gcp")
#: That start Ray, and so open ports.
STARTERS = ("local.yaml", "aws.yaml", "gcp.yaml", "slurm.sh")


def load(name: str) -> dict[str, Any]:
    return yaml.safe_load((CLUSTER / name).read_text())


def pins() -> dict[str, str]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    words = [re.match(r"([\w-]+)(?:\[.*\])?==(.+)", text) for text in project["dependencies"]]
    return {word[1]: word[2] for word in words if word} | {"rlcompress": project["version"]}


@pytest.fixture(scope="module")
def schema() -> dict[str, Any]:
    (folder,) = importlib.util.find_spec("ray").submodule_search_locations
    return json.loads((Path(folder) / "autoscaler" / "ray-schema.json").read_text())


def shares() -> float:
    """Of a GPU an env runner, in the experiment that the cluster files are made for."""
    experiment = spec.resolve(spec.load_experiments(ROOT / "experiments.yaml"), "vgg19-cifar10")
    return experiment.ppo.num_gpus_per_env_runner


@pytest.mark.parametrize("name", LAUNCHERS)
def test_a_launcher_file_is_what_rays_schema_wants(schema, name):
    jsonschema.validate(load(f"{name}.yaml"), schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({**load(f"{name}.yaml"), "max_worker": 2}, schema)


@pytest.mark.parametrize("name", ["aws", "gcp"])
def test_gpu_workers_come_and_go_and_are_spot(name):
    config = load(f"{name}.yaml")
    types = config["available_node_types"]
    head, worker = types[config["head_node_type"]], types["worker"]
    assert worker["min_workers"] == 0 < worker["max_workers"] <= config["max_workers"]
    assert config["idle_timeout_minutes"] > 0
    text = json.dumps(worker["node_config"])
    assert '"MarketType": "spot"' in text or '"preemptible": true' in text
    assert "spot" not in json.dumps(head["node_config"]).lower()
    assert "preemptible" not in json.dumps(head["node_config"])
    # Ray puts nothing beside the driver, and a GPU's share of runners finds a core each.
    assert head["resources"] == {"CPU": 0, "GPU": 0}
    assert worker["resources"]["CPU"] >= worker["resources"]["GPU"] / shares()


@pytest.mark.parametrize("name", STARTERS)
def test_ray_starts_with_its_token_and_listens_on_loopback(name):
    text = (CLUSTER / name).read_text().replace("\\\n", " ")
    assert "0.0.0.0" not in text
    if name.endswith(".sh"):
        assert "RAY_AUTH_MODE=token" in text[: text.index("ray start")]
        starts = re.findall(r"ray start[^\n]*", text)
    else:
        config = load(name)
        keys = ("head_start_ray_commands", "worker_start_ray_commands")
        starts = [line for key in keys for line in config[key] if "ray start" in line]
        assert all("RAY_AUTH_MODE=token" in line for line in starts)
        assert config["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token"
    heads = [line for line in starts if "--head" in line]
    assert len(starts) == 2
    assert len(heads) == 1
    assert "--dashboard-host=127.0.0.1" in heads[0]


@pytest.mark.parametrize("name", LAUNCHERS)
def test_nodes_get_the_project_without_what_it_has_made(name):
    config = load(f"{name}.yaml")
    assert config["file_mounts"]["~/rlcompress"] == "."
    assert {".git", ".venv", "/runs", "/data"} <= set(config["rsync_exclude"])
    assert any("uv sync" in line for line in config["setup_commands"])


def test_the_rayjob_is_whole():
    """KubeRay's schema comes with no package: its rules that a mistake here would break."""
    job = load("rayjob.yaml")
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    assert re.fullmatch(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?", job["metadata"]["name"])
    about, cluster = job["spec"], job["spec"]["rayClusterSpec"]
    assert about["submissionMode"] == "K8sJobMode"
    assert about["shutdownAfterJobFinishes"] is True
    assert cluster["authOptions"] == {"mode": "token"}
    assert cluster["enableInTreeAutoscaling"] is True
    head, (worker,) = cluster["headGroupSpec"], cluster["workerGroupSpecs"]
    assert head["serviceType"] == "ClusterIP"
    assert worker["minReplicas"] <= worker["replicas"] <= worker["maxReplicas"]
    for group in (head, worker):
        # KubeRay wants strings, and requests that are no more than the limits.
        assert all(isinstance(v, str) for v in group["rayStartParams"].values())
        (container,) = group["template"]["spec"]["containers"]
        assert container["resources"]["requests"] == container["resources"]["limits"]
    limits = worker["template"]["spec"]["containers"][0]["resources"]["limits"]
    assert int(limits["cpu"]) >= int(limits["nvidia.com/gpu"]) / shares()
    # The cluster goes, so the run must stay elsewhere.
    assert "--set storage=" in about["entrypoint"]


def test_the_rayjobs_command_names_an_experiment_and_options_that_are_there():
    words = load("rayjob.yaml")["spec"]["entrypoint"].split()
    assert words[:4] == ["python", "-m", "rlcompress", "run"]
    sets = [words[i + 1] for i, word in enumerate(words) if word == "--set"]
    spec.resolve(spec.load_experiments(ROOT / "experiments.yaml"), words[4], sets)


def test_versions_are_those_of_the_project():
    job, docker = load("rayjob.yaml"), (CLUSTER / "Dockerfile").read_text()
    cluster = job["spec"]["rayClusterSpec"]
    assert cluster["rayVersion"] == pins()["ray"]
    base = re.search(r"^FROM rayproject/ray:([\d.]+)-py(\d)(\d+)", docker, re.M)
    assert base[1] == pins()["ray"]
    python = f"{base[2]}.{base[3]}"
    assert f">={python}," in (ROOT / "pyproject.toml").read_text()
    for name in LAUNCHERS:
        assert f"--python {python}" in (CLUSTER / f"{name}.yaml").read_text()
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    images = [g["template"]["spec"]["containers"][0]["image"] for g in groups]
    assert {image.rpartition(":")[2] for image in images} == {pins()["rlcompress"]}
    assert images[0] in docker


def test_what_the_image_copies_is_there():
    for line in re.findall(r"^COPY (?:--\S+ )?(.*)$", (CLUSTER / "Dockerfile").read_text(), re.M):
        assert all((ROOT / name).exists() for name in line.split()[:-1]), line


@pytest.mark.parametrize("name", STARTERS)
def test_beside_workers_ray_is_told_of_no_core_and_no_gpu_of_the_head(name):
    text = (CLUSTER / name).read_text()
    if name in ("aws.yaml", "gcp.yaml"):
        config = load(name)
        types = config["available_node_types"]
        assert types[config["head_node_type"]]["resources"] == {"CPU": 0, "GPU": 0}
    else:
        assert text.count("--num-cpus=0 --num-gpus=0") == 1
    if name == "local.yaml":
        (head,) = [c for c in load(name)["head_start_ray_commands"] if "--head" in c]
        assert "--num-cpus=0 --num-gpus=0" in head


def test_google_spot_workers_do_not_start_again_by_themselves():
    """Google's `scheduling` is an object, and a preemptible machine must not restart."""
    types = load("gcp.yaml")["available_node_types"]
    head, worker = (types[name]["node_config"]["scheduling"] for name in ("head", "worker"))
    assert head == {"onHostMaintenance": "TERMINATE"}
    assert worker == {**head, "preemptible": True, "automaticRestart": False}


#: Programs that the Slurm script starts, in place of the real ones. The run waits for every `srun`.
STUBS = {
    "srun": 'echo "$@" >> calls',
    "ray": "exit 0",
    "python": 'until [ "$(wc -l < calls)" -ge "$STARTED" ]; do sleep 0.05; done 2>/dev/null',
}


@pytest.mark.parametrize(("nodes", "starts"), [(1, 1), (3, 2)])
def test_in_slurm_a_lone_node_has_its_cores_for_ray(tmp_path, nodes, starts):
    folder = tmp_path / ".venv" / "bin"
    folder.mkdir(parents=True)
    for name, body in STUBS.items():
        (folder / name).write_text(f"#!/bin/sh\n{body}\n")
        (folder / name).chmod(0o755)
    (tmp_path / "calls").write_text("")
    slurm = {"SUBMIT_DIR": str(tmp_path), "JOB_ID": "7", "JOB_NUM_NODES": str(nodes)}
    env = {**os.environ, **{f"SLURM_{key}": value for key, value in slurm.items()}}
    script = ["bash", str(CLUSTER / "slurm.sh"), "tiny"]
    subprocess.run(script, env={**env, "STARTED": str(starts)}, check=True, timeout=60)
    calls = (tmp_path / "calls").read_text().splitlines()
    assert len(calls) == starts
    (head,) = [call for call in calls if "--head" in call]
    assert ("--num-cpus=0 --num-gpus=0" in head) == (nodes > 1)


def test_the_slurm_script_is_sound():
    path = CLUSTER / "slurm.sh"
    subprocess.run(["bash", "-n", path], check=True)
    if shellcheck := shutil.which("shellcheck"):
        subprocess.run([shellcheck, path], check=True)


def test_the_upload_leaves_out_what_is_large_or_made():
    excludes = load("runtime_env.yaml")["excludes"]
    assert {".git", ".venv", "/runs", "/data", "__pycache__"} <= set(excludes)


def test_the_readme_names_every_file():
    text = (CLUSTER / "README.md").read_text()
    for path in CLUSTER.iterdir():
        assert path.name == "README.md" or path.name in text, path.name

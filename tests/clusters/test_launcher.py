"""Cluster files of `ray up`."""

import copy
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from serve import ingress
from tests.clusters.checks import CLUSTERS, ROOT, launcher, written

FILES = ["aws", "gcp", "on_premises"]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def load(name: str) -> dict[str, Any]:
    return yaml.safe_load((CLUSTERS / "launcher" / f"{name}.yaml").read_text())


def nodes(name: str) -> dict[str, dict[str, Any]]:
    return load(name)["available_node_types"]


def start_options(name: str, command: str) -> dict[str, str]:
    """The options of `ray start` in a start command."""
    (line,) = (line for line in load(name)[command] if "ray start" in line)
    words = [word for word in shlex.split(line) if word.startswith("--")]
    return dict(word.removeprefix("--").partition("=")[::2] for word in words)


@pytest.mark.parametrize(
    ("name", "keys", "value", "message"),
    [
        ("aws", ["max_worker"], 3, "Additional properties are not allowed"),
        ("aws", ["max_workers"], -1, "minimum"),
        ("aws", ["head_node_type"], "heads", "head_node_type"),
        ("aws", ["available_node_types", "gpu_spot", "min_workers"], 99, "smaller than the sum"),
        ("aws", ["available_node_types", "head", "node_config", "InstanceTyp"], "m7i.xlarge", "Unknown parameter"),
        ("aws", ["available_node_types", "head", "node_config", "ImageId"], 3, "Invalid type for parameter ImageId"),
        ("gcp", ["available_node_types", "cpu_spot", "node_config", "scheduling"], [{"preemptible": True}], "object"),
        ("gcp", ["available_node_types", "head", "node_config", "machinetype"], "n2", "no field 'machinetype'"),
        ("gcp", ["available_node_types", "head", "node_config", "disks", 0, "type"], "SSD", "must be one of"),
        ("on_premises", ["provider", "worker_ips"], "gpu-1", "is not of type 'array'"),
    ],
)
def test_checker_finds_wrong_fields(name: str, keys: list[Any], value: Any, message: str):
    config = copy.deepcopy(load(name))
    place: Any = config
    for key in keys[:-1]:
        place = place[key]
    place[keys[-1]] = value
    (error,) = launcher(written(config))[:1]
    assert message in error


@pytest.mark.parametrize("name", ["aws", "gcp"])
def test_head_has_no_gpu_and_takes_no_work(name: str):
    config = load(name)
    assert config["available_node_types"][config["head_node_type"]]["resources"] == {"CPU": 0}


def test_workers_on_clouds_are_spot_with_one_gpu_and_limits():
    assert nodes("aws")["gpu_spot"]["node_config"]["InstanceMarketOptions"]["MarketType"] == "spot"
    assert nodes("gcp")["gpu_spot"]["node_config"]["scheduling"]["provisioningModel"] == "SPOT"
    for name in ("aws", "gcp"):
        gpu = nodes(name)["gpu_spot"]
        assert gpu["resources"]["GPU"] == 1
        assert (gpu["min_workers"], load(name)["max_workers"]) == (0, 12)
        assert sum(node.get("max_workers", 0) for node in nodes(name).values()) <= load(name)["max_workers"]


@pytest.mark.parametrize("name", FILES)
def test_token_authentication_is_on_at_every_node(name: str):
    config = load(name)
    assert config["file_mounts"]["~/.ray"] == "~/.yan/auth"
    mode = "RAY_AUTH_MODE=token"
    if "docker" in config:
        assert f"--env {mode}" in config["docker"]["run_options"]
    else:
        starts = [*config["head_start_ray_commands"], *config["worker_start_ray_commands"]]
        assert all(mode in line for line in starts if "ray start" in line)


@pytest.mark.parametrize("name", FILES)
def test_every_node_serves_behind_haproxy(name: str):
    config = load(name)
    if "docker" in config:  # the image says so, see test_docker.py
        assert "/yan:" in config["docker"]["image"] and "/yan:" in config["docker"]["head_image"]
        return
    for line in (*config["head_start_ray_commands"], *config["worker_start_ray_commands"]):
        if "ray start" in line:
            exported = shlex.split(line.split("export ")[1].split(";")[0])
            assert f"{ingress.ENABLED}=1" in exported and f"{ingress.SEPARATE_LOOP}=0" in exported
            assert f"RAY_SERVE_HAPROXY_RETRY_ON={ingress.RETRIED}" in exported
            assert "YAN_HAPROXY_LOOPBACK=1" in exported
            (script,) = [word.partition("=")[2] for word in exported if "BINARY_PATH" in word]
            (code,) = [place.replace("~", "$HOME") for place, here in config["file_mounts"].items() if here == "."]
            assert ROOT / Path(script).relative_to(code) == ingress.SCRIPT and os.access(ingress.SCRIPT, os.X_OK)


@pytest.mark.parametrize("name", FILES)
def test_dashboard_listens_on_the_head_alone(name: str):
    assert start_options(name, "head_start_ray_commands")["dashboard-host"] == "127.0.0.1"


def test_nodes_on_clouds_have_no_public_address_and_no_metadata_without_token():
    for node in nodes("aws").values():
        assert node["node_config"]["MetadataOptions"]["HttpTokens"] == "required"
        assert all(disk["Ebs"]["Encrypted"] for disk in node["node_config"]["BlockDeviceMappings"])
        assert node["node_config"]["SecurityGroupIds"], "Ray's own security group opens port 22 to all"
    for node in nodes("gcp").values():
        assert all("accessConfigs" not in interface for interface in node["node_config"]["networkInterfaces"])
    assert load("aws")["provider"]["use_internal_ips"] and load("gcp")["provider"]["use_internal_ips"]


@pytest.mark.parametrize("name", ["aws", "gcp"])
@pytest.mark.parametrize("kind", ["head", "worker"])
def test_object_store_fits_into_shared_memory_and_spills_to_a_mounted_disk(name: str, kind: str):
    options = start_options(name, f"{kind}_start_ray_commands")
    docker = load(name)["docker"]
    (shm,) = (re.fullmatch(r"--shm-size=(\d+)g", o) for o in docker[f"{kind}_run_options"] if "shm" in o)
    assert shm is not None
    assert int(options["object-store-memory"]) < int(shm[1]) * 2**30
    assert f"--volume /mnt/spill:{options['object-spilling-directory']}" in " ".join(docker["run_options"])


@pytest.mark.parametrize("name", ["aws", "gcp"])
def test_images_are_of_this_version(name: str):
    docker = load(name)["docker"]
    assert docker["image"].endswith(f":{PROJECT['version']}-cuda")
    assert docker["head_image"].endswith(f":{PROJECT['version']}-cpu")


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("kind", ["head", "worker"])
def test_ray_start_knows_every_option(name: str, kind: str):
    from ray.scripts.scripts import start

    known = {flag.removeprefix("--") for option in start.params for flag in option.opts}
    assert set(start_options(name, f"{kind}_start_ray_commands")) <= known


@pytest.mark.parametrize("name", FILES)
def test_every_node_knows_who_may_ask_a_service(name: str):
    """Without keys a server that listens beyond loopback does not start."""
    for command in ("head_start_ray_commands", "worker_start_ray_commands"):
        (line,) = (line for line in load(name)[command] if "ray start" in line)
        assert "YAN_API_KEYS_FILE=$HOME/.ray/api_keys; ray start" in " ".join(line.split())
        assert line.index("export") < line.index("YAN_API_KEYS_FILE")


@pytest.mark.parametrize("name", FILES)
def test_every_node_knows_where_mlflow_is(name: str):
    """A service whose models come from a registry asks it."""
    config = load(name)
    if "docker" in config:
        assert any("--env MLFLOW_TRACKING_URI=http" in option for option in config["docker"]["run_options"])
        return
    for command in ("head_start_ray_commands", "worker_start_ray_commands"):
        (line,) = (line for line in config[command] if "ray start" in line)
        assert 'MLFLOW_TRACKING_URI="$(cat ~/.ray/mlflow_tracking_uri 2>/dev/null)"' in line.split(";")[1]


@pytest.mark.parametrize("name", ["aws", "gcp"])
def test_the_share_is_mounted_by_what_is_there(name: str, tmp_path: Path):
    """An image without NFS gets it first, and one with it asks no package server."""
    commands = load(name)["initialization_commands"]
    (helper,) = (line for line in commands if "nfs-common" in line)
    (mount,) = (line for line in commands if "sudo mount" in line)
    assert commands.index(helper) < commands.index(mount)
    tools = tmp_path / "bin"
    tools.mkdir()
    (tools / "sudo").write_text('#!/bin/sh\necho "$@" >> "$ASKED"\n')
    for there in (False, True):
        asked = tmp_path / f"asked{there}"
        asked.touch()
        if there:
            (tools / "mount.nfs").write_text("#!/bin/sh\n")
        for tool in tools.iterdir():
            tool.chmod(0o755)
        environment = {"PATH": f"{tools}:/nowhere", "ASKED": str(asked)}
        subprocess.run(["/bin/sh", "-c", helper], env=environment, check=True, timeout=60)
        assert ("install -y -qq nfs-common" in asked.read_text()) != there


def test_google_clouds_workers_have_an_account_of_their_own():
    """Ray gives one to the head alone; without, a worker reads no private image and writes no bucket."""
    types = load("gcp")["available_node_types"]
    assert "serviceAccounts" not in types["head"]["node_config"]
    for kind in ("gpu_spot", "cpu_spot"):
        (account,) = types[kind]["node_config"]["serviceAccounts"]
        assert account["scopes"] == ["https://www.googleapis.com/auth/cloud-platform"]


def test_amazons_workers_have_a_profile_of_their_own():
    """The head's may run and terminate instances, and a job's code could do so from every node."""
    types = nodes("aws")
    profiles = {kind: node["node_config"]["IamInstanceProfile"]["Name"] for kind, node in types.items()}
    head = profiles.pop(load("aws")["head_node_type"])
    assert head not in profiles.values()
    assert set(profiles.values()) == {"worker-REPLACE-ME"}


def test_google_cloud_waits_for_the_driver_where_there_is_a_gpu(tmp_path: Path):
    """It is installed at the first boot, while the launcher is on its way."""
    (line,) = (line for line in load("gcp")["initialization_commands"] if "nvidia-smi" in line)
    card, tool = tmp_path / "devices/0000:00:04.0", tmp_path / "nvidia-smi"
    card.mkdir(parents=True)
    line = line.replace("/sys/bus/pci/devices", str(tmp_path / "devices")).replace("sleep 5", "touch waited")
    tool.write_text("#!/bin/sh\ntest -e waited\n")
    tool.chmod(0o755)
    for vendor, waits in (("0x8086", False), ("0x10de", True)):
        (card / "vendor").write_text(vendor)
        environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
        subprocess.run(["bash", "-c", line], cwd=tmp_path, env=environment, check=True, timeout=60)
        assert (tmp_path / "waited").exists() == waits


def test_commit_is_left_by_the_line_that_the_file_names(tmp_path: Path):
    """Typed in the repository's root before `ray up`, which copies no history."""
    (line,) = re.findall(
        r"^#   (python -c '.*write_commit.*')$", (CLUSTERS / "launcher/on_premises.yaml").read_text(), re.M
    )
    shutil.copytree(ROOT / "yan_core", tmp_path / "yan_core", ignore=shutil.ignore_patterns("__pycache__"))
    git = "git -c user.name=a -c user.email=a@b"
    kept = {name: value for name, value in os.environ.items() if name not in ("YAN_COMMIT", "PYTHONPATH")}
    kept["PATH"] = f"{Path(sys.executable).parent}:{kept['PATH']}"
    script = f"{git} init -q && {git} add . && {git} commit -qm all && {line} && git rev-parse --short=12 HEAD"
    done = subprocess.run(["bash", "-ec", script], cwd=tmp_path, env=kept, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / ".commit").read_text().split()[0] == done.stdout.strip()

"""The runbook's way from nothing to a served model on three machines, which then lose a node each way.

`make test-cluster`. The machines are namespaces of this one (tests/clusters/machines.py), launched by SSH with
clusters/launcher/on_premises.yaml, of which hosts, user and key alone are filled in. Commands are typed in a checkout
of the test's own, which leaves `runs/machines` of this one alone; its environment is this one's, not installed again.
"""

import hashlib
import json
import os
import pwd
import re
import secrets
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.clusters.checks import ROOT
from tests.clusters.conftest import asked, free_port, run_shell, wait_until
from tests.clusters.machines import ADDRESSES, NAMES, Machines, missing

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.timeout(900),
    pytest.mark.skipif(bool(missing()), reason=missing() or "machines can be made"),
]
WORKERS = NAMES[1:]
SHORT = (
    " --stages.autoencoder.max_steps 20 --stages.flow.max_steps 10 --stages.finetune.max_steps 20"
    " --evaluation.max_rows 20 --evaluation.num_steps [1,3]"
)


def five_commands() -> list[str]:
    """The runbook's block after its heading, one command a line."""
    text = (ROOT / "docs/OPERATIONS.md").read_text()
    (block,) = re.findall(r"^## From nothing to a served model\n.*?```bash\n(.*?)```", text, flags=re.M | re.S)
    return block.replace("\\\n", " ").strip().splitlines()


def checkout(folder: Path) -> Path:
    """A clone of this repository with what is changed in it, and this environment in its place."""
    run_shell(f"git clone --quiet {ROOT} {folder}", dict(os.environ), 60)
    changed = "git ls-files -z -mo --exclude-standard | rsync -a -0 --ignore-missing-args --files-from=-"
    run_shell(f"{changed} {ROOT} {folder}", dict(os.environ), 60)
    environment = folder / ".venv"
    environment.mkdir()
    for name in ("bin", "lib", "pyvenv.cfg"):
        (environment / name).symlink_to(Path(sys.prefix) / name)
    (environment / ".installed").write_text(f"{folder}\n")
    return folder


class Launched:
    """The cluster of the machines, as a person at the launching machine sees it."""

    def __init__(self, home: Path) -> None:
        self.checkout = checkout(home / "code")
        self.machines = Machines(self.checkout / "runs/machines", home)
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "MLFLOW_"))}
        self.environment = kept | {
            "HOME": str(home),
            "PATH": f"{self.checkout}/.venv/bin:{os.environ['PATH']}",
            "RAY_TMPDIR": str(home / "ray"),
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(home / ".yan/auth/auth_token"),
            "RAY_USAGE_STATS_ENABLED": "0",
        }
        self.address = ""

    def shell(self, command: str, timeout_s: float = 300) -> str:
        """What a command printed that was typed in the checkout; it must succeed."""
        return run_shell(command, self.environment, timeout_s, self.checkout)

    def commit(self) -> str:
        """That of the checkout."""
        return self.shell("python -c 'from yan_core.files import code_commit; print(code_commit())'").strip()

    def nodes(self) -> list[str]:
        """Addresses of the nodes that live, by the head."""
        token = Path(self.environment["RAY_AUTH_TOKEN_PATH"]).read_text()
        found = asked(f"{self.address}/nodes?view=summary", token)["data"]["summary"]
        alive = [node for node in found if node["raylet"].get("state") == "ALIVE"]
        return sorted(node["ip"] for node in alive if "ip" in node)  # one that has just come has none yet

    def wait_for_nodes(self, names: tuple[str, ...], timeout_s: float = 120) -> None:
        wait_until(lambda: self.nodes() == sorted(ADDRESSES[name] for name in names), timeout_s, self.nodes)

    def application(self) -> dict[str, Any]:
        token = Path(self.environment["RAY_AUTH_TOKEN_PATH"]).read_text()
        return asked(f"{self.address}/api/serve/applications/", token)["applications"].get("yan", {})

    def replicas(self) -> list[tuple[str, str]]:
        """Address and id of the replicas that answer."""
        deployment = self.application().get("deployments", {}).get("yan", {})
        return sorted(
            (r["node_ip"], r["replica_id"]) for r in deployment.get("replicas", []) if r["state"] == "RUNNING"
        )


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Launched]:
    """Launched by the first two of the five commands; its dashboard by a tunnel, as in the runbook."""
    home = tmp_path_factory.mktemp("home")
    launched = Launched(home)
    tunnel = None
    try:
        for command in five_commands()[:2]:
            launched.shell(command)
        port = free_port()
        launched.address = f"http://127.0.0.1:{port}"
        with (home / "tunnel").open("w") as log:
            command = ["ray", "dashboard", "--port", str(port), str(launched.machines.file)]
            tunnel = subprocess.Popen(
                command, env=launched.environment, stdout=log, stderr=log, stdin=subprocess.DEVNULL
            )
        launched.wait_for_nodes(NAMES)
        yield launched
    finally:
        if tunnel is not None:
            tunnel.terminate()
            tunnel.wait(30)
        logs = sorted(launched.machines.homes.glob("*/log"))
        print("".join(log.read_text()[-500:] for log in logs))
        launched.shell("make machines-down")
        assert not launched.machines.folder.exists() and not launched.machines.homes.exists()


def test_five_commands_end_in_an_answer(cluster: Launched):
    _, _, submit, deploy, ask = five_commands()
    said = cluster.shell(submit.replace("world.yaml", f"world.yaml{SHORT}"))
    assert re.search(r"^job \S+: SUCCEEDED; MLflow run: \w{32}", said, flags=re.M), said[-2000:]
    trained = json.loads((cluster.machines.shared / "world/model/config.json").read_text())
    assert trained["commit"] == cluster.commit()
    cluster.shell(deploy)
    answer = json.loads(cluster.shell(ask).splitlines()[-1])
    assert answer["model"] == "world" and "text" in answer


def test_callers_keys_change_without_a_new_start(cluster: Launched):
    """The runbook's command sends the file to the nodes, and the replicas take up what is in it."""
    text = (ROOT / "docs/OPERATIONS.md").read_text()
    (send,) = re.findall(r"`(for node in HEAD WORKER; do scp [^`]+)`", text)
    send = send.replace("HEAD WORKER", " ".join(ADDRESSES.values())).replace("USER", pwd.getpwuid(os.getuid()).pw_name)
    known = "-o UserKnownHostsFile=/dev/null -o StrictHostKeyChecking=no"  # the machines are new ones each time
    send = send.replace("-i KEY", f"-i {cluster.machines.key} {known}")
    keys, old = cluster.machines.user_home / ".yan/auth/api_keys", cluster.machines.api_key
    before, first = cluster.replicas(), keys.read_text()
    assert before

    def opens(key: str) -> bool:
        """Whether the service answers to a key; it must refuse or answer."""
        url = f"http://{ADDRESSES['head']}:8000/v1/models"
        try:
            return bool(asked(url, key))
        except urllib.error.HTTPError as error:
            assert error.code == 401, error
            return False

    def send_keys(lines: str) -> None:
        keys.write_text(lines)
        cluster.shell(send)
        for name in NAMES:
            there = Path(f"/proc/{cluster.machines.pids(name)[0]}/root{cluster.machines.root}/.ray/api_keys")
            assert there.read_text() == lines

    assert opens(old) and not opens("the next key")
    following = f"next {hashlib.sha256(b'the next key').hexdigest()}\n"
    send_keys(first + following)
    wait_until(lambda: opens("the next key"), 60)
    assert opens(old)
    send_keys(following)
    wait_until(lambda: not opens(old), 60)
    assert opens("the next key")
    send_keys(first)
    wait_until(lambda: opens(old), 60)
    assert cluster.replicas() == before


def test_haproxys_figures_are_for_its_own_machine_alone(cluster: Launched):
    names = [name for name in NAMES if cluster.machines.runs(name, "haproxy")]
    assert "head" in names
    for name in names:
        inside = f"ip netns exec yan-{name} curl --silent --show-error --fail --max-time 10 http://127.0.0.1"
        assert "haproxy_frontend" in cluster.shell(f"{inside}:9101/metrics")
        cluster.shell(f"{inside}:8404/stats")
        for port in (9101, 8404):
            with pytest.raises(ConnectionRefusedError):
                socket.create_connection((ADDRESSES[name], port), 10)
        socket.create_connection((ADDRESSES[name], 8000), 10).close()


def test_script_of_ones_own_is_sent_and_run(cluster: Launched, tmp_path: Path):
    script = tmp_path / "count.py"
    script.write_text(
        "import ray\nray.init()\nprint(sorted(n['NodeManagerAddress'] for n in ray.nodes() if n['Alive']))\n"
    )
    said = cluster.shell(f"ray submit --no-config-cache {cluster.machines.file} {script}")
    assert str(sorted(ADDRESSES.values())) in said
    assert "4.0 CPU" in cluster.shell(f"ray exec {cluster.machines.file} 'ray status'")


def test_job_of_code_that_was_copied_knows_its_commit(cluster: Launched):
    """The head has no .git; Ray sends a job what .gitignore does not name."""
    ask = 'python -c "from yan_core.files import code_commit; print(code_commit())"'
    submit = f"ray job submit --address http://127.0.0.1:8265 --working-dir . -- {ask}"
    said = cluster.shell(f"ray exec runs/machines/cluster.yaml 'cd ~/yan && test ! -e .git && {submit}'")
    assert cluster.commit() in said.splitlines(), said[-2000:]


class Callers:
    """Requests without end against the head's address; each is to be answered once, with 200."""

    def __init__(self, cluster: Launched, count: int = 4) -> None:
        key = cluster.machines.api_key
        self.url = f"http://{ADDRESSES['head']}:8000/v1/generate"
        self.headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}
        self.answered, self.slowest, self.failed, self.stopping = 0, 0.0, [], threading.Event()
        self.pool = ThreadPoolExecutor(count)
        self.work = [self.pool.submit(self._ask, i) for i in range(count)]

    def _ask(self, seed: int) -> None:
        body = json.dumps({"source": "Where is Mary?", "seed": seed}).encode()
        while not self.stopping.is_set():
            asked_at = time.monotonic()
            try:
                with urllib.request.urlopen(urllib.request.Request(self.url, body, self.headers), timeout=60) as answer:
                    json.load(answer)
                    self.answered += 1
                    self.slowest = max(self.slowest, time.monotonic() - asked_at)
            except (OSError, ValueError) as error:
                told = error.read().decode() if isinstance(error, urllib.error.HTTPError) else ""
                self.failed.append(f"{time.strftime('%X')} {error} {told:.200}")

    def stop(self) -> None:
        self.stopping.set()
        for done in self.work:
            done.result(90)
        self.pool.shutdown()


def test_no_request_is_lost_by_an_upgrade_nor_by_a_node_that_dies(cluster: Launched):
    """Two replicas, each on a node of its own. The callers ask the head, whose HAProxy is not what dies."""
    file = cluster.machines.serve_file
    config = yaml.safe_load(file.read_text())
    config["applications"][0]["args"] |= {"num_replicas": 2, "num_steps": 2}

    def deploy() -> None:
        file.write_text(yaml.safe_dump(config))
        cluster.shell(f"serve deploy {file} --address {cluster.address}")

    def up(before: list[tuple[str, str]]) -> bool:
        now = cluster.replicas()
        return (
            cluster.application().get("status") == "RUNNING"
            and {address for address, _ in now} == {ADDRESSES[name] for name in WORKERS}
            and len(now) == 2
            and not set(now) & set(before)
        )

    before = cluster.replicas()
    deploy()
    wait_until(lambda: up(before), 180, cluster.application)
    callers = Callers(cluster)
    try:
        wait_until(lambda: callers.answered > 20, 60)
        before = cluster.replicas()
        config["applications"][0]["args"]["num_steps"] = 4
        deploy()
        wait_until(lambda: up(before), 180, cluster.application)
        upgraded, lost = callers.answered, list(callers.failed)
        victim = WORKERS[1]
        cluster.machines.kill(victim)
        wait_until(lambda: ADDRESSES[victim] not in cluster.nodes(), 90, cluster.nodes)
        time.sleep(10)  # and a replica is looked for elsewhere
    finally:
        callers.stop()
    print(f"{upgraded} requests until upgraded, {callers.answered} in all, lost: {callers.failed}")
    assert lost == [] and callers.failed == []
    assert callers.answered > upgraded + 20


def test_request_to_a_node_that_falls_silent_is_answered_by_another(cluster: Launched):
    """Nothing closes the connections to a node without power or network: in-flight requests would wait for ever."""
    cluster.wait_for_nodes(NAMES)
    victim = WORKERS[0]
    both = {ADDRESSES[name] for name in WORKERS}
    wait_until(lambda: {address for address, _ in cluster.replicas()} == both, 180, cluster.application)
    callers = Callers(cluster)
    try:
        wait_until(lambda: callers.answered > 20, 60)
        cluster.machines.cut(victim)
        wait_until(lambda: ADDRESSES[victim] not in cluster.nodes(), 90, cluster.nodes)
        cut = callers.answered
        wait_until(lambda: callers.answered > cut + 20, 60)
    finally:
        callers.stop()
        cluster.machines.cut(victim, off=False)
    print(f"{callers.answered} requests, the slowest took {callers.slowest:.1f} s, lost: {callers.failed}")
    assert callers.failed == []
    assert callers.slowest > 3  # some had been sent to the node that fell silent


def test_training_goes_on_when_a_node_is_cut_off(cluster: Launched, tiny_settings: dict[str, Any], tmp_path: Path):
    """The node that the autoscaler has started again is there for it; then the one that trains loses its network."""
    cluster.wait_for_nodes(NAMES)
    cluster.shell(f"serve shutdown --yes --address {cluster.address}")
    runs = f"{cluster.machines.root}/yan/runs"
    world = {"format": "world", "num_train": 400, "num_validation": 40}
    scaling = {"num_workers": 2, "cpus_per_worker": 0.5, "checkpoint_every_s": 1.0, "max_failures": 3}
    stages = {**tiny_settings["stages"], "finetune": {**tiny_settings["stages"]["finetune"], "max_steps": 1500}}
    data = {**tiny_settings["data"], "datasets": {"small": world}}
    settings = {**tiny_settings, "name": "cut", "data": data, "runs_dir": runs, "scaling": scaling, "stages": stages}
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(settings))
    submit = f"yan submit --address {cluster.address} --command train --config {config}"
    with ThreadPoolExecutor(1) as pool:
        job = pool.submit(cluster.shell, f"{sys.executable} -m pipelines{submit.removeprefix('yan')}", 400)
        saved = cluster.machines.shared / "cut/checkpoints/training"
        trains: list[str] = []
        try:
            wait_until(lambda: job.done() or list(saved.glob("checkpoint_*/checkpoint.json")), 180)
            trains = [name for name in WORKERS if cluster.machines.runs(name, "RayTrainWorker")]
            assert not job.done() and trains
            time.sleep(3)
            cluster.machines.cut(trains[0])
            said = job.result(400)
        finally:
            for name in trains[:1]:
                cluster.machines.cut(name, off=False)
    assert "SUCCEEDED" in said
    resumed = [int(step) for step in re.findall(r"goes on from its checkpoint at step (\d+)", said)]
    assert resumed and resumed[0] > 0, said[-3000:]
    assert (cluster.machines.shared / "cut/stages/finetune").is_dir()


def test_a_new_token_holds_after_ray_down_and_ray_up(cluster: Launched):
    """Every process keeps the one that it started with, so that the old one opens nothing more."""
    token = Path(cluster.environment["RAY_AUTH_TOKEN_PATH"])
    old, new = token.read_text(), secrets.token_hex(32)
    cluster.shell(f"ray down --yes {cluster.machines.file}")
    wait_until(lambda: not any(cluster.machines.runs(name, "raylet") for name in NAMES), 120)
    token.write_text(new)
    cluster.shell(five_commands()[1])
    cluster.wait_for_nodes(NAMES)
    with pytest.raises(urllib.error.HTTPError, match="401|403"):
        asked(f"{cluster.address}/nodes?view=summary", old)


def test_ray_down_ends_ray_on_every_machine(cluster: Launched):
    """`ray down` stops the head alone; the workers end when they have missed it for a minute."""
    cluster.shell(f"ray down --yes {cluster.machines.file}")
    assert not cluster.machines.runs("head", "raylet")
    wait_until(lambda: not any(cluster.machines.runs(name, "raylet") for name in WORKERS), 120)

"""`yan status`: what it makes of a dashboard's answers, recorded from Ray 2.60, and a real head with a service."""

import json
import re
import subprocess
import sys
import threading
import time
import urllib.parse
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import mlflow
import pytest

from pipelines import status
from pipelines.cli import main
from pipelines.folders import where_to_look
from pipelines.progress import aligned
from pipelines.tracking import TrackingError, latest_runs
from tests.clusters.conftest import free_port
from tests.pipelines.conftest import ON_A_HEAD, yan


def test_nobody_at_the_address_is_one_line(capsys, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "")  # left as it was by monkeypatch
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert main(["status", "--address", f"http://127.0.0.1:{free_port()}"]) == 1
    printed = capsys.readouterr()
    assert re.fullmatch(r"yan status: no Ray answers at http://127.0.0.1:\d+: .*\n", printed.err)
    assert printed.out == ""


def test_address_is_this_machine_unless_one_is_named(capsys, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(status, "HERE", f"http://127.0.0.1:{free_port()}")
    assert main(["status"]) == 1
    assert f"no Ray answers at {status.HERE}: " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("line", "taken"),
    [
        ("1.5/4.0 CPU", 1.5),
        ("0.5/4.0 CPU (0.5 used of 3.0 reserved in placement groups)", 3.0),
        ("2.0/4.0 CPU (1.0 used of 2.0 reserved in placement groups)", 3.0),
        ("0B/186.26GiB memory\n0.0/1.0 node:__internal_head__", 0.0),
    ],
)
def test_what_a_placement_group_reserves_is_taken(line: str, taken: float):
    assert status.used(line).get("CPU", 0.0) == taken


@pytest.fixture
def recorded() -> dict[str, Any]:
    """Of a head without CPUs and a worker with 4 CPUs and 2 GPUs that has two replicas and a placement group."""
    return json.loads(Path(__file__).with_name("dashboard.json").read_text())


def test_nodes_are_listed_the_head_first_and_summed(recorded):
    assert status.cluster_lines(recorded["nodes"]) == [
        "NODE              CPU  GPU  GPU BUSY  MEMORY       OBJECT STORE",
        "192.0.2.2 (head)  0/0  0/0  -         5.2/25.3 GB  0.0/0.1 GB",
        "192.0.2.2         3/4  2/2  -         5.1/25.3 GB  0.0/0.1 GB",
        "2 nodes: CPUs 3/4, GPUs 2/2, memory 10.3/50.6 GB, object store 0.0/0.2 GB",
    ]


def test_node_that_died_is_counted_and_a_node_that_is_new_has_no_use_yet(recorded):
    summary = recorded["nodes"]["data"]["summary"]
    head, worker = sorted(summary, key=lambda node: not node["raylet"].get("isHeadNode"))
    worker["gpus"] = [{"utilizationGpu": 90}, {"utilizationGpu": 31}, {"utilizationGpu": None}]
    recorded["nodes"]["data"]["nodeLogicalResources"] = {}
    head["raylet"]["state"] = "DEAD"
    _, line, total = status.cluster_lines(recorded["nodes"])
    assert re.match(r"192.0.2.2  \?/4  \?/2  60% ", line)  # of the two that say it
    assert total.startswith("1 node, 1 dead: ")


def test_what_waits_for_resources_is_counted(recorded):
    waiting = {"placement groups": recorded["placement_groups"], "actors": recorded["actors"]}
    assert status.waiting_lines(waiting) == ["waiting for resources: placement groups 1, actors 1"]


def test_services_are_listed_with_their_replicas(recorded):
    assert status.serve_lines(recorded["serve"]) == [
        "APPLICATION  STATUS     ROUTE   DEPLOYMENT  STATUS    REPLICAS",
        "yan          RUNNING    /       Answer      HEALTHY   2/2",
        "stuck        DEPLOYING  /stuck  Never       UPDATING  0/1, 1 starting",
        "proxies: 2 HEALTHY",
    ]
    recorded["serve"]["applications"]["stuck"]["message"] = "Traceback ...\n  line\nValueError: no model\n"
    assert "stuck: ValueError: no model" in status.serve_lines(recorded["serve"])
    assert status.serve_lines(recorded["serve"] | {"applications": {}}) == ["no application is deployed"]
    assert status.serve_lines(recorded["serve_off"]) == ["Ray Serve does not run"]


def test_page_that_does_not_answer_leaves_the_others():
    assert status.cluster_lines("/nodes answers 500: no") == ["/nodes answers 500: no"]
    assert status.serve_lines("/api/serve/applications/ answers 503: no") == [
        "/api/serve/applications/ answers 503: no"
    ]
    assert status.waiting_lines({"actors": "/api/v0/actors answers 500: no"}) == []


def test_table_is_cut_to_a_screen():
    rows = [("A", "B"), *((str(i), "b") for i in range(30))]
    lines = status.cut(aligned(rows))
    assert len(lines) == status.SHOWN + 2 and lines[-1] == "... and 22 more"
    assert status.cut(lines[:3]) == lines[:3]


@pytest.fixture
def store(tmp_path: Path) -> str:
    """A store with three runs of two experiments."""
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    client = mlflow.MlflowClient(uri)
    yan, other = client.create_experiment("yan"), client.create_experiment("other")
    first = client.create_run(yan, start_time=1_000_000, run_name="first").info.run_id
    client.set_terminated(first, "FAILED", end_time=1_000_000 + 3_723_000)
    client.create_run(other, start_time=3_000_000, run_name="third")
    client.create_run(yan, start_time=2_000_000, run_name="second")
    return uri


def test_runs_are_listed_whatever_their_experiment(store: str):
    assert [(run.name, run.experiment) for run in latest_runs(store, 2)] == [("third", "other"), ("second", "yan")]
    lines = status.run_lines(store)
    assert lines[0] == f"at {store}"
    assert re.match(r"RUN +STATUS +STARTED +TIME +EXPERIMENT +ID", lines[1])
    assert re.match(r"third +RUNNING .* other +\w{32}", lines[2])
    assert re.match(r"first +FAILED +\S+ \S+ +1:02:03 +yan +\w{32}", lines[4])


def test_store_that_is_not_there_is_said_and_not_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert status.run_lines(None)[0].startswith("no MLflow is named")
    with pytest.raises(TrackingError, match="there is no file /nowhere/mlflow.db"):
        latest_runs("sqlite:////nowhere/mlflow.db", 3)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/none.db")
    assert "there is no file" in status.run_lines(None)[0]
    assert not list(tmp_path.iterdir())


def test_passwords_are_not_on_the_screen(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(status, "latest_runs", lambda uri, most: [])
    told = [*status.run_lines("postgresql://m:s3cret@h/m"), *status.queue_lines("http://u:s3cret@127.0.0.1:1")]
    assert told[0] == "none at postgresql://m:***@h/m" and "http://u:***@127.0.0.1:1" in told[1]
    assert "s3cret" not in str(told)


def test_password_of_a_store_that_does_not_answer_is_not_on_the_screen(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    (line,) = status.run_lines(f"http://mlflow:s3cret@127.0.0.1:{free_port()}")
    assert line.startswith("MLflow at http://mlflow:***@127.0.0.1:") and "s3cret" not in line


@pytest.mark.parametrize(
    ("uri", "expected"),
    [
        ("http://me:s3cret@mlflow:5000/", "http://mlflow:5000/#/runs/r1"),
        ("sqlite:////runs/mlflow.db", "mlflow ui --backend-store-uri sqlite:////runs/mlflow.db"),
        (
            "postgresql://m:s3cret@h/m",
            "mlflow ui --backend-store-uri postgresql://m:***@h/m (***: its password)",
        ),
    ],
)
def test_where_a_run_is_looked_at(uri: str, expected: str):
    assert where_to_look(uri, "r1") == expected


def test_store_that_does_not_answer_is_one_line(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    uri = f"http://127.0.0.1:{free_port()}"
    (line,) = status.run_lines(uri)
    assert line.startswith(f"MLflow at {uri} does not answer (")


@pytest.fixture
def prometheus(request: pytest.FixtureRequest) -> Iterator[tuple[str, list[str]]]:
    """Address of a server that gives one answer to everything, and what it was asked."""
    asked: list[str] = []

    class Answer(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_response(200)
            self.end_headers()
            self.wfile.write(request.param.encode())

        def log_message(self, format: str, *args: Any) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Answer) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/", asked
        server.shutdown()


RECORDED = """{"status": "success", "data": {"resultType": "vector", "result": [
{"metric": {"application": "yan"}, "value": [1764265000.1, "12"]},
{"metric": {"application": "chat"}, "value": [1764265000.1, "0"]}]}}"""


@pytest.mark.parametrize(
    ("prometheus", "line"),
    [
        (RECORDED, "waiting requests: chat 0, yan 12 (Prometheus at {})"),
        ('{"status": "success", "data": {"result": []}}', "waiting requests: none is known (Prometheus at {})"),
        ("a page", "Prometheus at {} does not answer: Expecting value: line 1 column 1 (char 0)"),
        ("[]", "Prometheus at {} does not answer: list indices must be integers or slices, not str"),
    ],
    indirect=["prometheus"],
)
def test_what_waits_in_replicas_is_asked_of_prometheus(prometheus: tuple[str, list[str]], line: str):
    address, asked = prometheus
    assert status.queue_lines(address) == [line.format(address)]
    assert [urllib.parse.unquote_plus(path) for path in asked] == [f"/api/v1/query?query={status.QUEUES}"]


def test_without_prometheus_nothing_is_known_of_what_waits(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("RAY_PROMETHEUS_HOST", raising=False)
    assert status.queue_lines(None) == [
        "waiting requests: name a Prometheus by --prometheus or RAY_PROMETHEUS_HOST",
    ]
    monkeypatch.setenv("RAY_PROMETHEUS_HOST", f"http://127.0.0.1:{free_port()}")
    (line,) = status.queue_lines(None)
    assert re.fullmatch(r"nobody answers at http://127.0.0.1:\d+, where Prometheus should", line)


# --- on a real head ---------------------------------------------------------------------------------------------------

SERVICE = """
from ray import serve
from ray.util.placement_group import placement_group

@serve.deployment(num_replicas=2, ray_actor_options={{"num_cpus": 1}})
class Answer:
    def __call__(self, request):
        return "yes"

serve.start(http_options={{"host": "127.0.0.1", "port": {port}}})
serve.run(Answer.bind(), name="answers", route_prefix="/")
placement_group([{{"CPU": 1000}}], lifetime="detached", name="too-large")
"""


class TestOnAHead:
    pytestmark = ON_A_HEAD

    def test_screen_shows_what_is_there(self, head, store: str, tmp_path: Path):
        address, variables = head
        words = ["status", "--address", address, "--tracking-uri", store]
        before = yan(words, variables)
        assert before.returncode == 0, before.stderr[-3000:]
        assert "\njobs\nnone\n" in before.stdout and "\nservices\nRay Serve does not run\n" in before.stdout

        script = tmp_path / "service.py"
        script.write_text(SERVICE.format(port=free_port()))
        ray = [sys.executable, "-m", "ray.scripts.scripts", "job", "submit", "--address", address]
        submit = [*ray, "--submission-id", "raysubmit_service", "--", sys.executable, str(script)]
        done = subprocess.run(submit, env=variables, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        deadline = time.monotonic() + 60
        while not re.search(r"^\S+ \(head\) +2/4 ", (said := yan(words, variables).stdout), flags=re.M):
            assert time.monotonic() < deadline, said
            time.sleep(2)
        for line in (
            rf"cluster {address}, Ray \d[\d.]+",
            r"NODE +CPU +GPU +GPU BUSY +MEMORY +OBJECT STORE",
            r"1 node: CPUs 2/4, GPUs 0/0, memory [\d.]+/[\d.]+ GB, object store [\d.]+/0.2 GB",
            r"waiting for resources: placement groups 1",
            r"raysubmit_service +SUCCEEDED +- .*",
            r"answers +RUNNING +/ +Answer +HEALTHY +2/2",
            r"proxies: 1 HEALTHY",
            rf"at {store}",
            r"third +RUNNING .*",
        ):
            assert re.search(f"^{line}$", said, flags=re.M), f"no line {line} in\n{said}"
        assert len(said.splitlines()) <= 40

    def test_caller_without_the_token_is_told_so(self, head):
        address, variables = head
        done = yan(["status", "--address", address], {**variables, "RAY_AUTH_MODE": "disabled"})
        assert done.returncode == 1 and done.stdout == ""
        assert "wants a token: set RAY_AUTH_MODE=token" in done.stderr

"""A server as `yan serve` starts it, over HTTP; then what stops it and what stops it from starting."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import ray

from serve.launch import LaunchError, running_server
from serve.schemas import AppArgs
from tests.serve.conftest import save_tiny
from yan_core.checkpoint import CheckpointError

import psutil  # isort: skip # Ray's own, on the path since its import

pytestmark = pytest.mark.ray

START = """
import sys
from serve.launch import serve_blocking
from serve.schemas import AppArgs
serve_blocking(AppArgs(model=sys.argv[1], max_source_chars=500), port=0)
"""


class Server:
    """A server in a process of its own, and what it wrote to its terminal."""

    def __init__(self, model: Path, log: Path) -> None:
        self.log = log
        env = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
        with log.open("w") as out:
            # A session of its own: a Ctrl-C at the tests is not one at the server.
            self.process = subprocess.Popen(
                [sys.executable, "-c", START, str(model)], stdout=out, stderr=out, env=env, start_new_session=True
            )
        deadline = time.monotonic() + 240
        while not (found := re.search(r"ready after \d+ s at (\S+)", log.read_text())):
            if self.process.poll() is not None or time.monotonic() > deadline:
                self.stop()
                pytest.fail(f"no server: {log.read_text()}")
            time.sleep(0.2)
        self.url = found.group(1)
        self.port = int(self.url.rpartition(":")[2])
        self.family = psutil.Process(self.process.pid).children(recursive=True)

    def stop(self) -> int:
        """End it as a supervisor would; gives its exit status."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        return self.process.wait(timeout=120)

    def ask(self, path: str, body: Any = None, method: str | None = None) -> tuple[int, Any]:
        """Status and JSON body; `body` may be bytes, or anything for JSON."""
        data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, {"Content-Type": "application/json"}, method=method)
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return answer.status, json.load(answer)
        except urllib.error.HTTPError as error:
            return error.code, json.load(error)

    def generate(self, **body: Any) -> dict[str, Any]:
        """A generation that must work."""
        status, answer = self.ask("/v1/generate", body)
        assert status == 200, answer
        return answer


@pytest.fixture(scope="module")
def server(model_folder, tmp_path_factory):
    server = Server(model_folder, tmp_path_factory.mktemp("server") / "terminal.txt")
    yield server
    server.stop()


def test_an_answer_says_what_it_cost(server):
    answer = server.generate(source="Where is Mary?", seed=7, num_steps=5, max_tokens=6)
    assert set(answer) == {
        "text",
        "tokens",
        "num_steps",
        "nfe",
        "latency_ms",
        "source_tokens",
        "source_tokens_cut",
        "finished",
        "model",
    }
    assert answer["nfe"] == answer["num_steps"] == 5
    assert (answer["source_tokens"], answer["source_tokens_cut"]) == (4, 0)
    assert answer["finished"] == (len(answer["tokens"]) < 6)
    assert answer["latency_ms"] > 0
    assert answer["model"] == "tiny"


def test_defaults(server):
    answer = server.generate(source="Where is Mary?")
    assert answer["nfe"] == answer["num_steps"] == 3
    assert len(answer["tokens"]) <= 4


def test_answers_do_not_depend_on_company(server):
    bodies = [
        {"source": "Mary went to the kitchen. " * (1 + i % 4) + "Where is Mary?", "seed": i, "num_steps": 1 + i % 2}
        for i in range(16)
    ]
    alone = [server.generate(**body)["tokens"] for body in bodies]
    with ThreadPoolExecutor(16) as pool:
        for _ in range(3):
            together = [answer["tokens"] for answer in pool.map(lambda body: server.generate(**body), bodies)]
            assert together == alone
    assert len(set(map(tuple, alone))) > 8


def test_health_is_answered_while_generating(server):
    with ThreadPoolExecutor(8) as pool:
        work = [pool.submit(server.generate, source="Where is Mary?", num_steps=64, max_tokens=64) for _ in range(8)]
        assert server.ask("/healthz") == (200, {"status": "alive", "model": "tiny"})
        assert server.ask("/readyz") == (200, {"status": "ready", "model": "tiny"})
        assert all(future.result()["nfe"] == 64 for future in work)


@pytest.mark.parametrize(
    ("body", "field", "message"),
    [
        ({"source": "a", "temperature": 1}, "temperature", "unknown name 'temperature'"),
        ({"source": "a", "max_token": 1}, "max_token", "did you mean 'max_tokens'"),
        ({}, "source", "source is missing"),
        ({"source": ""}, "source", "not blank"),
        ({"source": ["a"]}, "source", "got ['a']"),
        ({"source": "a" * 501}, "source", "at most 500 characters, got 501"),
        (b'{"source": "\\ud800"}', "source", "Unicode"),
        ({"source": "a", "seed": "7"}, "seed", "got '7'"),
        (b'{"source": "a", "seed": NaN}', "seed", "got nan"),
        ({"source": "a", "num_steps": 0}, "num_steps", "in [1, 64], got 0"),
        ({"source": "a", "num_steps": 65}, "num_steps", "in [1, 64], got 65"),
        ({"source": "a", "max_tokens": 65}, "max_tokens", "in [1, 64], got 65"),
        (b'{"source": ', "body", "body is not valid JSON"),
        (b'"\xff"', "body", "body is not valid JSON"),
        (b"[" * 100_000, "body", "body is not valid JSON"),
        (b'{"source": "a", "seed": ' + b"9" * 5000 + b"}", "body", "body is not valid JSON"),
        (b"[]", "body", "body must be a JSON object"),
        (b"", "body", "body must be a JSON object"),
    ],
)
def test_a_refusal_names_the_field(server, body, field, message):
    status, answer = server.ask("/v1/generate", body, method="POST")
    assert status == 422, answer
    assert set(answer) == {"error"}
    assert answer["error"]["field"] == field
    assert message in answer["error"]["message"]
    assert "Traceback" not in json.dumps(answer)


@pytest.mark.parametrize(
    ("path", "method", "body", "status", "field"),
    [
        ("/v1/complete", "POST", {}, 404, "path"),
        ("/v1/generate", "GET", None, 405, "method"),
        ("/v1/generate", "POST", b" " * (3 * 2**20), 413, "body"),
    ],
)
def test_other_refusals_have_the_same_body(server, path, method, body, status, field):
    found, answer = server.ask(path, body, method)
    assert (found, answer["error"]["field"]) == (status, field)


def test_a_bad_neighbour_costs_the_others_nothing(server):
    good = {"source": "Where is Mary?", "seed": 3}
    expected = server.generate(**good)["text"]
    bodies = [good, {**good, "max_tokens": 65}] * 8
    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(lambda body: server.ask("/v1/generate", body), bodies))
    assert [status for status, _ in answers] == [200, 422] * 8
    assert {answer["text"] for status, answer in answers if status == 200} == {expected}


def test_a_port_in_use_is_said_before_anything_starts(server, model_folder):
    begun = time.monotonic()
    with pytest.raises(LaunchError, match=rf"port {server.port} on 127.0.0.1 is in use: stop what listens there"):
        with running_server(AppArgs(model=str(model_folder)), port=server.port):
            pass
    assert time.monotonic() - begun < 2
    assert not ray.is_initialized()


def test_it_listens_on_loopback_only(server):
    listening = [c.laddr.ip for p in server.family for c in connections(p) if c.laddr.port == server.port]
    assert set(listening) == {"127.0.0.1"}


def connections(process: psutil.Process) -> list:
    """Listening sockets of a process that may have ended."""
    try:
        return [c for c in process.net_connections("tcp") if c.status == psutil.CONN_LISTEN]
    except psutil.NoSuchProcess:
        return []


def listeners(ports: set[int]) -> set[tuple[int | None, int]]:
    """Process and port of whatever listens on one of these ports on this machine."""
    return {
        (c.pid, c.laddr.port)
        for c in psutil.net_connections("tcp")
        if c.status == psutil.CONN_LISTEN and c.laddr.port in ports
    }


def test_sigterm_leaves_nothing_behind(server):
    ports = {c.laddr.port for process in server.family for c in connections(process)}
    assert server.port in ports
    before = listeners(ports)
    assert server.stop() == 0
    assert [process for process in server.family if process.is_running()] == []
    assert before & listeners(ports) == set()  # another Ray of the machine may have taken a port of ours by now


def test_the_terminal_shows_our_words_only(server):
    assert server.process.poll() is not None
    lines = server.log.read_text().splitlines()
    assert [line.split()[0] for line in lines] == ["starting", "ready", "curl", "stopped"]


def test_sigterm_while_ray_starts_leaves_nothing_behind(model_folder, tmp_path):
    with (tmp_path / "terminal.txt").open("w") as out:
        process = subprocess.Popen([sys.executable, "-c", START, str(model_folder)], stdout=out, start_new_session=True)
    parent, deadline = psutil.Process(process.pid), time.monotonic() + 120
    while not (family := parent.children(recursive=True)) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=120) == 0
    assert family
    assert [p for p in family if p.is_running()] == []


def test_a_folder_without_a_model_is_said_before_anything_starts(tmp_path):
    with pytest.raises(CheckpointError, match="is not a YAN model"):
        with running_server(AppArgs(model=str(tmp_path)), port=0):
            pass
    assert not ray.is_initialized()


def test_a_model_that_cannot_generate_gives_its_reason_and_leaves_a_borrowed_ray_alone(tmp_path):
    model = save_tiny(tmp_path / "broken" / "model", max_source_tokens=100)  # more than its 64 positions
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=2**27)
    try:
        with pytest.raises(
            LaunchError, match="did not start: .*100 tokens are more than model.max_positions=64"
        ) as hit:
            with running_server(AppArgs(model=str(model)), port=0):
                pass
        assert "\n" not in str(hit.value)
        assert ray.is_initialized()
        with pytest.raises(ValueError):
            ray.get_actor("SERVE_CONTROLLER_ACTOR", namespace="serve")
    finally:
        ray.shutdown()

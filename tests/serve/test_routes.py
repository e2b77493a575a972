"""The API over a model in this process: our own route, what is refused, who may ask, what is logged and counted."""

import asyncio
import hashlib
import itertools
import json
import re
import threading
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any

import pytest
from fastapi.testclient import TestClient

from serve.gate import TRACEPARENT
from serve.schemas import GenerateResponse
from tests.serve.conftest import save_tiny

QUESTION = "Where is Mary?"
JSON = {"Content-Type": "application/json"}


def generate(client: TestClient, **body: Any) -> dict[str, Any]:
    """A generation that must work."""
    answer = client.post("/v1/generate", json={"source": QUESTION, **body})
    assert answer.status_code == 200, answer.text
    return answer.json()


def events(text: str) -> list[tuple[str, dict[str, Any]]]:
    """Server-sent events: name and JSON."""
    found = re.findall(r"event: (\w+)\ndata: (.*)\n\n", text)
    assert "".join(f"event: {name}\ndata: {data}\n\n" for name, data in found) == text
    return [(name, json.loads(data)) for name, data in found]


def counted(client: TestClient, series: str) -> float:
    """Value of a series of /metrics."""
    lines = [line for line in client.get("/metrics").text.splitlines() if line.startswith(series + " ")]
    return float(lines[0].rpartition(" ")[2]) if lines else 0.0


# --- answers ----------------------------------------------------------------------------------------------------------


def test_an_answer_says_what_it_cost(client):
    answer = generate(client, seed=7, num_steps=5, max_tokens=6)
    assert set(answer) == set(GenerateResponse.model_fields)
    assert answer["nfe"] == answer["num_steps"] == 5
    assert (answer["source_tokens"], answer["source_tokens_cut"], answer["batch_size"]) == (4, 0, 1)
    assert answer["finished"] == (len(answer["tokens"]) < 6)
    assert len(answer["experts"]) == len(answer["tokens"])
    assert answer["model"] == "tiny"
    assert answer["candidates"] is None and answer["trajectory"] is None
    assert set(answer["timings"]) == {"queue_ms", "tokenise_ms", "sample_ms", "decode_ms"}
    assert 0 < sum(answer["timings"].values()) <= answer["latency_ms"]


def test_what_a_request_leaves_out(client):
    answer = generate(client)
    assert answer["nfe"] == answer["num_steps"] == 3
    assert len(answer["tokens"]) <= 4
    assert answer["tokens"] == generate(client, seed=0, model="tiny", num_steps=3, method="euler")["tokens"]


def test_every_setting_reaches_the_sampler(client):
    plain = generate(client, max_tokens=32)
    assert generate(client, max_tokens=32, method="midpoint")["nfe"] == 6
    guided = generate(client, max_tokens=32, guidance_scale=9)
    assert guided["nfe"] == 6 and guided["tokens"] != plain["tokens"]
    assert generate(client, max_tokens=32, deterministic=True)["tokens"] == plain["tokens"]
    assert generate(client, max_tokens=32, seed=1)["tokens"] != plain["tokens"]


def test_the_template_makes_the_source_of_fields(client):
    fields = {"context": "Mary went to the kitchen.", "question": QUESTION}
    found = generate(client, source=None, fields=fields)
    assert found["tokens"] == generate(client, source=f"Mary went to the kitchen. {QUESTION}")["tokens"]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"context": "Mary"}, "fields: field 'question' is missing"),
        ({"context": "Mary", "question": "Who?", "text": "a"}, "of the task question_answering are context, question"),
        ({}, "field 'context' is missing"),
    ],
)
def test_fields_are_those_of_the_task(client, fields, message):
    answer = client.post("/v1/generate", json={"fields": fields})
    assert answer.status_code == 422 and answer.json()["error"]["param"] == "fields"
    assert message in answer.json()["error"]["message"]


@pytest.mark.parametrize("ranking", ["bayes_risk", "confidence"])
def test_candidates_come_with_their_scores_the_best_first(client, ranking):
    answer = generate(client, num_candidates=5, ranking=ranking)
    texts = [candidate["text"] for candidate in answer["candidates"]]
    scores = [candidate["score"] for candidate in answer["candidates"]]
    assert len(texts) == 5 and texts[0] == answer["text"]
    assert scores == sorted(scores, reverse=True)
    assert generate(client)["text"] in texts


@pytest.mark.parametrize("num_candidates", [1, 4])
def test_a_trajectory_is_that_of_the_answer(client, num_candidates):
    answer = generate(client, max_tokens=12, num_steps=4, num_candidates=num_candidates, trajectory=True, seed=3)
    steps = answer["trajectory"]
    assert [(step["step"], step["t"]) for step in steps] == [(1, 0.25), (2, 0.5), (3, 0.75), (4, 1.0)]
    assert (steps[-1]["text"], steps[-1]["experts"]) == (answer["text"], answer["experts"])
    for step in steps:
        assert "".join(step["pieces"]) == step["text"]
        assert len(step["pieces"]) == len(step["experts"])
    untold = generate(client, max_tokens=12, num_steps=4, num_candidates=num_candidates, seed=3)
    assert untold["tokens"] == answer["tokens"] and untold["trajectory"] is None


def test_a_stream_gives_the_whole_text_after_each_step_and_then_the_answer(client):
    body = {"source": QUESTION, "max_tokens": 12, "num_steps": 4, "seed": 3}
    answer = client.post("/v1/generate", json={**body, "stream": True})
    assert answer.headers["content-type"].startswith("text/event-stream")
    *steps, (last, found) = events(answer.text)
    expected = generate(client, **body, trajectory=True)
    assert [name for name, _ in steps] == ["step"] * 4 and last == "answer"
    assert [step for _, step in steps] == expected["trajectory"]
    assert (found["text"], found["tokens"]) == (expected["text"], expected["tokens"])


def test_answers_do_not_depend_on_company(client):
    bodies = [
        {"source": "Mary went to the kitchen. " * (1 + i % 4) + QUESTION, "seed": i, "num_steps": 1 + i % 2}
        for i in range(16)
    ]
    alone = [generate(client, **body)["tokens"] for body in bodies]
    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(lambda body: generate(client, **body), bodies * 2))
    assert [answer["tokens"] for answer in answers] == alone * 2
    assert max(answer["batch_size"] for answer in answers) > 1
    assert len(set(map(tuple, alone))) > 8


def test_a_server_can_compute_every_request_by_itself(start, client):
    alone = start(deterministic=True)
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda seed: generate(alone, seed=seed), range(16)))
        assert {answer["batch_size"] for answer in answers} == {1}
        assert generate(alone, deterministic=False)["batch_size"] == 1
    assert [a["tokens"] for a in answers] == [generate(client, seed=s, deterministic=True)["tokens"] for s in range(16)]


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/v1/generate", "/v1/completions"])
@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b'{"source": ', "body is not valid JSON"),
        (b'"\xff"', "body is not valid JSON"),
        (b"[" * 100_000, "body is not valid JSON"),
        (b'{"a":' * 100_000, "body is not valid JSON"),
        (b'{"prompt": "a", "source": "a", "seed": ' + b"9" * 5000 + b"}", "body is not valid JSON"),
        (b'{"prompt": "a\x00b", "source": "a\x00b"}', "body is not valid JSON"),
        (b"[]", "body must be a JSON object"),
        (b"null", "body must be a JSON object"),
        (b"", "body must be a JSON object"),
    ],
)
def test_a_body_that_is_no_request_is_refused(client, path, body, message):
    answer = client.post(path, content=body, headers=JSON)
    assert answer.status_code == (422 if path == "/v1/generate" else 400), answer.text
    error = answer.json()["error"]
    assert error["param"] == "body" and message in error["message"]
    assert {"message", "type", "param", "code"} <= set(error)


@pytest.mark.parametrize(
    "text", ["a\x00b", "\x1b[31m", "\r\n\t a", "\u202e", "a" * 20_000, "<mask>", "<eos>", "👩‍👩‍👧"]
)
def test_strange_texts_are_answered(client, text):
    assert generate(client, source=text)["finished"] in (True, False)
    assert client.post("/v1/completions", json={"prompt": text[:30]}).status_code == 200


@pytest.mark.parametrize(
    ("body", "field", "message"),
    [
        ({"source": "a" * 20_001}, "source", "at most 20000 characters, got 20001"),
        ({"source": "a", "max_tokens": 65}, "max_tokens", "in [1, 64], got 65"),
        ({"source": "a", "max_tokens": 10**9}, "max_tokens", "in [1, 64], got 1000000000"),
        ({"source": "a", "temperature": 1}, "temperature", "unknown name 'temperature'"),
        ({"source": "a", "x" * 5000: 1}, "x" * 56 + "...", "unknown name"),
    ],
)
def test_a_refusal_names_the_field(client, body, field, message):
    answer = client.post("/v1/generate", json=body)
    error = answer.json()["error"]
    assert answer.status_code == 422 and error["type"] == "invalid_request_error"
    assert error["param"] == field and message in error["message"]
    assert len(answer.text) < 2000


@pytest.mark.parametrize(
    ("method", "path", "status", "param", "code"),
    [
        ("GET", "/v1/complete", 404, "path", "not_found"),
        ("GET", "/" + "a" * 5000, 404, "path", "not_found"),
        ("GET", "/v1/generate", 405, "method", "not_allowed"),
        ("DELETE", "/v1/models", 405, "method", "not_allowed"),
        ("GET", "/v1/models/other/model", 404, "model", "model_not_found"),
    ],
)
def test_other_refusals_have_the_same_body(client, method, path, status, param, code):
    answer = client.request(method, path)
    error = answer.json()["error"]
    assert (answer.status_code, error["param"], error["code"]) == (status, param, code)
    assert len(answer.text) < 1000
    assert status != 405 or answer.headers["allow"]


def test_a_host_that_is_none_does_no_harm(client):
    assert client.post("/v1/completions", json={}, headers={"Host": "[["}).status_code == 400
    assert client.get("/nothing", headers={"Host": "[["}).status_code == 404


def test_a_body_that_is_too_large_is_refused(client):
    answer = client.post("/v1/generate", content=b" " * (3 * 2**20), headers=JSON)
    assert (answer.status_code, answer.json()["error"]["code"]) == (413, "body_too_large")


def test_an_unknown_model_is_named(client):
    answer = client.post("/v1/generate", json={"source": "a", "model": "tony"})
    error = answer.json()["error"]
    assert answer.status_code == 404 and error["param"] == "model" and error["allowed"] == ["tiny"]


def test_a_failure_of_ours_shows_no_traceback_and_is_told_as_one(start, monkeypatch, tmp_path):
    client = start(access_log=str(tmp_path / "log"))
    monkeypatch.setattr(client.app.state.engine.generator, "draw", lambda *rest, **how: 1 / 0)
    for body in ({"source": "a"}, {"source": "a", "stream": True}):
        answer = client.post("/v1/generate", json=body)
        assert "ZeroDivision" not in answer.text and "Traceback" not in answer.text
        assert "internal_error" in answer.text
    trace = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    answer = client.post("/v1/generate", json={"source": "a"}, headers={"traceparent": trace, "X-Request-ID": "x"})
    assert answer.status_code == 500
    assert (answer.headers["traceparent"], answer.headers["x-request-id"]) == (trace, "x")
    assert json.loads((tmp_path / "log").read_text().splitlines()[-1])["status"] == 500  # not 499, a client that left
    assert 'yan_requests_total{replica="one",route="/v1/generate",status="500"} 2.0' in client.get("/metrics").text
    answer = client.get("/readyz")
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "not_ready")
    assert answer.headers["retry-after"] == "1"
    assert client.get("/healthz").status_code == 200


def test_when_the_queue_is_full_the_answer_is_503_at_once(start, monkeypatch):
    client = start(max_queued_requests=2, max_batch_size=1)
    generator, free = client.app.state.engine.generator, threading.Event()
    draw = generator.draw
    monkeypatch.setattr(generator, "draw", lambda *rest, **how: free.wait(30) and draw(*rest, **how))
    with ThreadPoolExecutor(8) as pool:
        asked = [pool.submit(client.post, "/v1/generate", json={"source": "a", "seed": i}) for i in range(8)]
        refused = [future.result().status_code for future in itertools.islice(as_completed(asked), 5)]
        assert refused == [503] * 5
        for path in ("/v1/generate", "/v1/completions"):  # whatever it asks: it is not read
            assert client.post(path, content=b"no JSON").status_code == 503
        assert client.get("/v1/models").status_code == 200 and client.post("/v1/nothing").status_code == 404
        free.set()
        answers = [future.result() for future in asked]
    assert sorted(answer.status_code for answer in answers) == [200] * 3 + [503] * 5
    for answer in answers:
        if answer.status_code == 503:
            assert int(answer.headers["retry-after"]) >= 1
            assert answer.json()["error"]["code"] == "queue_full"
    assert counted(client, 'yan_requests_total{replica="one",route="/v1/generate",status="503"}') == 6
    assert client.post("/v1/generate", content=b"no JSON").status_code == 422


@pytest.mark.parametrize("path", ["/v1/generate", "/v1/completions"])
def test_a_deadline_of_the_request_or_of_the_server(start, path):
    slow = {"num_steps": 64, "timeout_s": 0.001}
    for client, body in ((start(), slow), (start(request_timeout_s=0.001), {**slow, "timeout_s": 100})):
        answer = client.post(path, json={"prompt" if "completions" in path else "source": "a", **body})
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "deadline_exceeded"), answer.text
        assert answer.headers["retry-after"]


def test_a_client_that_leaves_stops_the_work(start, monkeypatch):
    """As a server that sees it cancels the request."""
    client = start()
    flow, passes = client.app.state.engine.generator.model.flow, []
    trunk = flow.trunk
    monkeypatch.setattr(flow, "trunk", lambda *rest: (passes.append(0), time.sleep(0.01), trunk(*rest))[-1])
    scope = {
        "type": "http",
        "method": "POST",
        "path": "/v1/generate",
        "raw_path": b"/v1/generate",
        "query_string": b"",
        "headers": [(b"content-type", b"application/json")],
    }
    sent: list[Any] = []

    async def leave() -> None:
        async def receive():
            return {"type": "http.request", "body": b'{"source": "a", "num_steps": 64}', "more_body": False}

        async def send(message):
            sent.append(message)

        task = asyncio.ensure_future(client.app(scope, receive, send))
        while not passes:
            await asyncio.sleep(0.001)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    client.portal.call(leave)
    assert generate(client, num_steps=1)["nfe"] == 1  # after what was given up, in the same thread
    assert len(passes) < 65 and sent == []
    assert counted(client, 'yan_requests_total{replica="one",route="/v1/generate",status="499"}') == 1


# --- who may ask, and what is known of it -----------------------------------------------------------------------------


def test_keys_are_asked_for_where_there_are_any(start):
    client = start(keys={"ann": hashlib.sha256(b"secret").hexdigest()})
    for path in ("/v1/models", "/metrics", "/v1/nothing"):
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "secret"}):
            answer = client.get(path, headers=headers)
            error = answer.json()["error"]
            assert (answer.status_code, error["type"]) == (401, "authentication_error")
            assert answer.headers["www-authenticate"] == "Bearer"
            with_key = headers.get("Authorization", "").startswith("Bearer")
            assert ("not one of" if with_key else "send the header `Authorization: Bearer KEY`") in error["message"]
    for path in ("/healthz", "/readyz", "/openapi.json"):
        assert client.get(path).status_code == 200
    key = {"Authorization": "Bearer secret"}
    assert client.get("/v1/models", headers=key).status_code == 200
    assert client.post("/v1/generate", json={"source": "a"}).status_code == 401
    assert client.post("/v1/generate", json={"source": "a"}, headers=key).status_code == 200


def test_keys_are_asked_for_below_a_prefix_too(start):
    """`route_prefix` of a Serve config: Serve gives the whole path, and the prefix as the root's."""
    client = TestClient(start(keys={"ann": hashlib.sha256(b"secret").hexdigest()}).app, root_path="/yan")
    assert client.post("/yan/v1/generate", json={"source": "a"}).status_code == 401
    assert client.get("/yan/metrics").status_code == 401
    assert client.get("/yan/healthz").status_code == 200
    key = {"Authorization": "Bearer secret"}
    assert client.post("/yan/v1/generate", json={"source": "a"}, headers=key).status_code == 200


def test_a_key_has_its_rate(start):
    hashes = {name: hashlib.sha256(name.encode()).hexdigest() for name in ("ann", "bob")}
    client = start(keys=hashes, requests_per_minute=2)
    ann, bob = ({"Authorization": f"Bearer {name}"} for name in hashes)
    assert [client.get("/v1/models", headers=ann).status_code for _ in range(3)] == [200, 200, 429]
    answer = client.get("/v1/models", headers=ann)
    assert 1 <= int(answer.headers["retry-after"]) <= 30
    assert answer.json()["error"]["type"] == "rate_limit_error"
    assert client.get("/v1/models", headers=bob).status_code == 200
    assert client.get("/healthz").status_code == 200


def test_pages_of_other_sites_may_ask_only_where_they_are_named(start, client):
    site = {"Origin": "https://example.org"}
    preflight = {**site, "Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization"}
    assert "access-control-allow-origin" not in client.get("/v1/models", headers=site).headers
    assert client.options("/v1/generate", headers=preflight).status_code == 405
    opened = start(cors_origins=["https://example.org"], keys={"ann": "0" * 64})
    answer = opened.options("/v1/generate", headers=preflight)
    assert answer.status_code == 200 and answer.headers["access-control-allow-origin"] == "https://example.org"
    assert opened.get("/v1/models", headers=site).headers["access-control-allow-origin"] == "https://example.org"
    other = opened.get("/v1/models", headers={"Origin": "https://example.com"})
    assert "access-control-allow-origin" not in other.headers


@pytest.mark.parametrize("log_prompts", [False, True])
def test_the_access_log_has_a_line_a_request_and_prompts_only_if_asked(start, tmp_path, log_prompts):
    file = tmp_path / "access.jsonl"
    client = start(access_log=str(file), log_prompts=log_prompts, keys={"ann": hashlib.sha256(b"k").hexdigest()})
    key = {"Authorization": "Bearer k"}
    client.post("/v1/generate", json={"source": "apple\n\x00"}, headers={**key, "x-request-id": "mine-1"})
    client.post("/v1/completions", json={"prompt": "apple"}, headers={**key, "x-request-id": 'a"}\t{'})
    client.post("/v1/completions", json={"prompt": "apple", "top_p": 0}, headers=key)
    client.get("/v1/models")
    first, second, third, fourth = map(json.loads, file.read_text().splitlines())
    assert (first["request_id"], first["key"], first["route"], first["status"]) == (
        "mine-1",
        "ann",
        "/v1/generate",
        200,
    )
    assert {line["replica"] for line in (first, second, third, fourth)} == {"one"}
    assert first["model"] == "tiny" and first["source_tokens"] > 0 and first["ms"] > 0 and first["tokens"] >= 0
    assert first.get("prompts") == (["apple\n\x00"] if log_prompts else None)
    assert second["request_id"] == 'a"}\t{'
    assert (third["status"], third["route"]) == (400, "/v1/completions")
    assert fourth["status"] == 401 and "key" not in fourth
    assert log_prompts or "apple" not in file.read_text()


def traceparent(version: str = "00", trace: str = "4bf92f3577b34da6a3ce929d0e0e4736", end: str = "") -> str:
    return f"{version}-{trace}-00f067aa0ba902b7-01{end}"


def test_one_id_from_request_to_answer_to_log_line_whatever_the_answer(start, tmp_path):
    file = tmp_path / "access.jsonl"
    client = start(access_log=str(file), keys={"ann": hashlib.sha256(b"k").hexdigest()})
    key = {"Authorization": "Bearer k", "traceparent": traceparent()}
    answers = [
        client.post("/v1/generate", json={"source": "apple"}, headers={**key, "x-request-id": "mine-1"}),
        client.post("/v1/generate", json={"source": "apple", "stream": True}, headers=key),
        client.post("/v1/generate", json={}, headers=key),
        client.get("/v1/models", headers={"traceparent": traceparent()}),
        client.get("/nowhere", headers=key),
        client.get("/healthz", headers=key),
    ]
    assert [answer.status_code for answer in answers] == [200, 200, 422, 401, 404, 200]
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert [answer.headers["x-request-id"] for answer in answers] == [line["request_id"] for line in lines]
    assert lines[0]["request_id"] == "mine-1" and len({line["request_id"] for line in lines}) == len(lines)
    assert {line["trace_id"] for line in lines} == {"4bf92f3577b34da6a3ce929d0e0e4736"}
    assert {answer.headers["traceparent"] for answer in answers} == {traceparent()}


@pytest.mark.parametrize(
    ("header", "known"),
    [
        (traceparent(), True),
        (traceparent("01", end="-more"), True),
        (traceparent("ff"), False),
        (traceparent(trace="0" * 32), False),
        (traceparent(trace="A" * 32), False),
        ("", False),
        ('"}\t{', False),
    ],
)
def test_trace_that_is_none_is_not_logged_and_another_begins(start, tmp_path, header: str, known: bool):
    file = tmp_path / "access.jsonl"
    answer = start(access_log=str(file)).get("/healthz", headers={"traceparent": header})
    assert answer.status_code == 200
    told, logged = answer.headers["traceparent"], json.loads(file.read_text())["trace_id"]
    assert TRACEPARENT.fullmatch(told) and told.split("-")[1] == logged
    assert (told == header) == known == (logged in header)


def test_metrics_count_what_was_done(start):
    client = start()
    generate(client, num_candidates=2, num_steps=4)
    client.post("/v1/generate", json={})
    client.get("/" + "a" * 30)
    text = client.get("/metrics").text
    for name, count in {
        'yan_requests_total{replica="one",route="/v1/generate",status="200"}': 1,
        'yan_requests_total{replica="one",route="/v1/generate",status="422"}': 1,
        'yan_requests_total{replica="one",route="other",status="404"}': 1,
        'yan_request_seconds_count{replica="one",route="/v1/generate"}': 2,
        'yan_batch_size_count{model="tiny",replica="one"}': 1,
        'yan_queue_seconds_count{model="tiny",replica="one"}': 1,
        'yan_queue_size{model="tiny",replica="one"}': 0,
        'yan_nfe_total{model="tiny",replica="one"}': 8,
        'yan_tokens_total{kind="source",model="tiny",replica="one"}': 4,
    }.items():
        assert counted(client, name) == count, name
    answers = counted(client, 'yan_tokens_total{kind="answer",model="tiny",replica="one"}')
    experts = [line.rpartition(" ")[2] for line in text.splitlines() if line.startswith("yan_expert_tokens_total{")]
    assert answers == sum(map(float, experts)) > 0
    assert "aaaa" not in text


# --- the description of the API ---------------------------------------------------------------------------------------


def test_the_openapi_page_describes_every_refusal_and_no_other(start, client):
    paths = client.get("/openapi.json").json()["paths"]
    ours = {"200", "401", "404", "408", "413", "422", "429", "500", "503"}
    assert set(paths["/v1/generate"]["post"]["responses"]) == ours
    assert set(paths["/v1/completions"]["post"]["responses"]) == (ours - {"422"}) | {"400", "default"}
    assert set(paths["/readyz"]["get"]["responses"]) == {"200", "503"}
    assert "security" not in paths["/v1/generate"]["post"]
    keyed = start(keys={"ann": "0" * 64}).get("/openapi.json").json()["paths"]
    for path, method in (("/v1/generate", "post"), ("/v1/completions", "post"), ("/metrics", "get")):
        assert keyed[path][method]["security"] == [{"HTTPBearer": []}]
    assert "security" not in keyed["/healthz"]["get"]
    assert "HTTPValidationError" not in json.dumps(client.get("/openapi.json").json())
    page = client.get("/docs")
    assert page.status_code == 200 and "//" not in re.sub(r"<!--.*?-->", "", page.text, flags=re.S)
    assert {client.get(path).status_code for path in re.findall(r'(?:src|href)="(.*?)"', page.text)} == {200}


def test_a_model_of_another_task(start, tmp_path):
    client = start(save_tiny(tmp_path / "model", task="infilling"))
    (card,) = client.get("/v1/models").json()["data"]
    assert (card["task"], card["fields"]) == ("infilling", ["text"])
    masked = generate(client, source=None, fields={"text": "Mary went to<mask> kitchen."})
    assert masked["tokens"] == generate(client, source="Mary went to <mask> kitchen.")["tokens"]

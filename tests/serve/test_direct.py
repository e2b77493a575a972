"""What goes past FastAPI to its route is answered as what FastAPI dispatches."""

import json
from typing import Any

import pytest

PASSED_BY, DISPATCHED = "application/json", "application/json; charset=utf-8"
VOLATILE = ("id", "created", "latency_ms", "timings", "batch_size")


def stable(answer: Any) -> Any:
    """An answer's status and JSON, without what differs from call to call."""
    body = answer.json()
    return answer.status_code, {key: value for key, value in body.items() if key not in VOLATILE}, answer.headers.keys()


@pytest.fixture
def dispatched(monkeypatch) -> list[str]:
    """Paths of the requests that FastAPI saw."""
    import fastapi.routing

    seen, original = list[str](), fastapi.routing.APIRoute.handle

    async def handle(self: Any, scope: Any, receive: Any, send: Any) -> None:
        seen.append(scope["path"])
        await original(self, scope, receive, send)

    monkeypatch.setattr(fastapi.routing.APIRoute, "handle", handle)
    return seen


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/generate", {"source": "Where is Mary?", "seed": 3, "num_candidates": 2, "trajectory": True}),
        ("/v1/completions", {"prompt": ["Mary went.", "Where?"], "seed": 3, "model": "tiny", "logprobs": 1}),
        ("/v1/generate", {"source": "Where?", "model": "nowhere"}),
        ("/v1/generate", {"fields": {"nothing": "x"}}),
        ("/v1/completions", {"prompt": "Where?", "max_tokens": 999_999}),
    ],
)
def test_a_request_of_the_schema_goes_past_fastapi_and_is_answered_alike(client, dispatched, path, body):
    answers = [
        client.post(path, content=json.dumps(body), headers={"content-type": kind, "x-request-id": "mine"})
        for kind in (PASSED_BY, DISPATCHED)
    ]
    assert dispatched == [path]
    assert stable(answers[0]) == stable(answers[1])


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[1]", b'{"source": 3}', b'{"source": "a", "seed": "x"}', b'"\xff"', b"[" * 20_000, b'{"sauce": "a"}'],
    ids=lambda content: content[:20].decode(errors="replace"),
)
def test_a_body_that_is_not_of_the_schema_is_left_to_fastapi(client, dispatched, content):
    answers = [
        client.post("/v1/generate", content=content, headers={"content-type": k}) for k in (PASSED_BY, DISPATCHED)
    ]
    assert dispatched == ["/v1/generate"] * 2
    assert answers[0].status_code == 422 and stable(answers[0]) == stable(answers[1])


def test_a_body_in_pieces_is_read_whole_and_one_that_is_too_large_is_refused(start, dispatched):
    client = start(max_body_bytes=200)
    whole = json.dumps({"source": "Where is Mary?", "seed": 3}).encode()

    def asked(*pieces: bytes) -> Any:
        return client.post("/v1/generate", content=iter(pieces), headers={"content-type": PASSED_BY})

    assert stable(asked(whole[:7], whole[7:30], whole[30:])) == stable(asked(whole)) and dispatched == []
    refused = asked(whole[:-1], b" " * 300, b"}")
    assert refused.status_code == 413 and refused.json()["error"]["code"] == "body_too_large"

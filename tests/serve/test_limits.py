"""Bytes and seconds of a body, requests a minute."""

import asyncio

import pytest
from starlette.exceptions import HTTPException

from serve.limits import BodyLimit, RateLimit


def read_through(
    messages: list[tuple[float, bytes]], max_bytes: int = 10, max_s: float = 0.05, told: bytes = b""
) -> bytes:
    """Send pieces of a body, each after a pause, to an app that reads them all and then waits for the client to go."""

    async def run() -> bytes:
        body = b""
        pieces = list(messages)

        async def receive():
            if not pieces:
                await asyncio.sleep(0.1)
                return {"type": "http.disconnect"}
            pause, data = pieces.pop(0)
            await asyncio.sleep(pause)
            return {"type": "http.request", "body": data, "more_body": bool(pieces)}

        async def app(scope, receive, send):
            nonlocal body
            more = True
            while more:
                message = await receive()
                body += message["body"]
                more = message["more_body"]
            assert (await receive())["type"] == "http.disconnect"

        await BodyLimit(app, max_bytes, max_s)(
            {"type": "http", "headers": [(b"content-length", told)] * bool(told)}, receive, None
        )
        return body

    return asyncio.run(run())


def test_a_body_up_to_the_limit_passes_and_the_wait_after_it_is_free():
    assert read_through([(0, b"12345"), (0.01, b"67890")]) == b"1234567890"


def test_a_body_that_is_told_to_be_over_the_limit_is_not_waited_for():
    with pytest.raises(HTTPException, match="413: body must be at most 10 bytes"):
        read_through([(5, b"1")], told=b"11")
    assert read_through([(0, b"1234567890")], told=b"10") == b"1234567890"


def test_a_body_over_the_limit_is_not_read_to_its_end():
    with pytest.raises(HTTPException, match="at most 10 bytes") as caught:
        read_through([(0, b"12345"), (0, b"678901"), (9, b"")])
    assert caught.value.status_code == 413


def test_a_body_that_takes_too_long_is_given_up():
    with pytest.raises(HTTPException, match="within 0.05 s") as caught:
        read_through([(0.02, b"1"), (0.02, b"2"), (9, b"3")])
    assert caught.value.status_code == 408


def test_a_bucket_empties_and_fills_again_for_each_key():
    now = 0.0
    rate = RateLimit(3, lambda: now)
    assert [rate.wait_s("ann") for _ in range(3)] == [0, 0, 0]
    assert rate.wait_s("ann") == 20
    assert rate.wait_s("bob") == 0
    now = 15.0
    assert rate.wait_s("ann") == 5
    now = 20.0
    assert rate.wait_s("ann") == 0
    assert rate.wait_s("ann") == 20
    now = 10_000.0
    assert [rate.wait_s("ann") for _ in range(4)] == [0, 0, 0, 20]


def test_no_limit():
    rate = RateLimit(0)
    assert not any(rate.wait_s("ann") for _ in range(1000))

"""What one client may take of the server: bytes, time to send them, and requests a minute."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable

from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

BODY_S = 20.0
"""Longest a client may take to send a body."""


class BodyLimit:
    """Middleware that stops reading a request's body at a size, or when it takes too long to come."""

    def __init__(self, app: ASGIApp, max_bytes: int, max_s: float = BODY_S) -> None:
        """Wrap an app."""
        self.app, self.max_bytes, self.max_s = app, max_bytes, max_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, counting its bytes and seconds."""
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        told = next((value for name, value in scope["headers"] if name == b"content-length"), b"0")
        too_large = HTTPException(413, f"body must be at most {self.max_bytes} bytes")
        read, more = 0, True
        until = asyncio.get_running_loop().time() + self.max_s

        async def limited() -> Message:
            nonlocal read, more
            if not more:
                return await receive()
            if told.isdigit() and int(told) > self.max_bytes:  # nobody waits for what is refused
                raise too_large
            try:
                async with asyncio.timeout_at(until):
                    message = await receive()
            except TimeoutError:
                raise HTTPException(408, f"body must arrive within {self.max_s:g} s") from None
            read += len(message.get("body", b""))
            more = message.get("more_body", False)
            if read > self.max_bytes:
                raise too_large
            return message

        await self.app(scope, limited, send)


class RateLimit:
    """A bucket of requests for each key, filled again all the time."""

    def __init__(self, per_minute: int, clock: Callable[[], float] = time.monotonic) -> None:
        """Full buckets.

        Args:
            per_minute: What a bucket holds, and what runs into it in a minute; 0: there is no limit.
            clock: Seconds.
        """
        self.per_minute, self._clock = per_minute, clock
        self._buckets: dict[str, tuple[float, float]] = {}  # by key: what is in it, and when that was so

    def wait_s(self, key: str) -> int:
        """Take a request out of a key's bucket; gives 0, or in how many seconds there will be one."""
        if not self.per_minute:
            return 0
        now = self._clock()
        level, then = self._buckets.get(key, (float(self.per_minute), now))
        level = min(self.per_minute, level + (now - then) * self.per_minute / 60)
        self._buckets[key] = (level - 1 if level >= 1 else level), now
        return 0 if level >= 1 else math.ceil((1 - level) * 60 / self.per_minute)

"""Middleware around every request: its trace, who asks and how often, one line in the access log, and the counters."""

from __future__ import annotations

import asyncio
import json
import logging
import logging.handlers
import re
import secrets
import time
import uuid
from collections.abc import Callable, Mapping
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve.auth import owner
from serve.errors import NotAuthenticated, RequestError, TooManyRequests, wrapped
from serve.limits import RateLimit
from serve.metrics import Metrics

logger = logging.getLogger("ray.serve")

GUARDED = ("/v1/", "/metrics")
"""Where a key is wanted; health and the API's description are for anyone who gets this far."""
ANSWERING = ("/v1/generate", "/v1/completions")
"""Where requests wait for a model."""
TRACEPARENT = re.compile(
    r"(?!ff)[0-9a-f]{2}-(?!0{32})([0-9a-f]{32})-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}(?:-.*)?", re.ASCII
)
"""A caller's place in a trace, by W3C's Trace Context; the first group is the trace's id."""
CLIENT_GONE = 499
"""Status in log and counters of a request whose client left before its answer."""


class Gate:
    """The middleware. What routes know of a request for its line in the log, they put into `request.state.log`."""

    def __init__(
        self,
        app: ASGIApp,
        keys: Mapping[str, str],
        rate: RateLimit,
        metrics: Metrics,
        log: Callable[[str], None],
        full: Callable[[], RequestError | None],
    ) -> None:
        """Wrap an app.

        Args:
            app: What is behind.
            keys: From `load_keys`; empty: anyone may ask.
            rate: Requests a minute.
            metrics: Where requests are counted.
            log: From `access_log`.
            full: Gives what a request is told that no model has room for, whatever it asks: its body is not read then.
        """
        self.app, self.keys, self.rate, self.metrics, self.log = app, keys, rate, metrics, log
        self.full = full

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or refuse it."""
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        begun = time.perf_counter()
        headers = Headers(scope=scope)
        # Serve sets the id where the client did not, and gives back what was sent, whatever it is.
        line: dict[str, Any] = {"request_id": headers.get("x-request-id", "")[:256]}
        trace = TRACEPARENT.fullmatch(headers.get("traceparent", ""))
        line["trace_id"] = trace_id = trace[1] if trace else uuid.uuid4().hex
        traceparent = trace[0] if trace else f"00-{trace_id}-{secrets.token_hex(8)}-00"
        scope.setdefault("state", {})["log"] = line
        status = CLIENT_GONE

        async def marked(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["traceparent"] = traceparent
            await send(message)

        try:
            refused = self._refusal(scope, headers, line)
            if refused is None and path_of(scope) in ANSWERING:
                refused = self.full()
            if refused is None:
                await self.app(scope, receive, marked)
            else:
                await JSONResponse(refused.body(), refused.status, refused.headers)(scope, receive, marked)
        except asyncio.CancelledError:
            status = CLIENT_GONE
            raise
        except Exception as error:
            if status != CLIENT_GONE:  # the answer has begun
                raise
            told = wrapped(error)
            await JSONResponse(told.body(), told.status, told.headers)(scope, receive, marked)
        finally:
            self._note(scope, status, time.perf_counter() - begun, line)

    def _refusal(self, scope: Scope, headers: Headers, line: dict[str, Any]) -> RequestError | None:
        if not path_of(scope).startswith(GUARDED):
            return None
        name = owner(self.keys, headers.get("authorization"))
        if name is None:
            bearer = headers.get("authorization", "").lower().startswith("bearer ")
            return NotAuthenticated(
                "the key is not one of this server's"
                if bearer
                else "a key is wanted: send the header `Authorization: Bearer KEY`",
                code="invalid_api_key",
            )
        line["key"] = name
        wait_s = self.rate.wait_s(name)
        if wait_s:
            return TooManyRequests(
                f"a key may ask {self.rate.per_minute} times a minute", code="rate_limit_exceeded", retry_after_s=wait_s
            )
        return None

    def _note(self, scope: Scope, status: int, seconds: float, line: dict[str, Any]) -> None:
        # Of a path that is not ours there may be any number, and a counter for each.
        path = path_of(scope)
        route = getattr(scope.get("route"), "path", path if path in ANSWERING else "other")
        self.metrics.answered(route, status, seconds)
        told = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "replica": self.metrics.replica,
            "method": scope["method"],
            "route": route,
            "status": status,
            "ms": round(seconds * 1000, 2),
        }
        try:
            self.log(json.dumps(told | line))
        except OSError as error:  # its folder is gone: no reason to fail a request
            logger.error("the access log cannot be written: %s", error)


def path_of(scope: Scope) -> str:
    """The path below the prefix that the app is deployed at, as its routes are written."""
    path, prefix = scope["path"], scope.get("root_path", "")
    return path[len(prefix) :] if path.startswith(f"{prefix}/") else path


def access_log(file: str) -> Callable[[str], None]:
    """Writes bare lines to a file, which may be moved away meanwhile, or to standard error."""
    handler = logging.handlers.WatchedFileHandler(file, encoding="utf-8") if file else logging.StreamHandler()
    record = logging.makeLogRecord({})  # the same for all lines: to make one costs as much as to write it

    def write(line: str) -> None:
        record.msg = line
        handler.emit(record)

    return write

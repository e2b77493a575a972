"""The way of a usual request to its route, past FastAPI: as the last middleware, in front of it.

Of what our app does for a request on the event loop FastAPI takes a quarter, and while the event loop is at work the
model's thread has to wait. What this cannot take goes on to FastAPI unchanged, whose errors are the documented ones,
and FastAPI is where the routes are described.
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Mapping

from pydantic import BaseModel
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve.gate import path_of

Route = tuple[type[BaseModel], Callable[..., Awaitable[Response]]]
"""What a body is, and who answers it: called with both that and the request."""


class Direct:
    """The middleware."""

    def __init__(
        self, app: ASGIApp, routes: Mapping[str, Route], on_error: Callable[[Request, Exception], Response]
    ) -> None:
        """Wrap an app.

        Args:
            app: FastAPI's, with the same routes.
            routes: By path.
            on_error: The response to what a route raises.
        """
        self.app, self.routes, self.on_error = app, routes, on_error

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, or pass it on."""
        route = self.routes.get(path_of(scope)) if scope["type"] == "http" and scope["method"] == "POST" else None
        if route is None or (b"content-type", b"application/json") not in scope["headers"]:
            return await self.app(scope, receive, send)
        kind, answer = route
        seen: list[Message | Exception] = []

        async def again() -> Message:
            message = seen.pop(0) if seen else await receive()
            if isinstance(message, Exception):
                raise message
            return message

        body = await _read(receive, seen)
        try:
            asked = kind.model_validate(json.loads(body or b""))
        except (ValueError, RecursionError):
            return await self.app(scope, again, send)
        request = Request(scope, receive)
        try:
            response = await answer(asked, request)
        except Exception as error:
            response = self.on_error(request, error)
        await response(scope, receive, send)


async def _read(receive: Receive, seen: list[Message | Exception]) -> bytes | None:
    """The body; None: it did not come as a whole. What was received, or raised, is added to `seen`."""
    more = True
    while more:
        try:
            message = await receive()
        except Exception as error:  # it is too large, or too slow
            seen.append(error)
            return None
        seen.append(message)
        if message["type"] != "http.request":
            return None
        more = message.get("more_body", False)
    return b"".join(message.get("body", b"") for message in seen if not isinstance(message, Exception))

"""What a request can be answered with other than success, and the one JSON body of all of it."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import BaseModel

logger = logging.getLogger(__name__)


class ErrorDetail(BaseModel):
    """What was wrong, as OpenAI's clients read it."""

    message: str
    """What it must be and what it was."""
    type: str
    """`invalid_request_error`, `authentication_error`, `rate_limit_error`, `overloaded_error` or `server_error`."""
    param: str | None = None
    """The field; `body`, `path` or `method` where it is the request itself."""
    code: str | None = None
    """The kind of failure in one word."""
    allowed: str | list[str] | None = None
    """What is allowed, where that can be listed."""


class ErrorResponse(BaseModel):
    """The body of every answer that is not a success."""

    error: ErrorDetail


class RequestError(ValueError):
    """A request that is not answered with success."""

    status = 400
    type = "invalid_request_error"

    def __init__(
        self,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        allowed: str | list[str] | None = None,
        retry_after_s: int | None = None,
    ) -> None:
        """Say what is wrong, with which field, what is allowed, and when to come again."""
        super().__init__(message)
        self.message, self.param, self.code, self.allowed = message, param, code, allowed
        self.retry_after_s = retry_after_s

    @property
    def headers(self) -> dict[str, str]:
        """HTTP headers that belong to it."""
        return {} if self.retry_after_s is None else {"Retry-After": str(self.retry_after_s)}

    def body(self) -> dict[str, Any]:
        """Its JSON; OpenAI's four names are always there, `allowed` where it has a value."""
        detail = ErrorDetail(
            message=self.message, type=self.type, param=self.param, code=self.code, allowed=self.allowed
        )
        return {"error": detail.model_dump(exclude={"allowed"} if self.allowed is None else None)}


class FieldError(RequestError):
    """A field of a request is missing, out of range or not for this model."""

    status = 422

    def __init__(
        self,
        param: str,
        message: str,
        allowed: str | list[str] | None = None,
        code: str = "invalid_value",
    ) -> None:
        """Name the field, say what is wrong with it, its name first, and what is allowed."""
        super().__init__(message, param=param, code=code, allowed=allowed)

    def renamed(self, names: Mapping[str, str]) -> FieldError:
        """The same of a field that the request calls otherwise; messages begin with the field's name."""
        ours = self.param or ""
        name = names.get(ours, ours)
        return FieldError(name, name + self.message.removeprefix(ours), self.allowed, self.code or "")


@contextlib.contextmanager
def calling(names: Mapping[str, str]) -> Iterator[None]:
    """Errors from inside call fields as a request does; `names` are the request's by ours, where they differ."""
    try:
        yield
    except FieldError as error:
        raise error.renamed(names) from None


class NotFound(RequestError):
    """There is no such model or path."""

    status = 404


class NotAllowed(RequestError):
    """The path does not take this method; `allowed` lists those it takes."""

    status = 405

    @property
    def headers(self) -> dict[str, str]:
        """Lists them too."""
        return {"Allow": ", ".join(self.allowed or ())}


class TooSlow(RequestError):
    """The client took too long to send its request."""

    status = 408


class TooLarge(RequestError):
    """The body is too large."""

    status = 413


class NotAuthenticated(RequestError):
    """The key is missing or wrong."""

    status = 401
    type = "authentication_error"

    @property
    def headers(self) -> dict[str, str]:
        """Says how to authenticate."""
        return {"WWW-Authenticate": "Bearer"}


class TooManyRequests(RequestError):
    """The key has used up its rate."""

    status = 429
    type = "rate_limit_error"


class Overloaded(RequestError):
    """The queue is full, or the request would not be done, or was not, by its deadline."""

    status = 503
    type = "overloaded_error"


class ServerError(RequestError):
    """A failure of ours."""

    status = 500
    type = "server_error"


def shown(value: Any) -> str:
    """A value for a message: short, and without surprises in it."""
    text = ascii(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def must_be(param: str, allowed: str, value: Any) -> FieldError:
    """The error of a field with a wrong value."""
    return FieldError(param, f"{param} must be {allowed}, got {shown(value)}", allowed)


def wrapped(error: Exception) -> RequestError:
    """What is told of an error; what is not meant for the client goes to the log alone."""
    if isinstance(error, RequestError):
        return error
    logger.error("request failed", exc_info=error)
    return ServerError("the server failed on this request; its log says why", code="internal_error")

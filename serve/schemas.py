"""Request, response and app-argument models; unknown fields are refused, and a refusal names the field."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from yan_core.config import unknown_name

MAX_BODY_BYTES = 2 * 2**20
"""Most bytes of a request body: room for the longest allowed source with every character escaped."""


def _readable(text: str) -> str:
    if not text.strip():
        raise ValueError("blank")
    text.encode()  # JSON can carry half a surrogate pair ("\\ud800"), which the tokenizer cannot; also a ValueError
    return text


class AppArgs(BaseModel):
    """Arguments of the app, as `serve run serve.app:build_app model=...` or a Serve config's `args` gives them."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: Annotated[str, Field(min_length=1)]
    """Model folder, or `models:/name@alias` or `models:/name/version` in an MLflow registry."""
    tracking_uri: str = ""
    """Registry of a `models:/` model; empty: MLFLOW_TRACKING_URI."""
    num_replicas: Annotated[int, Field(ge=1)] = 1
    """Copies of the model."""
    cpus_per_replica: Annotated[float, Field(gt=0)] = 1.0
    """Logical CPUs a replica reserves; its PyTorch threads follow."""
    use_gpu: bool = False
    """One GPU a replica."""
    num_steps: Annotated[int, Field(ge=1, le=64)] = 3
    """Solver steps of a request that names none."""
    max_batch_size: Annotated[int, Field(ge=1)] = 32
    """Most requests generated at once."""
    batch_wait_ms: Annotated[float, Field(ge=0)] = 2.0
    """Longest wait for company, in milliseconds."""
    max_ongoing_requests: Annotated[int, Field(ge=1)] = 64
    """Most requests inside a replica; the others queue at the proxy."""
    max_queued_requests: Annotated[int, Field(ge=-1)] = 1024
    """Most requests that queue at a proxy, the others get status 503 at once; -1: no limit."""
    max_source_chars: Annotated[int, Field(ge=1, le=100_000)] = 20_000
    """Longest source, in characters; a longer one is refused before any work."""

    @model_validator(mode="after")
    def _batches_can_fill(self) -> AppArgs:
        # Serve would cap the batches without a word (ray#43288).
        if self.max_ongoing_requests < self.max_batch_size:
            raise ValueError(
                f"max_ongoing_requests must be >= max_batch_size={self.max_batch_size}, got "
                f"{self.max_ongoing_requests}: batches could never fill"
            )
        return self


class GenerateRequest(BaseModel):
    """One text to answer."""

    # Strict: "3" and true are no numbers.
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    source: Annotated[str, AfterValidator(_readable)]
    """Text as the model's task template makes it."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """The same source, settings and seed give the same answer."""
    num_steps: Annotated[int, Field(ge=1, le=64)] | None = None
    """Solver steps; none given: the server's default."""
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    """Longest answer, in tokens, up to the model's limit; none given: what it was trained for."""


class GenerateResponse(BaseModel):
    """One answer."""

    model_config = ConfigDict(extra="forbid")

    text: str
    """The answer."""
    tokens: list[int]
    """Its token ids."""
    num_steps: int
    """Solver steps."""
    nfe: int
    """Passes through the flow's trunk."""
    latency_ms: float
    """Time in the replica, the wait for a batch included, in milliseconds."""
    source_tokens: int
    """Tokens of the source that were read."""
    source_tokens_cut: int
    """Tokens of the source that were cut off to fit."""
    finished: bool
    """Whether the text ended by itself rather than at the limit."""
    model: str
    """The model that answered."""


class Status(BaseModel):
    """Answer of the health routes."""

    status: str
    model: str


class ErrorDetail(BaseModel):
    """What was wrong."""

    field: str
    """The field; `body`, `path` or `method` where it is the request itself, `server` where it is not its fault."""
    message: str
    """What it must be and what it was."""
    allowed: str | list[str] | None = None
    """What is allowed, where that can be listed."""


class ErrorResponse(BaseModel):
    """The body of every answer that is not a success."""

    error: ErrorDetail


class FieldError(ValueError):
    """A field of a request is out of range."""

    def __init__(self, field: str, message: str, allowed: str | list[str] | None = None) -> None:
        """Name the field, say what is wrong with it and what is allowed."""
        super().__init__(message)
        self.field, self.message, self.allowed = field, message, allowed

    def __reduce__(self) -> tuple[Any, ...]:
        """Survive pickling, which by default passes only the message back to __init__."""
        return type(self), (self.field, self.message, self.allowed)


ALLOWED = {
    "source": "text in Unicode that is not blank",
    "seed": "a whole number in [0, 2**63)",
    "num_steps": "a whole number in [1, 64]",
    "max_tokens": "a whole number >= 1, up to the model's limit",
}
"""What each field of a request may be, in words."""


def shown(value: Any) -> str:
    """A value for a message: short, and without surprises in it."""
    text = ascii(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def must_be(field: str, allowed: str, value: Any) -> FieldError:
    """The error of a field with a wrong value."""
    return FieldError(field, f"{field} must be {allowed}, got {shown(value)}", allowed)


def first_error(errors: Sequence[Mapping[str, Any]]) -> FieldError:
    """The first of pydantic's errors about a GenerateRequest, in our words.

    Args:
        errors: As FastAPI's RequestValidationError lists them; `loc` starts with `body`.
    """
    error = errors[0]
    path = [str(part) for part in error["loc"][1:]]
    if error["type"] == "json_invalid":
        reason = f"{error['ctx']['error']} at character {path[0]}"
        return FieldError("body", f"body is not valid JSON: {reason}", "a JSON object")
    if not path:
        return FieldError(
            "body", "body must be a JSON object, sent with Content-Type: application/json", "a JSON object"
        )
    field, known = path[0], sorted(GenerateRequest.model_fields)
    if error["type"] == "extra_forbidden":
        name = shown(field).strip("'\"")
        return FieldError(name, unknown_name(name, name, known), known)
    if error["type"] == "missing":
        return FieldError(field, f"{field} is missing; it must be {ALLOWED[field]}", ALLOWED[field])
    return must_be(field, ALLOWED[field], error["input"])

"""build_app(args) -> Application: the HTTP routes over the engine.

`serve run serve.app:build_app model=runs/world/model`, or `import_path: serve.app:build_app` in a Serve config.
"""

# No `from __future__ import annotations` here: Serve and FastAPI read the annotations as objects.
import asyncio
import logging
import time
from pathlib import Path
from typing import Any

import torch
from fastapi import FastAPI, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from ray import serve as ray_serve
from ray.serve import Application
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve.engine import Engine
from serve.registry import is_registered, registry_uri, resolve
from serve.schemas import (
    MAX_BODY_BYTES,
    AppArgs,
    ErrorDetail,
    ErrorResponse,
    FieldError,
    GenerateRequest,
    GenerateResponse,
    Status,
    first_error,
)
from yan_core.generator import Generation

logger = logging.getLogger(__name__)


class BodyLimit:
    """Middleware that stops reading a request body at a size."""

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        """Wrap an app."""
        self.app, self.max_bytes = app, max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, counting its bytes."""
        read = 0

        async def counted() -> Message:
            nonlocal read
            message = await receive()
            read += len(message.get("body", b""))
            if read > self.max_bytes:
                raise HTTPException(413, f"body must be at most {self.max_bytes} bytes")
            return message

        await self.app(scope, counted, send)


def error_answer(status: int, error: FieldError) -> JSONResponse:
    """The one body of every failure."""
    detail = ErrorDetail(field=error.field, message=error.message, allowed=error.allowed)
    return JSONResponse(ErrorResponse(error=detail).model_dump(exclude_none=True), status)


def on_field_error(request: Request, error: Exception) -> JSONResponse:
    """A field that this model cannot take."""
    assert isinstance(error, FieldError)
    return error_answer(422, error)


def on_validation_error(request: Request, error: Exception) -> JSONResponse:
    """A body that does not fit the schema."""
    assert isinstance(error, RequestValidationError)
    return error_answer(422, first_error(error.errors()))


def on_http_error(request: Request, error: Exception) -> JSONResponse:
    """What FastAPI itself refuses: paths, methods, bodies it cannot read."""
    assert isinstance(error, StarletteHTTPException)
    routes = ["POST /v1/generate", "GET /healthz", "GET /readyz"]
    if error.status_code == 404:
        return error_answer(404, FieldError("path", f"there is no {request.url.path}", routes))
    if error.status_code == 405:
        message = f"{request.url.path} does not take {request.method}"
        return error_answer(405, FieldError("method", message, routes))
    if error.status_code == 413:
        return error_answer(413, FieldError("body", str(error.detail)))
    if error.status_code == 400:
        return error_answer(422, FieldError("body", "body is not valid JSON in UTF-8", "a JSON object"))
    return error_answer(error.status_code, FieldError("server", str(error.detail)))


def on_other_error(request: Request, error: Exception) -> JSONResponse:
    """A bug of ours: the log has it, the caller gets no traceback."""
    logger.error("request failed", exc_info=error)
    return error_answer(500, FieldError("server", "the server failed on this request; its log says why"))


api = FastAPI(title="YAN", description="Text in a fixed number of passes.")
api.add_middleware(BodyLimit, max_bytes=MAX_BODY_BYTES)
api.add_exception_handler(FieldError, on_field_error)
api.add_exception_handler(RequestValidationError, on_validation_error)
api.add_exception_handler(StarletteHTTPException, on_http_error)
api.add_exception_handler(Exception, on_other_error)


@ray_serve.deployment(name="yan", logging_config={"enable_access_log": False})
@ray_serve.ingress(api)
class Server:
    """One replica."""

    def __init__(self, args: AppArgs) -> None:
        """Load the model and generate with it once; a replica that cannot is not started.

        Raises:
            ValueError: If the model cannot be found or read.
            RuntimeError: If it cannot generate.
        """
        torch.set_num_threads(max(1, int(args.cpus_per_replica)))
        found = resolve(args.model, args.tracking_uri)
        self.name = found.name
        self.engine = Engine(
            found.folder,
            num_steps=args.num_steps,
            max_batch_size=args.max_batch_size,
            max_source_chars=args.max_source_chars,
            device="cuda" if args.use_gpu else "cpu",
        )
        self._batched.set_max_batch_size(args.max_batch_size)  # type: ignore[attr-defined]
        self._batched.set_batch_wait_timeout_s(args.batch_wait_ms / 1000)  # type: ignore[attr-defined]
        logger.info("%s is warm after %.1f s", self.name, self.engine.warm_up())

    def check_health(self) -> None:
        """Asked by Serve; a replica that raises is replaced."""
        if not self.engine.ready:
            raise RuntimeError(f"{self.name}: the latest batches all failed")

    @ray_serve.batch
    async def _batched(self, requests: list[GenerateRequest]) -> list[Generation | Exception]:
        # In a thread: the event loop goes on answering health checks and collecting the next batch.
        return await asyncio.to_thread(self.engine.generate, requests)

    @api.post("/v1/generate", responses={422: {"model": ErrorResponse}, 500: {"model": ErrorResponse}})
    async def generate(self, request: GenerateRequest) -> GenerateResponse:
        """Answer one text."""
        started = time.perf_counter()
        self.engine.check(request)
        answer: Any = await self._batched(request)  # type: ignore[arg-type]
        if isinstance(answer, FieldError):
            raise answer
        if isinstance(answer, Exception):
            raise HTTPException(500, "the model failed on this request; the server's log says why")
        return GenerateResponse(
            text=answer.text,
            tokens=answer.tokens,
            num_steps=answer.num_steps,
            nfe=answer.nfe,
            latency_ms=(time.perf_counter() - started) * 1000,
            source_tokens=answer.source_tokens,
            source_tokens_cut=answer.source_tokens_cut,
            finished=answer.finished,
            model=self.name,
        )

    @api.get("/healthz")
    async def healthz(self) -> Status:
        """200 while the replica lives."""
        return Status(status="alive", model=self.name)

    @api.get("/readyz", responses={503: {"model": ErrorResponse}})
    async def readyz(self) -> Status:
        """200 once a generation worked on this replica, and while generations go on working."""
        if not self.engine.ready:
            raise HTTPException(503, f"{self.name}: the latest batches all failed")
        return Status(status="ready", model=self.name)


def build_app(args: AppArgs) -> Application:
    """The app that Serve runs.

    Args:
        args: Its arguments; a relative model folder or SQLite registry is taken from the folder this runs in.
    """
    if is_registered(args.model):
        args = args.model_copy(update={"tracking_uri": registry_uri(args.tracking_uri)})
    elif Path(args.model).exists():
        args = args.model_copy(update={"model": str(Path(args.model).absolute())})
    return Server.options(  # type: ignore[attr-defined]
        num_replicas=args.num_replicas,
        max_ongoing_requests=args.max_ongoing_requests,
        max_queued_requests=args.max_queued_requests,
        ray_actor_options={"num_cpus": args.cpus_per_replica, "num_gpus": int(args.use_gpu)},
    ).bind(args)

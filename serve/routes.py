"""The HTTP API over a replica's models; it needs no Ray."""

# No `from __future__ import annotations` here: FastAPI reads the annotations as objects.
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import aclosing
from typing import Any

from fastapi import Depends, FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.middleware import Middleware
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import JSONResponse, StreamingResponse
from fastapi.security import HTTPBearer
from fastapi_offline import FastAPIOffline
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from serve import openai_api
from serve.direct import Direct, Route
from serve.engine import Settings
from serve.errors import (
    ErrorResponse,
    FieldError,
    NotAllowed,
    NotFound,
    Overloaded,
    RequestError,
    TooLarge,
    TooSlow,
    calling,
    shown,
    wrapped,
)
from serve.gate import Gate, access_log
from serve.limits import BodyLimit, RateLimit
from serve.metrics import Metrics
from serve.models import Models
from serve.openai_api import Completion, CompletionRequest, ModelCard, ModelList
from serve.page import add_page
from serve.schemas import (
    AppArgs,
    GenerateRequest,
    GenerateResponse,
    RankedText,
    Snapshot,
    Status,
    Timings,
    first_error,
)
from serve.served_model import Answer, ServedModel, Step
from yan_core.solver import time_grid

OPENAI = "/v1/completions"
"""Where a field that is wrong has status 400, as OpenAI's clients expect; elsewhere it is 422."""
REFUSALS: dict[int, str] = {
    401: "The key is missing or wrong.",
    404: "There is no such model.",
    408: "The body took too long to arrive.",
    413: "The body is too large.",
    429: "The key has used up its requests; Retry-After says when there are more.",
    500: "A failure of the server's own.",
    503: "The queue is full, or the deadline passed; Retry-After says when to come again.",
}


ANY_OTHER: dict[int | str, dict[str, Any]] = {"default": {"model": ErrorResponse, "description": "Any other failure."}}
"""Keeps FastAPI from documenting its own 422, which these routes do not give."""


def documented(*statuses: int, **more: str) -> dict[int | str, dict[str, Any]]:
    """Responses of a route for the OpenAPI page; `more` are statuses of its own, such as `_422`."""
    texts = {status: REFUSALS[status] for status in statuses} | {int(name[1:]): text for name, text in more.items()}
    return {status: {"model": ErrorResponse, "description": text} for status, text in texts.items()}


def create_api(models: Models, metrics: Metrics, args: AppArgs, keys: Mapping[str, str]) -> FastAPI:
    """The app of a replica.

    Args:
        models: Its models.
        metrics: What its models count in.
        args: Arguments of the app.
        keys: From `load_keys`.
    """
    # The gate is outermost, so that a request without a key costs nothing more; but a browser asks about CORS without.
    rate, log = RateLimit(args.requests_per_minute), access_log(args.access_log)
    middleware = [Middleware(Gate, keys, rate, metrics, log, models.refusal)]
    if args.cors_origins:
        cors = Middleware(
            CORSMiddleware,
            allow_origins=list(args.cors_origins),
            allow_methods=["GET", "POST"],
            allow_headers=["*"],  # OpenAI's client for browsers sends a dozen of its own
            expose_headers=["x-request-id", "traceparent", "retry-after"],
        )
        middleware.insert(0, cors)
    direct: dict[str, Route] = {}
    middleware += [Middleware(BodyLimit, args.max_body_bytes), Middleware(Direct, direct, on_error)]
    # Not FastAPI's own page of the API: its scripts come from elsewhere, and the playground's key lies at this origin.
    api = FastAPIOffline(
        title="YAN", description="Text in a fixed number of passes.", redoc_url=None, middleware=middleware
    )
    for kind, handler in HANDLERS.items():
        api.add_exception_handler(kind, handler)
    guarded = [Depends(HTTPBearer(auto_error=False))] if keys else []  # for the page; the gate is what asks for keys

    def settings_of(body: GenerateRequest | CompletionRequest, max_tokens: int, **wanted: bool) -> Settings:
        """How to draw for a request, as the app's arguments say where it does not; `wanted` are other settings."""
        return Settings(
            num_steps=args.num_steps if body.num_steps is None else body.num_steps,
            max_tokens=max_tokens,
            sampling=body.sampling,
            deterministic=args.deterministic if body.deterministic is None else body.deterministic,
            **wanted,
        )

    async def model_of(body: GenerateRequest | CompletionRequest) -> tuple[ServedModel, float]:
        """The model that a request names, and the seconds that are left for its answer once it is loaded."""
        most_s = args.request_timeout_s
        timeout_s = most_s if body.timeout_s is None else min(body.timeout_s, most_s)
        until = time.monotonic() + timeout_s
        model = await models.get(body.model, timeout_s)
        return model, until - time.monotonic()

    def note(request: Request, model: ServedModel, sources: Sequence[str], answers: Sequence[Answer]) -> None:
        """Tell the access log of answers."""
        line = request.state.log
        line["model"] = model.name
        line["source_tokens"] = sum(answer.source_tokens for answer in answers)
        line["tokens"] = sum(len(text.candidate.tokens) for answer in answers for text in answer.texts)
        if args.log_prompts:
            line["prompts"] = list(sources)

    @api.post(
        "/v1/generate",
        tags=["YAN"],
        dependencies=guarded,
        response_model=GenerateResponse,
        responses={
            200: {"content": {"text/event-stream": {}}},
            **documented(401, 404, 408, 413, 429, 500, 503, _422="A field is wrong; `param` names it."),
        },
    )
    async def generate(body: GenerateRequest, request: Request) -> Any:
        """Answer a text; with `stream`, give the whole text after every solver step before."""
        begun = time.perf_counter()
        model, left_s = await model_of(body)
        places = model.engine.generator.max_target_tokens if body.max_tokens is None else body.max_tokens
        settings = settings_of(body, places, follow=body.trajectory or body.stream)
        source = source_of(body, model)
        called = {"follow": "trajectory" if body.trajectory else "stream"}
        with calling(called if body.fields is None else {**called, "source": "fields"}):
            asked = await model.ask([source], [body.seed], settings, left_s, with_pieces=settings.follow)

        def response(answer: Answer) -> GenerateResponse:
            note(request, model, [source], [answer])
            latency_ms = (time.perf_counter() - begun) * 1000
            return generated(answer, model.name, settings, body.trajectory, latency_ms)

        if not body.stream:
            (answer,) = await asked.answers()
            return written(response(answer))

        async def events() -> AsyncIterator[bytes]:
            try:
                async with aclosing(asked.follow()) as all_news:
                    async for news in all_news:
                        if isinstance(news, Step):
                            yield event("step", snapshot(news, settings.num_steps).model_dump_json())
                        else:
                            yield event("answer", response(news).model_dump_json())
            except Exception as error:  # The status is sent already.
                yield event("error", ErrorResponse(**wrapped(error).body()).model_dump_json())

        return StreamingResponse(events(), media_type="text/event-stream", headers={"Cache-Control": "no-store"})

    @api.post(
        OPENAI,
        tags=["OpenAI"],
        dependencies=guarded,
        response_model=Completion,
        responses={
            200: {"content": {"text/event-stream": {}}},
            **documented(401, 404, 408, 413, 429, 500, 503, _400="A field is wrong; `param` names it."),
            **ANY_OTHER,
        },
    )
    async def completions(body: CompletionRequest, request: Request) -> Any:
        """Answer prompts as OpenAI's completions API does."""
        model, left_s = await model_of(body)
        sources = openai_api.sources_of(body, model)
        openai_api.refuse_too_long(body, model)
        # Whatever max_tokens says: with fewer places the model would not give the start of the same text but a shorter
        # one, and with more one that it was not trained for.
        places = model.engine.generator.max_target_tokens
        settings = settings_of(body, places, with_log_probs=body.logprobs is not None)
        seeds, with_pieces = openai_api.seeds_of(body), openai_api.needs_pieces(body, places)
        with calling(openai_api.fields_of(body)):
            asked = await model.ask(sources, seeds, settings, left_s, may_cut=False, with_pieces=with_pieces)
        answers = await asked.answers()
        note(request, model, sources, answers)
        whole = openai_api.completion(body, model, answers)
        if not body.stream:
            return written(whole)
        return StreamingResponse(
            openai_api.events(body, whole), media_type="text/event-stream", headers={"Cache-Control": "no-store"}
        )

    direct |= {"/v1/generate": (GenerateRequest, generate), OPENAI: (CompletionRequest, completions)}

    @api.get("/v1/models", tags=["OpenAI"], dependencies=guarded, responses=documented(401, 429))
    async def list_models() -> ModelList:
        """The models that answer here."""
        return ModelList(data=[openai_api.card(name, model) for name, model in models.all.items()])

    @api.get(
        "/v1/models/{name:path}",
        tags=["OpenAI"],
        dependencies=guarded,
        responses={**documented(401, 404, 429), **ANY_OTHER},
    )
    async def show_model(name: str) -> ModelCard:
        """One of them."""
        found = await models.get(name, args.request_timeout_s)
        listed = next((listed for listed, model in models.all.items() if model is found), found.name)
        return openai_api.card(listed, found)

    @api.get("/healthz", tags=["Operation"])
    async def healthz() -> Status:
        """200 while the replica lives."""
        return Status(status="alive", models=[model.name for model in models.all.values()])

    @api.get("/readyz", tags=["Operation"], responses=documented(503))
    async def readyz() -> Status:
        """200 once a generation worked on this replica, and while generations go on working."""
        if not models.ready:
            raise Overloaded("the latest batches all failed", code="not_ready", retry_after_s=1)
        return Status(status="ready", models=[model.name for model in models.all.values()])

    @api.get(
        "/metrics",
        tags=["Operation"],
        dependencies=guarded,
        response_class=Response,
        responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}, **documented(401, 429)},
    )
    async def read_metrics() -> Response:
        """The replica's counters, for Prometheus."""
        return Response(metrics.text(), media_type="text/plain; version=0.0.4")

    add_page(api)
    return api


def source_of(body: GenerateRequest, model: ServedModel) -> str:
    """What the model reads.

    Raises:
        FieldError: If the fields are not those of the model's task.
    """
    if body.source is not None:
        return body.source
    assert body.fields is not None
    task = model.engine.generator.task
    known = list(task.source_fields)
    wrong = sorted(set(body.fields) - set(known))
    if wrong:
        message = f"fields of the task {task.name} are {', '.join(known)}, got {', '.join(map(ascii, wrong))}"
        raise FieldError("fields", f"{message:.200}", known, "unknown_field")
    try:
        return task.prompt(body.fields)
    except ValueError as error:
        raise FieldError("fields", f"fields: {error}", known) from None


def generated(
    answer: Answer, model: str, settings: Settings, with_trajectory: bool, latency_ms: float
) -> GenerateResponse:
    """The response of /v1/generate."""
    best = answer.texts[0]
    several = len(answer.texts) > 1
    steps = answer.steps if with_trajectory else []
    return GenerateResponse(
        text=best.text,
        tokens=best.candidate.tokens,
        experts=best.candidate.experts,
        candidates=[RankedText(text=t.text, score=t.candidate.score) for t in answer.texts] if several else None,
        trajectory=[snapshot(step, settings.num_steps) for step in steps] if with_trajectory else None,
        num_steps=settings.num_steps,
        nfe=answer.nfe,
        latency_ms=latency_ms,
        timings=Timings(
            queue_ms=answer.queue_s * 1000,
            tokenise_ms=answer.tokenise_s * 1000,
            sample_ms=answer.sample_s * 1000,
            decode_ms=answer.decode_s * 1000,
        ),
        batch_size=answer.batch_size,
        source_tokens=answer.source_tokens,
        source_tokens_cut=answer.source_tokens_cut,
        finished=best.candidate.finished,
        model=model,
    )


def snapshot(step: Step, num_steps: int) -> Snapshot:
    """The text after a solver step."""
    text = step.text
    assert text.pieces is not None
    return Snapshot(
        step=step.number,
        t=time_grid(num_steps)[step.number],
        text=text.text,
        pieces=text.pieces,
        experts=text.candidate.experts,
    )


def written(answer: BaseModel) -> Response:
    """An answer in JSON; returned as it is, FastAPI would check it once more."""
    return Response(answer.model_dump_json(), media_type="application/json")


def event(name: str, data: str) -> bytes:
    """A server-sent event; JSON has no line breaks."""
    return f"event: {name}\ndata: {data}\n\n".encode()


def _is_openai(request: Request) -> bool:
    # Not request.url, which is made of what the client says its host is.
    return request.scope["path"].endswith(OPENAI)


def on_error(request: Request, error: Exception) -> JSONResponse:
    """Ours, or a bug of ours."""
    told = wrapped(error)
    status = 400 if isinstance(told, FieldError) and _is_openai(request) else told.status
    return JSONResponse(told.body(), status, told.headers)


def on_validation_error(request: Request, error: Exception) -> JSONResponse:
    """A body that does not fit the schema."""
    assert isinstance(error, RequestValidationError)
    if _is_openai(request):
        return on_error(request, first_error(error.errors(), CompletionRequest, openai_api.COMPLETION_ALLOWED))
    return on_error(request, first_error(error.errors()))


def on_http_error(request: Request, error: Exception) -> JSONResponse:
    """What FastAPI and the middleware refuse: paths, methods, bodies that cannot be read."""
    assert isinstance(error, HTTPException)
    path = request.scope["path"]
    if error.status_code == 404:
        told: RequestError = NotFound(f"there is no path {shown(path)}; see /docs", param="path", code="not_found")
    elif error.status_code == 405:
        allowed = (error.headers or {}).get("Allow", "").split(", ")
        message = f"{shown(path)} does not take {request.method}"
        told = NotAllowed(message, param="method", code="not_allowed", allowed=allowed)
    elif error.status_code == 408:
        told = TooSlow(error.detail, param="body", code="body_too_slow")
    elif error.status_code == 413:
        told = TooLarge(error.detail, param="body", code="body_too_large")
    else:
        told = FieldError("body", "body is not valid JSON in UTF-8", "a JSON object", "invalid_json")
    return on_error(request, told)


HANDLERS: dict[type[Exception], Any] = {
    RequestError: on_error,
    RequestValidationError: on_validation_error,
    HTTPException: on_http_error,
    Exception: on_error,
}
"""What answers for each kind of exception."""

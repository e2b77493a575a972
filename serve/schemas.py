"""Arguments of the app, requests and responses of our own API; unknown fields are refused, and a refusal names them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from serve.errors import FieldError, must_be, shown
from yan_core.config import NUM_STEPS, Method, Ranking, SamplingConfig, unknown_name

MAX_CANDIDATES = 32
"""Most answers that may be drawn for one source."""
DOCUMENTED = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)
"""Of every model here: the text under a field is its description in the OpenAPI page."""
STRICT = DOCUMENTED | ConfigDict(strict=True)
"""Of requests: "3" and true are no numbers."""


def readable(text: str) -> str:
    """Refuse a text that is blank or no Unicode.

    Raises:
        ValueError: If it is.
    """
    if not text.strip():
        raise ValueError("blank")
    return unicode(text)


def unicode(text: str) -> str:
    """Refuse half a surrogate pair, which JSON can carry ("\\ud800") and the tokenizer cannot.

    Raises:
        ValueError: If there is one.
    """
    text.encode()
    return text


def disagreement(param: str, message: str) -> PydanticCustomError:
    """The error of a field that does not go with another one."""
    return PydanticCustomError("disagreement", "{message}", {"param": param, "message": message})


Readable = Annotated[str, AfterValidator(readable), Field(json_schema_extra={"pattern": r"\S"})]
"""Text in Unicode that is not blank."""
NumSteps = Annotated[int, Field(ge=1, le=64)]
"""Solver steps."""
TimeoutSeconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]
"""A deadline."""


class AppArgs(BaseModel):
    """Arguments of the app, as `serve run serve.app:build_app model=...` or a Serve config's `args` gives them."""

    model_config = DOCUMENTED

    model: Annotated[str, Field(min_length=1)]
    """Model folder, or `models:/name@alias` or `models:/name/version` in an MLflow registry."""
    more_models: tuple[Annotated[str, Field(min_length=1)], ...] = ()
    """Other models, named as `model` is, that are loaded from the start too."""
    any_registered: bool = False
    """Whether a request may name any model of the registry, `name@alias` or `name/version`, which is then loaded."""
    max_models: Annotated[int, Field(ge=1)] = 4
    """Most models in a replica's memory; one more, and the one that was not asked for the longest goes."""
    refresh_s: Annotated[float, Field(gt=0)] = 10.0
    """How often a replica looks whether an alias of its models has moved to another version, or its keys changed."""
    tracking_uri: str = ""
    """Registry of `models:/` models; empty: MLFLOW_TRACKING_URI."""
    num_replicas: Annotated[int, Field(ge=0)] = 1
    """Copies of the app; with max_replicas the fewest, which may be 0."""
    max_replicas: Annotated[int, Field(ge=0)] = 0
    """Most copies, as many as the requests need; 0: always num_replicas."""
    upscale_delay_s: Annotated[float, Field(ge=0)] = 5.0
    """How long there must be too many requests for the replicas before there is another."""
    downscale_delay_s: Annotated[float, Field(ge=0)] = 120.0
    """How long there must be too few before one goes."""
    cpus_per_replica: Annotated[float, Field(gt=0)] = 1.0
    """Logical CPUs a replica reserves; its PyTorch threads follow."""
    use_gpu: bool = False
    """One GPU a replica."""
    num_steps: NumSteps = NUM_STEPS
    """Solver steps of a request that names none."""
    deterministic: bool = False
    """Whether requests that do not say are computed one by one, so that rounding too is the same in any company."""
    max_batch_size: Annotated[int, Field(ge=1)] = 32
    """Most sources of a batch."""
    max_batch_tokens: Annotated[int, Field(ge=1)] = 16_384
    """Most tokens of a batch, and of a request: sources with their padding, and all candidates."""
    max_queued_requests: Annotated[int, Field(ge=1)] = 128
    """Most sources that wait in a replica; what comes then gets status 503 at once."""
    request_timeout_s: TimeoutSeconds = 30.0
    """Longest a request may take, and what it may take where it does not say."""
    max_source_chars: Annotated[int, Field(ge=1, le=100_000)] = 20_000
    """Longest source, in characters; a longer one is refused before any work."""
    max_body_bytes: Annotated[int, Field(ge=1)] = 2 * 2**20
    """Longest body of a request: by default with room for the longest source with every character escaped."""
    api_keys_file: str = ""
    """Who may ask: lines `name sha256-of-the-key`. Empty: the file that YAN_API_KEYS_FILE names, else anyone."""
    requests_per_minute: Annotated[int, Field(ge=0)] = 0
    """Most requests of a key to a replica in a minute, all of which may come at once; 0: no limit."""
    access_log: str = ""
    """File for one JSON line a request; empty: the replica's standard error, which Ray keeps with its logs."""
    log_prompts: bool = False
    """Whether the access log holds the texts that were asked."""
    cors_origins: tuple[str, ...] = ()
    """Web origins whose pages may ask, such as https://example.org; none by default."""

    @model_validator(mode="after")
    def _scales(self) -> AppArgs:
        least = max(1, self.num_replicas)
        if self.max_replicas and self.max_replicas < least:
            raise ValueError(f"max_replicas must be 0 or >= num_replicas={self.num_replicas}, got {self.max_replicas}")
        if self.any_registered and self.max_models < 2 + len(self.more_models):
            raise ValueError(
                f"max_models must be >= {2 + len(self.more_models)} with any_registered, as the models named stay and "
                f"one more must have room; got {self.max_models}"
            )
        if not self.max_replicas and not self.num_replicas:
            raise ValueError("num_replicas must be >= 1 without max_replicas, got 0")
        return self

    @property
    def most_replicas(self) -> int:
        """As many copies as there may be."""
        return max(self.num_replicas, self.max_replicas)


class GenerateRequest(BaseModel):
    """A text to answer."""

    model_config = STRICT | ConfigDict(
        json_schema_extra={
            "oneOf": [
                {"required": [one], "properties": {one: {"not": {"type": "null"}}, other: {"type": "null"}}}
                for one, other in (("source", "fields"), ("fields", "source"))
            ]
        }
    )

    source: Readable | None = None
    """Text as the model's task template makes it; else give `fields`."""
    fields: dict[str, Readable] | None = None
    """What the template makes the source of, such as `context` and `question`: see docs/TASKS.md."""
    model: str | None = None
    """The model; none given: the server's first."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """The same source, settings and seed give the same answer."""
    num_steps: NumSteps | None = None
    """Solver steps; none given: the server's default."""
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    """Places for the answer, in tokens, up to the model's limit; none given: what it was trained for."""
    method: Method = SamplingConfig.method
    """ODE solver; `midpoint` and `heun` take two passes a step."""
    guidance_scale: Annotated[float, Field(ge=0, le=20, allow_inf_nan=False)] = SamplingConfig.guidance_scale
    """Classifier-free guidance, 1 is none; other values double the passes."""
    num_candidates: Annotated[int, Field(ge=1, le=MAX_CANDIDATES)] = SamplingConfig.num_candidates
    """Answers drawn, of which the best is given, and the others under `candidates`."""
    ranking: Ranking = SamplingConfig.ranking
    """`bayes_risk`: the best is the one most like the others; `confidence`: the one the decoder is surest of."""
    deterministic: bool | None = None
    """Compute by itself, so that rounding too is the same under load; none given: the server's default."""
    trajectory: bool = False
    """Give the text after every solver step, with the expert of each token."""
    stream: bool = False
    """Send the text after every solver step as it is done (server-sent events `step`), then the answer (`answer`)."""
    timeout_s: TimeoutSeconds | None = None
    """How long the answer may take, up to the server's limit; none given: that limit."""

    @model_validator(mode="after")
    def _fits_together(self) -> GenerateRequest:
        if self.source is None and self.fields is None:
            raise disagreement("source", "source is missing; give it, or else fields")
        if self.source is not None and self.fields is not None:
            raise disagreement("fields", "fields must be null where source is given")
        if self.stream and self.num_candidates > 1:
            raise disagreement("num_candidates", "num_candidates must be 1 with stream: which is best shows at the end")
        return self

    @property
    def sampling(self) -> SamplingConfig:
        """Solver, guidance and candidates."""
        return SamplingConfig(
            method=self.method,
            guidance_scale=float(self.guidance_scale),
            num_candidates=self.num_candidates,
            ranking=self.ranking,
        )


class RankedText(BaseModel):
    """One of several candidates."""

    model_config = DOCUMENTED

    text: str
    """What it says."""
    score: float
    """What it was ranked by, the higher the better."""


class Snapshot(BaseModel):
    """The whole text on its way from noise, as the decoder reads it by then."""

    model_config = DOCUMENTED

    step: int
    """Solver steps done."""
    t: float
    """Time of the flow: 0 is noise, 1 is text."""
    text: str
    """The text."""
    pieces: list[str]
    """What each token adds to the text."""
    experts: list[int]
    """Expert of each token."""


class Timings(BaseModel):
    """Where the time went, in milliseconds."""

    model_config = DOCUMENTED

    queue_ms: float
    """Waiting for the model."""
    tokenise_ms: float
    """Text to tokens."""
    sample_ms: float
    """The sampler, for the whole batch."""
    decode_ms: float
    """Tokens to text."""


class GenerateResponse(BaseModel):
    """One answer."""

    model_config = DOCUMENTED

    text: str
    """The answer."""
    tokens: list[int]
    """Its token ids."""
    experts: list[int]
    """Expert of each token; a baseline has none."""
    candidates: list[RankedText] | None = None
    """All that were drawn, the best first, where there are several."""
    trajectory: list[Snapshot] | None = None
    """The text after every solver step, where asked for."""
    num_steps: int
    """Solver steps."""
    nfe: int
    """Passes through the flow's trunk, of each candidate."""
    latency_ms: float
    """Time in the replica, in milliseconds."""
    timings: Timings
    """Its parts."""
    batch_size: int
    """Sources that were answered together."""
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
    models: list[str]


ALLOWED = {
    "source": "text in Unicode that is not blank",
    "fields": "an object of texts in Unicode that are not blank",
    "model": "the name of a model, see GET /v1/models",
    "seed": "a whole number in [0, 2**63)",
    "num_steps": "a whole number in [1, 64]",
    "max_tokens": "a whole number >= 1, up to the model's limit",
    "method": "euler, midpoint or heun",
    "guidance_scale": "a number in [0, 20]",
    "num_candidates": f"a whole number in [1, {MAX_CANDIDATES}]",
    "ranking": "bayes_risk or confidence",
    "deterministic": "true or false",
    "trajectory": "true or false",
    "stream": "true or false",
    "timeout_s": "a number of seconds > 0",
}
"""What each field of a request may be, in words."""


def first_error(
    errors: Sequence[Mapping[str, Any]],
    request: type[BaseModel] = GenerateRequest,
    allowed: Mapping[str, str] = ALLOWED,
) -> FieldError:
    """The first of pydantic's errors about a request, in our words.

    Args:
        errors: As FastAPI's RequestValidationError lists them; `loc` starts with `body`.
        request: The model that the request did not fit.
        allowed: What each of its fields may be.
    """
    error = errors[0]
    path = [str(part) for part in error["loc"][1:]]
    if error["type"] == "json_invalid":
        reason = f"{error['ctx']['error']} at character {path[0]}"
        return FieldError("body", f"body is not valid JSON: {reason}", "a JSON object", "invalid_json")
    if error["type"] == "disagreement":
        field = error["ctx"]["param"]
        return FieldError(field, error["ctx"]["message"], allowed[field])
    if not path:
        return FieldError(
            "body",
            "body must be a JSON object, sent with Content-Type: application/json",
            "a JSON object",
            "invalid_json",
        )
    field, known = path[0], sorted(request.model_fields)
    if error["type"] == "extra_forbidden" and len(path) == 1:
        name = shown(field).strip("'\"")
        return FieldError(name, unknown_name(name, name, known), known, "unknown_field")
    if error["type"] == "missing":
        return FieldError(field, f"{field} is missing; it must be {allowed[field]}", allowed[field], "missing_field")
    return must_be(field, allowed[field], error["input"])

"""OpenAI's completions on our terms: their request and response, and how one becomes the other.

What their fields mean here: `n` and `best_of` are candidates of one seed, ranked by the decoder's confidence;
`max_tokens` and `stop` cut the text the model would give anyway, which is drawn whole. Fields that mean nothing to a
flow pass at their neutral values.
"""

from __future__ import annotations

import itertools
import json
import secrets
import time
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, Field, model_validator

from serve.errors import FieldError
from serve.schemas import (
    ALLOWED,
    DOCUMENTED,
    MAX_CANDIDATES,
    STRICT,
    NumSteps,
    Readable,
    TimeoutSeconds,
    disagreement,
    unicode,
)
from serve.served_model import Answer, ServedModel, Text
from yan_core.config import ModelConfig, SamplingConfig
from yan_core.tasks import InfillingTask
from yan_core.tokenization import MASK

Count = Annotated[int, Field(ge=1, le=MAX_CANDIDATES)]
Stop = Annotated[str, Field(min_length=1)]
One = Annotated[float, Field(ge=1, le=1)]
Zero = Annotated[float, Field(ge=0, le=0)]


class StreamOptions(BaseModel):
    """How to stream."""

    model_config = STRICT

    include_usage: bool = False
    """Whether a last chunk without choices has the usage."""
    include_obfuscation: Literal[False] | None = None
    """Chunks are not padded to hide their lengths."""


class CompletionRequest(BaseModel):
    """A request of OpenAI's completions API."""

    model_config = STRICT

    model: str | None = None
    """The model; none given: the server's first."""
    prompt: Readable | Annotated[list[Readable], Field(min_length=1)]
    """Text, or several of them, as the model's task template makes them. Token ids are not taken."""
    suffix: Annotated[str, AfterValidator(unicode)] | None = None
    """Text after the one to be written; for models of the task infilling alone."""
    n: Count | None = None
    """Answers to each prompt."""
    best_of: Count | None = None
    """Answers drawn for each prompt, of which the best n are given; none given: n."""
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    """The same request and seed give the same text; none given: another text each time."""
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    """Where an answer is cut, in tokens; none given: at what the model was trained for."""
    stop: Stop | Annotated[list[Stop], Field(max_length=4)] | None = None
    """Up to four texts before the first of which an answer ends."""
    stream: bool | None = None
    """Send the text in pieces (server-sent events)."""
    stream_options: StreamOptions | None = None
    """How to stream."""
    logprobs: Annotated[int, Field(ge=0, le=1)] | None = None
    """0: the decoder's log-probability of each token; 1: as the one entry of `top_logprobs` too."""
    echo: bool | None = None
    """Give the prompt before the answer."""
    user: str | None = None
    """Taken and not used."""
    temperature: One | None = None
    """1: the model has no temperature."""
    top_p: One | None = None
    """1: the model has no nucleus."""
    presence_penalty: Zero | None = None
    """0: the model has no penalties."""
    frequency_penalty: Zero | None = None
    """0: the model has no penalties."""
    logit_bias: Annotated[dict[str, float], Field(max_length=0)] | None = None
    """Empty: the model has no bias."""
    num_steps: NumSteps | None = None
    """Ours: solver steps; none given: the server's default."""
    deterministic: bool | None = None
    """Ours: compute by itself, so that rounding too is the same under load; none given: the server's default."""
    timeout_s: TimeoutSeconds | None = None
    """Ours: how long the answer may take, up to the server's limit; none given: that limit."""

    @model_validator(mode="after")
    def _fits_together(self) -> CompletionRequest:
        if self.best_of is not None and self.best_of < (self.n or 1):
            raise disagreement("best_of", f"best_of must be >= n={self.n or 1}, got {self.best_of}")
        if self.stream_options is not None and not self.stream:
            raise disagreement("stream_options", "stream_options must be null without stream")
        if self.echo and self.logprobs is not None:
            raise disagreement("logprobs", "logprobs must be null with echo: a prompt has no log-probabilities")
        return self

    @property
    def prompts(self) -> list[str]:
        """The prompts."""
        return [self.prompt] if isinstance(self.prompt, str) else list(self.prompt)

    @property
    def sampling(self) -> SamplingConfig:
        """Candidates, ranked by the decoder's confidence."""
        return SamplingConfig(num_candidates=self.best_of or self.n or 1, ranking="confidence")


class Logprobs(BaseModel):
    """Log-probabilities of an answer's tokens."""

    model_config = DOCUMENTED

    tokens: list[str]
    """What each token adds to the text."""
    token_logprobs: list[float]
    """The decoder's log-probability of each."""
    top_logprobs: list[dict[str, float]] | None
    """The same by token, where asked for."""
    text_offset: list[int]
    """Where each begins in the text."""


class Choice(BaseModel):
    """One answer."""

    model_config = DOCUMENTED

    index: int
    """Its number: answers to the first prompt first."""
    text: str
    """What it says."""
    logprobs: Logprobs | None
    """Where asked for."""
    finish_reason: str | None
    """`stop`: it ended by itself or at a stop text; `length`: it was cut; null: there is more to come."""


class Usage(BaseModel):
    """Tokens read and given."""

    model_config = DOCUMENTED

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class Completion(BaseModel):
    """The response of OpenAI's completions API, or a chunk of it."""

    model_config = DOCUMENTED

    id: str
    object: str = "text_completion"
    created: int
    model: str
    choices: list[Choice]
    usage: Usage | None = None


class ModelCard(BaseModel):
    """A model, as OpenAI's clients read it, with what is to know about it here."""

    model_config = DOCUMENTED

    id: str
    """What requests can call it for as long as it is served."""
    object: str = "model"
    version: str
    """What answers call it: of a model that follows an alias the name and version that it stands for now."""
    created: int
    owned_by: str = "yan"
    architecture: str
    """`yan`, or the family of a baseline: `ar`, `encoder_decoder`, `masked_diffusion`."""
    task: str
    """Name of its task template."""
    fields: list[str]
    """What the template makes the source of: `fields` of POST /v1/generate."""
    max_source_tokens: int
    """Tokens that are read of a source."""
    max_tokens: int
    """Tokens of the longest answer it was trained for."""


class ModelList(BaseModel):
    """All models."""

    model_config = DOCUMENTED

    object: str = "list"
    data: list[ModelCard]


COMPLETION_ALLOWED = ALLOWED | {
    "prompt": "text in Unicode that is not blank, or a list of such texts; token ids are not taken",
    "suffix": "text in Unicode, or null",
    "n": f"a whole number in [1, {MAX_CANDIDATES}]",
    "best_of": f"a whole number in [n, {MAX_CANDIDATES}]",
    "seed": "a whole number in [-2**63, 2**63)",
    "stop": "text that is not empty, or a list of at most 4 such texts",
    "stream_options": 'null or {"include_usage": true or false, "include_obfuscation": false}, with stream',
    "logprobs": "null, 0 or 1: the decoder gives the most likely token alone",
    "echo": "true or false",
    "user": "text or null",
    "temperature": "1 or null: a flow has no temperature, its variety comes from the seed",
    "top_p": "1 or null: a flow has no nucleus",
    "presence_penalty": "0 or null: a flow has no penalties",
    "frequency_penalty": "0 or null: a flow has no penalties",
    "logit_bias": "{} or null: a flow has no bias",
}
"""What each field of a completion request may be, in words."""


def card(name: str, model: ServedModel) -> ModelCard:
    """What is told of a model that requests call by a name."""
    generator = model.engine.generator
    config = generator.model.config
    return ModelCard(
        id=name,
        version=model.name,
        created=model.created,
        architecture="yan" if isinstance(config, ModelConfig) else config.family,
        task=generator.task.name,
        fields=list(generator.task.source_fields),
        max_source_tokens=generator.max_source_tokens,
        max_tokens=generator.max_target_tokens,
    )


def fields_of(request: CompletionRequest) -> dict[str, str]:
    """What a request calls that is named otherwise in `Engine` and `Settings`."""
    candidates = "n" if request.best_of is None else "best_of"
    return {"source": "prompt", "num_candidates": candidates, "with_log_probs": "logprobs"}


def sources_of(request: CompletionRequest, model: ServedModel) -> list[str]:
    """What the model reads for each prompt.

    Raises:
        FieldError: If there is a suffix and the model cannot write what comes before one.
    """
    task = model.engine.generator.task
    if request.suffix is None or (request.suffix == "" and not isinstance(task, InfillingTask)):
        return request.prompts
    if not isinstance(task, InfillingTask):
        raise FieldError(
            "suffix", f"suffix is for models of the task infilling, {model.name} is one of {task.name}", "null"
        )
    try:
        return [task.prompt({task.target: f"{prompt} {MASK} {request.suffix}"}) for prompt in request.prompts]
    except ValueError:
        raise FieldError("prompt", f"prompt and suffix must not hold {MASK}: it stands between them") from None


def refuse_too_long(request: CompletionRequest, model: ServedModel) -> None:
    """Refuse a limit that no answer of the model could reach, though it would cut none.

    Raises:
        FieldError: If max_tokens is more than the model could ever write.
    """
    most = model.engine.generator.most_tokens
    if request.max_tokens is not None and request.max_tokens > most:
        raise FieldError(
            "max_tokens",
            f"max_tokens must be a whole number in [1, {most}], got {request.max_tokens}",
            f"a whole number in [1, {most}]",
            code="context_length_exceeded",
        )


def seeds_of(request: CompletionRequest) -> list[int]:
    """One seed a prompt: the request's, else one by chance."""
    if request.seed is None:
        return [secrets.randbits(63) for _ in request.prompts]
    return [request.seed % 2**63] * len(request.prompts)


@dataclass(frozen=True)
class Ending:
    """Where an answer ends.

    Attributes:
        text: What is left of it.
        tokens: How many tokens that is.
        reason: OpenAI's `finish_reason`.
    """

    text: str
    tokens: int
    reason: str


def needs_pieces(request: CompletionRequest, places: int) -> bool:
    """Whether a response needs to know what each token of an answer of so many places adds to the text."""
    cut = request.max_tokens is not None and request.max_tokens < places
    return cut or bool(request.stop) or request.logprobs is not None


def ending(text: Text, max_tokens: int | None, stop: Sequence[str]) -> Ending:
    """Cut an answer at its limit and before the first stop text; it has its pieces where `needs_pieces`."""
    reason = "stop" if text.candidate.finished else "length"
    if text.pieces is None:
        return Ending(text.text, len(text.candidate.tokens), reason)
    pieces = text.pieces[:max_tokens]
    whole = "".join(pieces)
    found = [place for place in (whole.find(one) for one in stop) if place >= 0]
    if not found:
        return Ending(whole, len(pieces), reason if len(pieces) == len(text.pieces) else "length")
    ends = itertools.accumulate(map(len, pieces))
    tokens = sum(end - len(piece) < min(found) for piece, end in zip(pieces, ends, strict=True))
    return Ending(whole[: min(found)], tokens, "stop")


def completion(request: CompletionRequest, model: ServedModel, answers: Sequence[Answer]) -> Completion:
    """The response, from the answers to each prompt."""
    n = request.n or 1
    stop = [request.stop] if isinstance(request.stop, str) else list(request.stop or ())
    choices = []
    tokens = 0
    for prompt, answer in zip(request.prompts, answers, strict=True):
        for text in answer.texts[:n]:
            end = ending(text, request.max_tokens, stop)
            tokens += end.tokens
            written = end.text
            if request.echo:
                written = prompt + ("" if prompt[-1].isspace() or not written else " ") + written
            choices.append(
                Choice(
                    index=len(choices),
                    text=written,
                    logprobs=None if request.logprobs is None else _logprobs(text, end, request.logprobs == 1),
                    finish_reason=end.reason,
                )
            )
    read = sum(answer.source_tokens for answer in answers)
    return Completion(
        id=f"cmpl-{uuid.uuid4().hex}",
        created=int(time.time()),
        model=model.name,
        choices=choices,
        usage=Usage(prompt_tokens=read, completion_tokens=tokens, total_tokens=read + tokens),
    )


def _logprobs(text: Text, end: Ending, with_top: bool) -> Logprobs:
    assert text.candidate.log_probs is not None and text.pieces is not None
    values = text.candidate.log_probs[: end.tokens]
    offsets = list(itertools.accumulate(map(len, text.pieces[: end.tokens]), initial=0))
    pieces = [end.text[start:stop] for start, stop in itertools.pairwise(offsets)]  # a stop may cut the last one
    return Logprobs(
        tokens=pieces,
        token_logprobs=values,
        top_logprobs=[{piece: value} for piece, value in zip(pieces, values, strict=True)] if with_top else None,
        text_offset=offsets[:-1],
    )


def chunks(request: CompletionRequest, whole: Completion) -> Iterator[dict[str, Any]]:
    """A completion in pieces, as its clients put them together again: words, then why it ended, then the usage."""
    usage = request.stream_options is not None and request.stream_options.include_usage
    head: dict[str, Any] = whole.model_dump(exclude={"choices", "usage"}) | ({"usage": None} if usage else {})

    def chunk(choice: Choice, text: str, logprobs: Logprobs | None, reason: str | None) -> dict[str, Any]:
        part = Choice(index=choice.index, text=text, logprobs=logprobs, finish_reason=reason)
        return head | {"choices": [part.model_dump()]}

    for choice in whole.choices:
        logprobs = choice.logprobs
        if logprobs is None:
            for word in _words(choice.text):
                yield chunk(choice, word, None, None)
        else:
            for i, piece in enumerate(logprobs.tokens):
                part = slice(i, i + 1)
                top = None if logprobs.top_logprobs is None else logprobs.top_logprobs[part]
                of_piece = Logprobs(
                    tokens=[piece],
                    token_logprobs=logprobs.token_logprobs[part],
                    top_logprobs=top,
                    text_offset=logprobs.text_offset[part],
                )
                yield chunk(choice, piece, of_piece, None)
        yield chunk(choice, "", None, choice.finish_reason)
    if usage:
        assert whole.usage is not None
        yield head | {"choices": [], "usage": whole.usage.model_dump()}


def _words(text: str) -> list[str]:
    """A text cut before each word."""
    words: list[str] = []
    for part in text.split(" "):
        words.append(f" {part}" if words else part)
    return [word for word in words if word]


def events(request: CompletionRequest, whole: Completion) -> Iterator[bytes]:
    """A completion as OpenAI's server-sent events."""
    for chunk in chunks(request, whole):
        yield b"data: " + json.dumps(chunk, ensure_ascii=False).encode() + b"\n\n"
    yield b"data: [DONE]\n\n"

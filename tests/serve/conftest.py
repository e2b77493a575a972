"""A tiny model with random weights, on disk, and the HTTP API over it without Ray."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from ray.serve._private.http_util import RequestIdMiddleware
from starlette.types import Receive, Scope, Send

from serve.engine import Engine
from serve.metrics import Metrics
from serve.models import Models, Source
from serve.routes import create_api
from serve.schemas import AppArgs
from serve.served_model import Pools, ServedModel
from yan_core.checkpoint import save_pretrained
from yan_core.config import BaselineConfig, ModelConfig, TokenizerConfig
from yan_core.model import build_model
from yan_core.tokenization import Tokenizer

STORY = "Mary went to the kitchen. John took the apple to the garden. Where is Mary?"


TINY = ModelConfig(d_model=32, num_heads=2, max_positions=64)


def save_tiny(
    folder: Path,
    max_source_tokens: int = 32,
    architecture: ModelConfig | BaselineConfig = TINY,
    task: str = "question_answering",
) -> Path:
    """Save a random model, by default with 64 positions, that answers in at most 4 tokens."""
    tokenizer = Tokenizer.train([STORY], TokenizerConfig(vocab_size=64))
    model = build_model(architecture, tokenizer.vocab_size, seed=1)
    details = {"task": task, "max_source_tokens": max_source_tokens, "max_target_tokens": 4}
    save_pretrained(folder, model, tokenizer, details)
    return folder


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model, as a run called `tiny` leaves it."""
    return save_tiny(tmp_path_factory.mktemp("runs") / "tiny" / "model")


def engine_of(folder: Path, **limits: int) -> Engine:
    """The model of a folder, with the app's limits where none are named."""
    args = AppArgs(model="m", **limits)  # type: ignore[arg-type]
    return Engine(
        folder,
        max_batch_size=args.max_batch_size,
        max_batch_tokens=args.max_batch_tokens,
        max_source_chars=args.max_source_chars,
    )


class GivesIds(RequestIdMiddleware):
    """What Serve puts around an app; it passes on requests alone."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass one on."""
        await (self._app if scope["type"] == "lifespan" else super().__call__)(scope, receive, send)


class NoShelf:
    """Where no other model comes from."""

    def load(self, address: str) -> ServedModel:
        """Fail."""
        raise AssertionError(address)

    def current(self, address: str) -> str:
        """Fail."""
        raise AssertionError(address)


def models_of(models: Mapping[str, Any] | Iterable[Any], source: Source | None = None, **settings: Any) -> Models:
    """The models of a replica, each at its name where no address is given, with the app's defaults."""
    by_address = models if isinstance(models, Mapping) else {model.name: model for model in models}
    args = AppArgs(model="m")
    usual = {"any_registered": args.any_registered, "most": args.max_models, "retry_s": args.refresh_s}
    return Models(by_address, source or NoShelf(), **{**usual, **settings})


Start = Callable[..., TestClient]
"""Starts the API: `start(folder, keys={...}, **app_args)`; its `engine` and `models` are on `client.app.state`."""


@pytest.fixture(scope="module")
def start(model_folder: Path) -> Iterator[Start]:
    """Starts the API over a model in this process, without Ray."""
    with ExitStack() as stack:

        def run(folder: Path = model_folder, keys: Mapping[str, str] | None = None, **settings: Any) -> TestClient:
            args = AppArgs(model="m", **settings)
            metrics = Metrics("one")
            limits = ("max_batch_size", "max_batch_tokens", "max_source_chars")
            engine = engine_of(folder, **{name: getattr(args, name) for name in limits})
            engine.warm_up(args.num_steps)
            pools = Pools()
            stack.callback(pools.draws.shutdown)
            stack.callback(pools.texts.shutdown)
            models = models_of([ServedModel("tiny", engine, metrics, args.max_queued_requests, pools)])
            api = create_api(models, metrics, args, keys or {})
            api.add_middleware(GivesIds)
            api.state.engine, api.state.models = engine, models
            return stack.enter_context(TestClient(api, raise_server_exceptions=False))

        yield run


@pytest.fixture(scope="module")
def client(start: Start) -> TestClient:
    """The API with its defaults."""
    return start()

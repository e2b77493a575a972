"""build_app(args) -> Application: the API on Ray Serve.

`serve run serve.app:build_app model=runs/world/model`, or `import_path: serve.app:build_app` in a Serve config.
"""

# No `from __future__ import annotations` here: Serve reads the annotations as objects.
import asyncio
import logging
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import ray
import torch
from fastapi import FastAPI
from ray import serve as ray_serve
from ray.exceptions import RayError
from ray.serve import Application
from ray.serve.config import AutoscalingConfig
from ray.serve.exceptions import RayServeException

from serve.auth import keep_keys, keys_file, load_keys, refuse_open_server
from serve.engine import Engine
from serve.exporter import Exporter
from serve.metrics import Metrics
from serve.models import Models, first_load
from serve.registry import find_version, folder_name, is_registered, registry_uri, resolve, version_name
from serve.routes import create_api
from serve.schemas import AppArgs
from serve.served_model import Pools, ServedModel

logger = logging.getLogger(__name__)

SWITCH_S = 2e-4
"""Longest that HTTP keeps Python from the thread that draws: between two operations of a model it would wait for as
long as a request's handling takes, Python's own limit being 5 ms. What it brings was not measured by itself."""

DRAINING_S = 35.0
"""For half a minute a replica that is to go takes new requests (RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S), and it
needs some seconds for the rest."""

SIBLING_S = 5.0
"""How long a replica that starts waits for the word of another."""


class Shelf:
    """Where a replica's models come from: folders and a registry. They share the threads of the replica."""

    def __init__(self, args: AppArgs, metrics: Metrics) -> None:
        """Load nothing yet.

        Args:
            args: Arguments of the app.
            metrics: What the models count in.
        """
        self.args, self.metrics = args, metrics
        self._pools = Pools()

    def load(self, address: str) -> ServedModel:
        """Load a model and generate with it.

        Raises:
            ValueError: If it cannot be found or read.
            RuntimeError: If it cannot generate.
        """
        args = self.args
        with resolve(address, args.tracking_uri) as found:
            engine = Engine(
                found.folder,
                max_batch_size=args.max_batch_size,
                max_batch_tokens=args.max_batch_tokens,
                max_source_chars=args.max_source_chars,
                device="cuda" if args.use_gpu else "cpu",
            )
            logger.info("%s is warm after %.1f s", found.name, engine.warm_up(args.num_steps))
        return ServedModel(found.name, engine, self.metrics, args.max_queued_requests, self._pools)

    def current(self, address: str) -> str:
        """Name of the version that an address of the registry stands for now."""
        return version_name(find_version(address, self.args.tracking_uri))


@ray_serve.deployment(name="yan", logging_config={"enable_access_log": False})
@ray_serve.ingress()
class Server:
    """One replica, which takes HTTP itself: there is no hop between ingress and model, and one copy of the weights."""

    async def __init__(self, args: AppArgs) -> None:
        """Load the model and generate with it; a replica that cannot is not started.

        Raises:
            ValueError: If model or keys cannot be found or read, or anyone on the network could use it.
            RuntimeError: If it cannot generate.
        """
        # However it was started, by `yan serve`, `serve run` or `serve deploy`: only the controller knows the address.
        keys = load_keys(args.api_keys_file)
        controller: Any = ray.get_actor("SERVE_CONTROLLER_ACTOR", namespace="serve")
        http = await controller.get_http_config.remote()
        refuse_open_server(http.host, keys)
        refuse_short_deadline(http.request_timeout_s, args.request_timeout_s)
        torch.set_num_threads(max(1, int(args.cpus_per_replica)))
        sys.setswitchinterval(SWITCH_S)
        self.args, self.keys = args, keys
        self.metrics = Metrics(ray_serve.get_replica_context().replica_id.unique_id)
        Exporter(self.metrics.registry).start()
        shelf = Shelf(args, self.metrics)
        # In a thread: the replica's event loop is ours too, see `ingress.SEPARATE_LOOP`.
        addresses = (args.model, *args.more_models)
        loaded = {address: await first_load(shelf, address, named_elsewhere) for address in addresses}
        self.models = Models(
            loaded,
            shelf,
            any_registered=args.any_registered,
            most=args.max_models,
            retry_s=args.refresh_s,
        )
        if any(map(is_registered, addresses)) or args.any_registered:
            self._fresh = asyncio.create_task(self.models.keep_fresh(args.refresh_s))
        if keys:
            self._keys = asyncio.create_task(keep_keys(keys, args.api_keys_file, args.refresh_s))

    def __serve_build_asgi_app__(self) -> FastAPI:
        """Asked by Serve after __init__."""
        return create_api(self.models, self.metrics, self.args, self.keys)

    def named_by(self, address: str) -> str:
        """Asked by a replica that starts: name of the model that an address stands for here."""
        return self.models.named_by(address)

    def check_health(self) -> None:
        """Asked by Serve; a replica that raises is replaced."""
        if not self.models.ready:
            raise RuntimeError(f"{', '.join(self.models.all)}: the latest batches all failed")


async def named_elsewhere(address: str) -> str:
    """Name of the model that stands for an address in a replica that runs; empty: none answers."""
    context = ray_serve.get_replica_context()
    handle: Any = ray_serve.get_deployment_handle(context.deployment, context.app_name)
    try:
        async with asyncio.timeout(SIBLING_S):
            return await handle.named_by.remote(address)
    except (TimeoutError, RayError, RayServeException) as error:
        logger.info("no other replica says what it serves as %s: %r", address, error)
        return ""


def refuse_short_deadline(of_serve: float | None, ours: float) -> None:
    """Serve's own deadline would end requests first, with words of its own and no Retry-After.

    Args:
        of_serve: Seconds; None: it has none.
        ours: Of the app's arguments.

    Raises:
        ValueError: If Serve's is not the longer one.
    """
    if of_serve is not None and of_serve <= ours:
        raise ValueError(
            f"http_options.request_timeout_s={of_serve:g} must be null or more than the app's own request_timeout_s, "
            f"which is {ours:g}"
        )


def build_app(args: AppArgs) -> Application:
    """The app that Serve runs.

    Args:
        args: Its arguments; a relative model folder, SQLite registry or file of keys is taken from the folder this runs
            in. Each replica reads the file of keys on its own node.
    """
    model, *more = (_absolute(model) for model in (args.model, *args.more_models))
    names = Counter(folder_name(each) for each in (model, *more) if not is_registered(each))
    if twice := [name for name, count in names.items() if count > 1]:
        raise ValueError(f"several models are called {', '.join(twice)}, and requests could name one of them alone")
    load_keys(args.api_keys_file)  # what is wrong with them is told before anything starts
    keys = keys_file(args.api_keys_file) if args.api_keys_file else ""  # else each node's environment names its own
    args = args.model_copy(update={"model": model, "more_models": tuple(more), "api_keys_file": keys})
    if args.any_registered or any(map(is_registered, (model, *more))):
        args = args.model_copy(update={"tracking_uri": registry_uri(args.tracking_uri)})
    if args.access_log:
        args = args.model_copy(update={"access_log": str(Path(args.access_log).absolute())})
    # The replica's own queue is the one that fills up: it knows how long it takes and which work is given up. Serve's
    # limits are behind it, where refusing alone is too much.
    num_models = args.max_models if args.any_registered else 1 + len(more)
    most = 4 * num_models * (args.max_queued_requests + args.max_batch_size)
    return Server.options(  # type: ignore[attr-defined]
        **replicas(args),
        max_ongoing_requests=most,
        max_queued_requests=most,
        backpressure_config={"retry_after_s": 1},
        graceful_shutdown_timeout_s=drain_s(args),
        ray_actor_options={"num_cpus": args.cpus_per_replica, "num_gpus": int(args.use_gpu)},
    ).bind(args)


def drain_s(args: AppArgs) -> float:
    """How long Serve waits for a replica that is to go before it kills it: what came last may take as long as any."""
    return DRAINING_S + args.request_timeout_s


def replicas(args: AppArgs) -> dict[str, Any]:
    """Serve's options on how many replicas there are."""
    if not args.max_replicas:
        return {"num_replicas": args.num_replicas}
    scaling = AutoscalingConfig(
        min_replicas=args.num_replicas,
        max_replicas=args.max_replicas,
        initial_replicas=max(1, args.num_replicas),  # so that a model that does not work is told at once
        target_ongoing_requests=args.max_batch_size,  # a full batch: more of them wait
        upscale_delay_s=args.upscale_delay_s,
        downscale_delay_s=args.downscale_delay_s,
        metrics_interval_s=1.0,
        look_back_period_s=max(2.0, min(30.0, args.upscale_delay_s)),
    )
    return {"num_replicas": None, "autoscaling_config": scaling}


def _absolute(model: str) -> str:
    """A folder by its absolute path, as replicas have another working directory; an address as it is."""
    return model if is_registered(model) or not Path(model).exists() else str(Path(model).absolute())

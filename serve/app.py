"""build_app(args) -> Application: the API on Ray Serve.

`serve run serve.app:build_app model=runs/world/model`, or `import_path: serve.app:build_app` in a Serve config.
"""

# No `from __future__ import annotations` here: Serve reads the annotations as objects.
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ray
import torch
from fastapi import FastAPI
from ray import serve as ray_serve
from ray.serve import Application

from serve.auth import load_keys, refuse_open_server
from serve.engine import Engine
from serve.metrics import Metrics
from serve.models import Models, ServedModel, pools
from serve.registry import is_registered, registry_uri, resolve
from serve.routes import create_api
from serve.schemas import AppArgs

logger = logging.getLogger(__name__)


@ray_serve.deployment(name="yan", logging_config={"enable_access_log": False})
@ray_serve.ingress()
class Server:
    """One replica, which takes HTTP itself: there is no hop between ingress and model, and one copy of the weights."""

    async def __init__(self, args: AppArgs, keys: Mapping[str, str]) -> None:
        """Load the model and generate with it; a replica that cannot is not started.

        Raises:
            ValueError: If the model cannot be found or read, or anyone on the network could use it.
            RuntimeError: If it cannot generate.
        """
        # However it was started, by `yan serve`, `serve run` or `serve deploy`: only the controller knows the address.
        controller: Any = ray.get_actor("SERVE_CONTROLLER_ACTOR", namespace="serve")
        refuse_open_server((await controller.get_http_config.remote()).host, keys)
        torch.set_num_threads(max(1, int(args.cpus_per_replica)))
        self.args, self.keys = args, keys
        self.metrics = Metrics(ray_serve.get_replica_context().replica_id.unique_id)
        found = resolve(args.model, args.tracking_uri)
        engine = Engine(
            found.folder,
            max_batch_size=args.max_batch_size,
            max_batch_tokens=args.max_batch_tokens,
            max_source_chars=args.max_source_chars,
            device="cuda" if args.use_gpu else "cpu",
        )
        logger.info("%s is warm after %.1f s", found.name, engine.warm_up(args.num_steps))
        self.models = Models([ServedModel(found.name, engine, self.metrics, args.max_queued_requests, *pools())])

    def __serve_build_asgi_app__(self) -> FastAPI:
        """Asked by Serve after __init__."""
        return create_api(self.models, self.metrics, self.args, self.keys)

    def check_health(self) -> None:
        """Asked by Serve; a replica that raises is replaced."""
        if not self.models.ready:
            raise RuntimeError(f"{', '.join(self.models.all)}: the latest batches all failed")


def build_app(args: AppArgs) -> Application:
    """The app that Serve runs.

    Args:
        args: Its arguments; a relative model folder or SQLite registry is taken from the folder this runs in, and the
            file of keys is read here.
    """
    if is_registered(args.model):
        args = args.model_copy(update={"tracking_uri": registry_uri(args.tracking_uri)})
    elif Path(args.model).exists():
        args = args.model_copy(update={"model": str(Path(args.model).absolute())})
    if args.access_log:
        args = args.model_copy(update={"access_log": str(Path(args.access_log).absolute())})
    # The replica's own queue is the one that fills up: it knows how long it takes and which work is given up. Serve's
    # limits are behind it, where refusing alone is too much.
    most = 4 * (args.max_queued_requests + args.max_batch_size)
    return Server.options(  # type: ignore[attr-defined]
        num_replicas=args.num_replicas,
        max_ongoing_requests=most,
        max_queued_requests=most,
        backpressure_config={"retry_after_s": 1},
        ray_actor_options={"num_cpus": args.cpus_per_replica, "num_gpus": int(args.use_gpu)},
    ).bind(args, load_keys(args.api_keys_file))

"""A Serve deployment that reads JSON and does nothing, behind what `yan serve` has before it: what HTTP alone costs.

python -m pipelines.benchmarks.no_op PORT
"""

import importlib
import logging
import sys
import time
from typing import Any

ingress = importlib.import_module("serve.ingress")  # chooses what takes HTTP in; before Serve is imported

import ray  # noqa: E402
from fastapi import FastAPI  # noqa: E402
from ray import serve as ray_serve  # noqa: E402

api = FastAPI()


@ray_serve.deployment(logging_config={"enable_access_log": False})
@ray_serve.ingress(api)
class NoOp:
    """Answers at once."""

    @api.post("/v1/generate")
    async def generate(self, body: dict[str, Any]) -> dict[str, str]:
        """Nothing."""
        return {"text": ""}


def main(port: int) -> None:
    """Serve until killed."""
    with ingress.private_haproxy():
        common: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR, "include_dashboard": False}
        ray.init(address="local", object_store_memory=256 * 2**20, **common)
        started = time.monotonic()
        quiet = {"log_level": "WARNING", "enable_access_log": False}
        ray_serve.start(http_options={"host": "127.0.0.1", "port": port}, logging_config=quiet)
        ray_serve.run(NoOp.bind(), name="no_op", logging_config=quiet)  # type: ignore[attr-defined]  # made by Serve
        print(f"ready after {time.monotonic() - started:.0f} s at http://127.0.0.1:{port} ", flush=True)
        try:
            while True:
                time.sleep(3600)
        except KeyboardInterrupt:
            ray_serve.shutdown()
            ray.shutdown()


if __name__ == "__main__":
    main(int(sys.argv[1]))

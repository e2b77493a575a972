"""What every test needs: quiet libraries, and a tiny run on the built-in world."""

import os

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")

import pytest  # noqa: E402
import torch  # noqa: E402

from yan_core.config import RunConfig, from_dict  # noqa: E402

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def mlflow_left_as_it_was():
    """A test that points MLflow at a store does so for its whole process, environment included: undone here."""
    before = os.environ.get("MLFLOW_TRACKING_URI")
    yield
    if os.environ.get("MLFLOW_TRACKING_URI") != before:
        import mlflow

        mlflow.set_tracking_uri(None)  # type: ignore[arg-type]
        mlflow.set_registry_uri(None)  # type: ignore[arg-type]
        if before is not None:
            os.environ["MLFLOW_TRACKING_URI"] = before


@pytest.fixture(scope="session")
def tiny_settings() -> dict:
    """Settings of a run of seconds on the built-in world; add `runs_dir`."""
    return {
        "name": "tiny",
        "log_every_s": 0.5,
        "data": {"max_target_tokens": 14, "dataset": "small", "datasets": {"small": {"format": "world"}}},
        "model": {"d_model": 16, "num_heads": 2, "num_experts": 2},
        "stages": {
            "autoencoder": {"max_steps": 12, "batch_size": 16, "trains": ["target_encoder", "decoder"]},
            "flow": {"max_steps": 6, "batch_size": 16},
            "finetune": {"max_steps": 12, "batch_size": 16},
        },
        "evaluation": {"num_steps": [1, 3], "max_rows": 20},
    }


@pytest.fixture
def tiny_config(tiny_settings, tmp_path) -> RunConfig:
    """The tiny run, in a folder of its own, on 400 examples."""
    settings = {**tiny_settings, "runs_dir": str(tmp_path)}
    settings["data"] = {
        **settings["data"],
        "datasets": {
            "small": {"format": "world", "num_train": 400, "num_validation": 40},
            "stories": {"format": "world_stories", "num_train": 200},
        },
        "corpus": "stories",
    }
    return from_dict(RunConfig, settings)

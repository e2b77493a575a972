"""Config files of `serve deploy`."""

import copy
from typing import Any

import pytest
import yaml
from ray.serve import Application
from ray.serve._private.utils import DEFAULT
from ray.serve.config import AutoscalingConfig
from ray.serve.schema import ServeDeploySchema

from serve.schemas import AppArgs
from tests.clusters.checks import CLUSTERS, serve_errors

FILES = ["cpu", "gpu"]


def load(name: str) -> dict[str, Any]:
    return yaml.safe_load((CLUSTERS / "serve" / f"{name}.yaml").read_text())


@pytest.mark.parametrize(
    ("keys", "value", "message"),
    [
        (["proxy_locations"], "EveryNode", "no field 'proxy_locations'"),
        (["http_options", "prt"], 80, "no field 'prt'"),
        (["applications", 0, "import_path"], "serve.app:", "import"),
        (["applications", 0, "args", "num_step"], 3, "num_step"),
        (["applications", 0, "args", "max_batch_size"], 0, "max_batch_size"),
        (["applications", 0, "deployments", 0, "replicas"], 3, "no field 'replicas'"),
        (["applications", 0, "deployments", 0, "autoscaling_config", "max_replicas"], 0, "max_replicas"),
        (["applications", 0, "deployments", 0, "autoscaling_config", "max_replica"], 3, "no field 'max_replica'"),
        (["applications", 0, "deployments", 0, "num_replicas"], "many", "num_replicas"),
    ],
)
def test_checker_finds_wrong_fields(keys: list[Any], value: Any, message: str):
    config = copy.deepcopy(load("gpu"))
    place: Any = config
    for key in keys[:-1]:
        place = place[key]
    place[keys[-1]] = value
    assert any(message in error for error in serve_errors(config))


@pytest.mark.parametrize("name", FILES)
def test_import_path_builds_the_app_whose_deployments_the_file_names(name: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://mlflow.example.com:5000")  # named, never asked
    (application,) = ServeDeploySchema.model_validate(load(name)).applications
    module, _, attribute = application.import_path.partition(":")
    build = getattr(__import__(module, fromlist=[attribute]), attribute)
    app = build(AppArgs.model_validate(application.args))
    assert isinstance(app, Application)
    names = [deployment.name for deployment in application.deployments]
    assert set(names) <= {app._bound_deployment.name}


def test_gpu_replicas_follow_the_requests_between_one_and_eight():
    (application,) = ServeDeploySchema.model_validate(load("gpu")).applications
    (deployment,) = application.deployments
    assert deployment.num_replicas == "auto" and application.args["use_gpu"]
    assert deployment.autoscaling_config is not DEFAULT.VALUE
    scaling = AutoscalingConfig.model_validate(load("gpu")["applications"][0]["deployments"][0]["autoscaling_config"])
    assert (scaling.min_replicas, scaling.max_replicas) == (1, 8)
    # Else a replica would refuse requests before the autoscaler asks for another.
    assert scaling.target_ongoing_requests is not None
    assert application.args["max_batch_size"] <= scaling.target_ongoing_requests
    assert scaling.target_ongoing_requests <= application.args["max_queued_requests"]


def test_cpu_config_is_one_replica():
    (application,) = ServeDeploySchema.model_validate(load("cpu")).applications
    assert AppArgs.model_validate(application.args).num_replicas == 1
    assert not AppArgs.model_validate(application.args).use_gpu

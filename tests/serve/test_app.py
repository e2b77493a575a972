"""The app builder as Serve calls it, from a command line or a config file."""

import pytest
from pydantic import ValidationError
from ray._common.utils import import_attr
from ray.serve import Application
from ray.serve._private.api import call_user_app_builder_with_args_if_necessary as build

from serve.app import build_app, refuse_short_deadline
from serve.registry import RegistryError
from serve.schemas import AppArgs


def test_serve_builds_it_from_its_import_path_and_text_arguments(model_folder):
    builder = import_attr("serve.app:build_app")
    assert isinstance(build(builder, {"model": str(model_folder), "num_replicas": "2"}), Application)


def test_serve_checks_the_arguments():
    # It would not, were the annotation a string (`from __future__ import annotations`).
    with pytest.raises(ValidationError, match="replicas"):
        build(build_app, {"model": "m", "replicas": "2"})


def test_a_registry_must_be_named(monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with pytest.raises(RegistryError, match="tracking_uri is empty"):
        build_app(AppArgs(model="models:/yan-tiny@champion"))


def test_keys_that_cannot_be_read_are_told_before_anything_starts(model_folder, tmp_path):
    with pytest.raises(ValueError, match="api_keys_file=.* cannot be read"):
        build_app(AppArgs(model=str(model_folder), api_keys_file=str(tmp_path / "nowhere")))


def test_a_file_of_keys_is_named_for_all_nodes_or_left_to_each(model_folder, tmp_path, monkeypatch):
    (tmp_path / "keys").write_text(f"ann {'a' * 64}\n")
    monkeypatch.chdir(tmp_path)
    app = build_app(AppArgs(model=str(model_folder), api_keys_file="keys"))
    assert app._bound_deployment.init_args[0].api_keys_file == str(tmp_path / "keys")
    monkeypatch.setenv("YAN_API_KEYS_FILE", "keys")  # of this node
    assert build_app(AppArgs(model=str(model_folder)))._bound_deployment.init_args[0].api_keys_file == ""


def test_two_folders_of_one_name_are_refused():
    with pytest.raises(ValueError, match="several models are called world, and requests could name one of them alone"):
        build_app(AppArgs(model="one/world/model", more_models=("two/world/model",)))


def test_serves_own_deadline_is_the_longer_one():
    for of_serve in (None, 30.5):
        refuse_short_deadline(of_serve, 30.0)
    with pytest.raises(ValueError, match="http_options.request_timeout_s=30 must be null or more than the app's"):
        refuse_short_deadline(30.0, 30.0)


def test_a_replica_that_is_to_go_has_the_time_of_any_request_and_of_what_still_reaches_it(model_folder):
    config = build_app(AppArgs(model=str(model_folder), request_timeout_s=90))._bound_deployment._deployment_config
    assert config.graceful_shutdown_timeout_s > 90 + 30


def test_models_of_the_registry_have_room_beside_those_that_stay():
    with pytest.raises(ValidationError, match="max_models must be >= 4 with any_registered"):
        AppArgs(model="a", more_models=("b", "c"), any_registered=True, max_models=3)
    AppArgs(model="a", more_models=("b", "c"), any_registered=True, max_models=4)


def test_replicas_follow_the_requests_where_there_may_be_several(model_folder):
    app = build_app(AppArgs(model=str(model_folder), num_replicas=0, max_replicas=3, max_batch_size=8))
    config = app._bound_deployment._deployment_config
    scaling = config.autoscaling_config
    assert scaling is not None
    assert (scaling.min_replicas, scaling.initial_replicas, scaling.max_replicas) == (0, 1, 3)
    assert scaling.target_ongoing_requests == 8 < config.max_ongoing_requests

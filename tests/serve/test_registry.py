"""models:/ addresses against a real registry in a SQLite file."""

import shutil
import socket
import tempfile
from pathlib import Path

import pytest
from mlflow import MlflowClient

from serve.app import Shelf
from serve.metrics import Metrics
from serve.registry import RegistryError, find_version, resolve
from serve.schemas import AppArgs


@pytest.fixture(scope="module")
def registry(model_folder, tmp_path_factory) -> str:
    """Version 1 of `yan-tiny` with alias `champion`; version 2 and `yan-hollow` hold no model."""
    home = tmp_path_factory.mktemp("registry")
    uri = f"sqlite:///{home}/mlflow.db"
    pyfunc, hollow = home / "pyfunc", home / "hollow"
    shutil.copytree(model_folder, pyfunc / "artifacts" / "model")
    (pyfunc / "MLmodel").write_text("flavors: {python_function: {}}\n")
    hollow.mkdir()
    (hollow / "config.json").write_text("{}")
    client = MlflowClient(uri, uri)
    for name in ("yan-tiny", "yan-hollow"):
        client.create_registered_model(name)
    client.create_model_version("yan-tiny", pyfunc.as_uri())
    client.create_model_version("yan-hollow", hollow.as_uri())
    client.set_registered_model_alias("yan-tiny", "champion", "1")
    return uri


@pytest.mark.parametrize("model", ["models:/yan-tiny@champion", "models:/yan-tiny/1"])
def test_a_registered_model_becomes_its_folder(registry, model, model_folder):
    with resolve(model, registry) as found:
        assert found.name == "yan-tiny/1"
        assert (found.folder / "model.safetensors").read_bytes() == (model_folder / "model.safetensors").read_bytes()


def test_the_address_may_come_from_the_environment(registry, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", registry)
    assert find_version("models:/yan-tiny@champion").version == 1


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("models:/yan-tony@champion", "no model 'yan-tony'; it has yan-hollow, yan-tiny"),
        ("models:/yan-tiny@best", "no alias 'best'; it has champion"),
        ("models:/yan-tiny/7", "no version 7; it has 1"),
        ("models:/yan-hollow@champion", "no alias 'champion'; it has none"),
        ("models:/yan-hollow/1", "holds no YAN model"),
        ("models:/yan-tiny", "must be models:/name@alias or models:/name/version"),
        ("models:/@champion", "must be models:/name@alias"),
        ("models:/yan-tiny/latest", "must be models:/name@alias"),
    ],
)
def test_what_is_not_there_is_said_with_what_is(registry, model, message):
    with pytest.raises(RegistryError, match=message), resolve(model, registry):
        pass


def test_a_missing_database_is_not_made(tmp_path):
    with pytest.raises(RegistryError, match="there is no file"):
        find_version("models:/a@b", f"sqlite:///{tmp_path}/none.db")
    assert not list(tmp_path.iterdir())


def test_no_address_at_all(monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with pytest.raises(RegistryError, match="tracking_uri is empty and MLFLOW_TRACKING_URI is not set"):
        find_version("models:/a@b")


def test_a_registry_out_of_reach(monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))  # bound and not listening: connections are refused
        with pytest.raises(RegistryError, match="cannot be read .*; is it running") as told:
            find_version("models:/a@b", f"http://mlflow:s3cret@127.0.0.1:{probe.getsockname()[1]}")
    assert "http://mlflow:***@127.0.0.1" in str(told.value) and "s3cret" not in str(told.value)


def test_a_models_copy_goes_when_it_is_loaded_or_is_none(registry, tmp_path, monkeypatch):
    """MLflow leaves a copy behind for whoever names no folder for it."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    args = AppArgs(model="models:/yan-tiny@champion", tracking_uri=registry)
    with resolve(args.model, registry) as found:
        assert found.folder.is_relative_to(tmp_path)
    assert Shelf(args, Metrics("one")).load(args.model).name == "yan-tiny/1"
    with pytest.raises(RegistryError, match="holds no YAN model"):
        Shelf(args, Metrics("one")).load("models:/yan-hollow/1")
    assert list(tmp_path.iterdir()) == []


def test_a_plain_folder_passes_through():
    with resolve("runs/world/model") as found:
        assert found.folder == Path("runs/world/model")
        assert found.name == "world"
    with resolve("/models/best") as found:
        assert found.name == "best"

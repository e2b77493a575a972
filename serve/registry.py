"""models:/name@alias -> a local model folder."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from yan_core.files import without_password

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion

SCHEME = "models:/"


class RegistryError(ValueError):
    """The registry cannot be reached, or does not hold what was asked for; its address without a password."""

    def __init__(self, message: str) -> None:
        super().__init__(without_password(message))


class RegistryAway(RegistryError):
    """The registry cannot be read now."""


@dataclass(frozen=True)
class Found:
    """A model to serve.

    Attributes:
        folder: Its local folder.
        name: What answers call it: the registered name and version, or the run's name.
    """

    folder: Path
    name: str


def is_registered(model: str) -> bool:
    """Whether a model is named by a registry address rather than by a folder."""
    return model.startswith(SCHEME)


def registry_uri(tracking_uri: str) -> str:
    """Address of the registry: the one given, else MLFLOW_TRACKING_URI; a SQLite file by its absolute path.

    Raises:
        RegistryError: If neither is there.
        RegistryAway: If the SQLite file is not there (MLflow would make an empty one).
    """
    uri = tracking_uri or os.environ.get("MLFLOW_TRACKING_URI", "")
    if not uri:
        raise RegistryError(
            "tracking_uri is empty and MLFLOW_TRACKING_URI is not set: name the registry (yan serve --tracking-uri), "
            "such as sqlite:///runs/mlflow.db or http://host:5000"
        )
    if uri.startswith("sqlite:///"):
        file = Path(uri.removeprefix("sqlite:///")).resolve()
        if not file.is_file():
            raise RegistryAway(f"tracking_uri={uri}: there is no file {file}")
        return f"sqlite:///{file}"
    return uri


def find_version(model: str, tracking_uri: str = "") -> ModelVersion:
    """Look a registered model up, without fetching it.

    Args:
        model: `models:/name@alias` or `models:/name/version`.
        tracking_uri: The registry; empty: MLFLOW_TRACKING_URI.

    Raises:
        RegistryError: If the address is malformed, or the name, alias or version is not in it; then it lists what is.
        RegistryAway: If the registry cannot be read.
    """
    name, alias, version = _parse(model)
    uri = registry_uri(tracking_uri)
    # MLflow's own default is seven retries with growing pauses: minutes of silence.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
    try:
        from mlflow import MlflowClient
        from mlflow.exceptions import MlflowException
    except ImportError as error:
        raise RegistryError(
            f"{model}: mlflow is not installed; in the folder of YAN's pyproject.toml: pip install -e '.[pipelines]'"
        ) from error
    client = MlflowClient(uri, uri)  # a registry set globally would win over the first alone
    try:
        try:
            aliases = dict(client.get_registered_model(name).aliases)
        except MlflowException as error:
            if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
                raise
            names = [m.name for m in client.search_registered_models()]
            message = f"{model}: the registry {uri} has no model {name!r}; it has {_listed(names)}"
            raise RegistryError(message) from error
        if alias and alias not in aliases:
            raise RegistryError(f"{model}: model {name!r} has no alias {alias!r}; it has {_listed(aliases)}")
        versions = {str(v.version): v for v in client.search_model_versions(f"name='{name}'")}
    except (MlflowException, OSError) as error:
        reason = str(error).splitlines()[0][:300]
        raise RegistryAway(
            f"the registry {uri} cannot be read ({reason}); is it running and the address right?"
        ) from error
    version = str(aliases[alias]) if alias else version
    if version not in versions:
        raise RegistryError(f"{model}: model {name!r} has no version {version}; it has {_listed(versions)}")
    return versions[version]


def version_name(version: ModelVersion) -> str:
    """What answers call a registered version."""
    return f"{version.name}/{version.version}"


def folder_name(folder: str) -> str:
    """What answers call a model of a folder: `yan run` leaves every model in runs/<name>/model."""
    absolute = Path(folder).absolute()
    return absolute.parent.name if absolute.name == "model" else absolute.name


@contextmanager
def resolve(model: str, tracking_uri: str = "") -> Iterator[Found]:
    """A local folder for a model, for as long as the block runs: that of a registered one is a copy.

    Args:
        model: A folder, or as for `find_version`.
        tracking_uri: The registry; empty: MLFLOW_TRACKING_URI.

    Raises:
        RegistryError: As `find_version`, and if the registered model holds no YAN model folder. A plain folder is not
            looked into.
        RegistryAway: As `find_version`, and if its files cannot be fetched.
    """
    if not is_registered(model):
        yield Found(Path(model), folder_name(model))
        return
    version = find_version(model, tracking_uri)
    import mlflow
    from mlflow.artifacts import download_artifacts
    from mlflow.exceptions import MlflowException

    uri = registry_uri(tracking_uri)
    name = version_name(version)
    # Globally: MLflow 3.17 asks the global registry for a part of it whatever download_artifacts is told.
    mlflow.set_tracking_uri(uri)
    mlflow.set_registry_uri(uri)
    with tempfile.TemporaryDirectory(prefix="yan-model-", ignore_cleanup_errors=True) as copy:
        try:
            # By number, so that an alias moved meanwhile cannot make the name a lie.
            download_artifacts(f"{SCHEME}{name}", dst_path=copy)
        except (MlflowException, OSError) as error:
            reason = str(error).splitlines()[0][:300]
            raise RegistryAway(
                f"{SCHEME}{name} is registered at {uri}, but its files cannot be fetched: {reason}"
            ) from error
        for config in sorted(Path(copy).rglob("config.json")):
            if "format_version" in json.loads(config.read_text(encoding="utf-8")):
                yield Found(config.parent, name)
                return
        raise RegistryError(f"{SCHEME}{name} holds no YAN model: no config.json with a format_version")


def _parse(model: str) -> tuple[str, str, str]:
    """Name, alias and version of a registry address; alias or version is empty."""
    rest = model.removeprefix(SCHEME)
    name, _, alias = rest.partition("@")
    if alias:
        version = ""
    else:
        name, _, version = rest.rpartition("/")
    if not name or not (alias or version.isdigit()):
        raise RegistryError(f"{model!r} must be models:/name@alias or models:/name/version")
    return name, alias, version


def _listed(names: object) -> str:
    return ", ".join(sorted(map(str, names))) or "none"  # type: ignore[call-overload]

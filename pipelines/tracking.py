"""MLflow: one run for a training however often it restarts, metrics by step, pictures, registered models."""

from __future__ import annotations

import json
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import matplotlib
import mlflow
from matplotlib.figure import Figure
from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param
from mlflow.tracking import MlflowClient
from sqlalchemy.exc import SQLAlchemyError  # comes with mlflow, which lets it through

from pipelines.folders import own_store
from pipelines.listing import reason_of
from pipelines.metrics_buffer import Value
from yan_core.config import RunConfig
from yan_core.files import without_password

matplotlib.use("Agg")


def tracking_uri(config: RunConfig) -> str:
    """Where this run is tracked: tracking.uri, else MLFLOW_TRACKING_URI, else SQLite in the runs folder."""
    return config.tracking.uri or os.environ.get("MLFLOW_TRACKING_URI") or own_store(config.runs_dir)


def _client(uri: str) -> MlflowClient:
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    os.environ.setdefault("MLFLOW_DISABLE_SCHEMA_DETAILS", "true")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
    for name in ("mlflow", "alembic", "urllib3.connectionpool"):
        logging.getLogger(name).setLevel(logging.ERROR)
    return MlflowClient(tracking_uri=uri, registry_uri=uri)


@contextmanager
def mlflow_at(uri: str) -> Iterator[None]:
    """Point MLflow's globals at a store for a while, since not all of it can be told otherwise.

    `mlflow.set_tracking_uri` sets MLFLOW_TRACKING_URI too, which a later run in this process would follow.
    """
    name = "MLFLOW_TRACKING_URI"
    before = os.environ.get(name)
    mlflow.set_tracking_uri(uri)
    mlflow.set_registry_uri(uri)
    try:
        yield
    finally:
        mlflow.set_tracking_uri(None)  # type: ignore[arg-type]  # None: not set
        mlflow.set_registry_uri(None)  # type: ignore[arg-type]
        os.environ.pop(name, None)
        if before is not None:
            os.environ[name] = before


STORE_ERRORS = (mlflow.MlflowException, SQLAlchemyError, OSError)
"""What a store that does not answer raises."""


REFUSALS = (
    "BAD_REQUEST",
    "INVALID_PARAMETER_VALUE",
    "INVALID_STATE",
    "PERMISSION_DENIED",
    "RESOURCE_ALREADY_EXISTS",
    "RESOURCE_DOES_NOT_EXIST",
)
"""MLflow's codes of what it will not do however often it is asked."""

T = TypeVar("T")


class TrackingError(ValueError):
    """The tracking store cannot be used; its address without a password."""

    def __init__(self, message: str) -> None:
        super().__init__(without_password(message))


def is_refusal(error: BaseException) -> bool:
    """Whether a store answers, and will not do what it was asked."""
    return isinstance(error, mlflow.MlflowException) and error.error_code in REFUSALS


def patiently(do: Callable[[], T], for_s: float = 30.0, pause_s: float = 3.0) -> T:
    """Ask a store, again for a while where it does not answer.

    Raises:
        MlflowException, SQLAlchemyError, OSError: What it raised last, or refused with.
    """
    deadline = time.monotonic() + for_s
    while True:
        try:
            return do()
        except STORE_ERRORS as error:
            if is_refusal(error) or time.monotonic() > deadline:
                raise
            time.sleep(pause_s)


def check_tracking(config: RunConfig) -> None:
    """Ask the tracking store for an answer, before anything long begins.

    Raises:
        TrackingError: If it gives none.
    """
    uri = tracking_uri(config)
    try:
        with _first_use(uri):
            _client(uri).search_experiments(max_results=1)
    except (*STORE_ERRORS, ImportError) as error:  # ImportError: no database driver
        raise TrackingError(
            f"MLflow at {without_password(uri)} does not answer ({reason_of(error)}): set --tracking.uri or "
            "MLFLOW_TRACKING_URI to a server that is up or to sqlite:///some/file.db"
        ) from error


@contextmanager
def _first_use(uri: str) -> Iterator[None]:
    """One process at a time makes the tables of a new SQLite file: two that begin at once would trip each other."""
    file = Path(uri.removeprefix("sqlite:///"))
    if not uri.startswith("sqlite:///"):
        yield
        return
    import fcntl

    file.parent.mkdir(parents=True, exist_ok=True)
    with file.with_name(f".{file.name}.lock").open("a") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


@dataclass(frozen=True)
class RunSummary:
    """A run as a list shows it."""

    name: str
    status: str
    start_ms: int
    end_ms: int | None
    experiment: str
    run_id: str


def latest_runs(uri: str, count: int) -> list[RunSummary]:
    """The runs that were begun last, of all experiments, the newest first.

    Raises:
        TrackingError: If the store does not answer, or its file is not there; none is made.
    """
    if uri.startswith("sqlite:///") and not Path(uri.removeprefix("sqlite:///")).is_file():
        raise TrackingError(f"MLflow: there is no file {uri.removeprefix('sqlite:///')}")
    try:
        client = _client(uri)
        names = {experiment.experiment_id: experiment.name for experiment in client.search_experiments()}
        runs = client.search_runs(list(names), max_results=count, order_by=["attributes.start_time DESC"])
    except (*STORE_ERRORS, ImportError) as error:
        raise TrackingError(f"MLflow at {uri} does not answer ({reason_of(error)})") from error
    return [
        RunSummary(
            run.info.run_name or "-",
            run.info.status,
            run.info.start_time,
            run.info.end_time,
            names[run.info.experiment_id],
            run.info.run_id,
        )
        for run in runs
    ]


class Tracker:
    """Writes to one MLflow run; safe to make again in another process from its `uri` and `run_id`."""

    def __init__(self, uri: str, run_id: str) -> None:
        self.uri, self.run_id = uri, run_id
        self.client = _client(uri)

    @classmethod
    def start(cls, config: RunConfig, run_id: str | None) -> Tracker:
        """Continue the run of that id, or begin a new one.

        Raises:
            MlflowException, SQLAlchemyError, OSError: If the store does not answer.
        """
        uri = tracking_uri(config)
        client = _client(uri)
        if run_id is not None:
            try:
                client.update_run(run_id, status="RUNNING")
                return cls(uri, run_id)
            except mlflow.MlflowException as error:
                if not is_refusal(error):
                    raise
                logging.getLogger(__name__).warning("MLflow run %s is gone from %s", run_id, without_password(uri))
        name = config.tracking.experiment
        experiment = client.get_experiment_by_name(name)
        if experiment is None:
            local = uri.startswith("sqlite:")
            artifacts = str(Path(config.runs_dir).resolve() / "mlartifacts") if local else None
            experiment_id = client.create_experiment(name, artifact_location=artifacts)
        else:
            experiment_id = experiment.experiment_id
        return cls(uri, client.create_run(experiment_id, run_name=config.name).info.run_id)

    @classmethod
    def child(cls, uri: str, parent: str, name: str) -> Tracker:
        """A run below another one."""
        client = _client(uri)
        experiment_id = client.get_run(parent).info.experiment_id
        run = client.create_run(experiment_id, run_name=name, tags={"mlflow.parentRunId": parent})
        return cls(uri, run.info.run_id)

    def end_children(self) -> None:
        """Mark runs below this one that are still said to be running as killed."""
        experiment_id = self.client.get_run(self.run_id).info.experiment_id
        below = f"tags.`mlflow.parentRunId` = '{self.run_id}' and attributes.status = 'RUNNING'"
        for run in self.client.search_runs([experiment_id], below):
            self.client.set_terminated(run.info.run_id, "KILLED")

    def system_metrics(self) -> Any:
        """A monitor of this machine's load; call `.finish()` at the end."""
        from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

        monitor = SystemMetricsMonitor(self.run_id, resume_logging=True, tracking_uri=self.uri)
        monitor.start()
        return monitor

    def params(self, values: Mapping[str, Any]) -> None:
        """Record parameters that are not recorded yet."""
        known = self.client.get_run(self.run_id).data.params
        new = [Param(name, str(value)[:500]) for name, value in values.items() if name not in known]
        for start in range(0, len(new), 100):  # the most that MLflow takes at once
            self.client.log_batch(self.run_id, params=new[start : start + 100])

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        """Record metrics of a step, in one transaction: rank 0 calls this while the other workers wait."""
        now = int(time.time() * 1000)
        self.client.log_batch(self.run_id, metrics=[Metric(k, float(v), now, step) for k, v in values.items()])

    def send(self, values: Sequence[Value]) -> None:
        """Record values of metrics, each with its time and step."""
        self.client.log_batch(self.run_id, metrics=[Metric(*value) for value in values])

    def dataset(self, name: str, digest: str, source: str, profile: Mapping[str, Any]) -> None:
        """Record the data of a run as MLflow's page shows them.

        Args:
            name: The data set's name.
            digest: Short hash of what was prepared.
            source: Where the rows come from.
            profile: Counts.
        """
        text = json.dumps({"uri": source})
        used = Dataset(name, digest, "local", text, profile=json.dumps(profile))
        self.client.log_inputs(self.run_id, [DatasetInput(used, [InputTag("mlflow.data.context", "training")])])

    def tag(self, name: str, value: str) -> None:
        """Set a tag."""
        self.client.set_tag(self.run_id, name, value)

    def text(self, text: str, file: str) -> None:
        """Store a text as a file."""
        self.client.log_text(self.run_id, text, file)

    def file(self, path: Path) -> None:
        """Store a file under its own name."""
        self.client.log_artifact(self.run_id, str(path))

    def table(self, rows: Sequence[Mapping[str, Any]], file: str) -> None:
        """Store rows as a table that MLflow's page shows."""
        columns = {name: [row[name] for row in rows] for name in rows[0]}
        self.client.log_table(self.run_id, columns, file)

    def quality_picture(self, quality: Mapping[int, float], metric: str, title: str) -> None:
        """Store the picture of quality against solver steps."""
        figure = Figure(figsize=(5, 3.2), layout="constrained")
        axes = figure.subplots()
        axes.plot(list(quality), list(quality.values()), marker="o")
        axes.set(xlabel="solver steps = forward passes", ylabel=metric.replace("_", " "), title=title, ylim=(0, 1.02))
        axes.set_xticks(list(quality))
        axes.grid(alpha=0.3)
        self.figure(figure, "quality_by_steps.png")

    def figure(self, figure: Figure, file: str) -> None:
        """Store a picture."""
        self.client.log_figure(self.run_id, figure, file)

    def register(self, model_folder: Path, name: str, alias: str) -> str:
        """Log the model as a pyfunc from code and safetensors, register it and point the alias at it.

        Returns:
            The version.
        """
        import yan_core

        with tempfile.TemporaryDirectory() as scratch, mlflow_at(self.uri):
            copy = Path(scratch) / "model"
            shutil.copytree(model_folder, copy)
            with mlflow.start_run(self.run_id):
                info = mlflow.pyfunc.log_model(
                    name="model",
                    python_model=str(Path(__file__).with_name("registered_model.py")),
                    artifacts={"model": str(copy)},
                    code_paths=[str(Path(yan_core.__file__).parent)],
                    pip_requirements=["torch", "tokenizers", "safetensors", "pyyaml", "numpy"],
                )
        if not self.client.search_registered_models(f"name = '{name}'"):
            self.client.create_registered_model(name)
        stored = self.client.get_logged_model(info.model_id).artifact_location
        version = self.client.create_model_version(name, stored, self.run_id, model_id=info.model_id).version
        self.client.set_registered_model_alias(name, alias, version)
        return str(version)

    def finish(self, status: str) -> None:
        """Mark the run `FINISHED`, `FAILED` or `KILLED`."""
        self.client.set_terminated(self.run_id, status)

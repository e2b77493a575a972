"""What the runbook says of MLflow's database (a dump, deleted runs that go for good), and whom its server answers."""

import os
import re
import shutil
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

import mlflow
import pytest
import yaml

from pipelines.tracking import Tracker, mlflow_at
from tests.clusters.checks import CLUSTERS, ROOT
from tests.clusters.conftest import run_shell
from tests.clusters.test_migration import mlflow_server
from yan_core.config import RunConfig, TrackingConfig

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(300)]


def runbook(command: str, database: str, url: str = "") -> str:
    """The runbook's command that begins so, for this database and server."""
    (found,) = re.findall(f"`({command} [^`]+)`", (ROOT / "docs/OPERATIONS.md").read_text())
    return found.replace("mlflow:PASSWORD@HOST:5432/mlflow", database).replace("http://127.0.0.1:5000", url)


def shell(command: str, folder: Path) -> None:
    run_shell(
        f"cd {folder} && {command}", os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}, 200
    )


def record(name: str, url: str, home: Path) -> Tracker:
    """A finished run with a value and a file."""
    run = Tracker.start(RunConfig(name=name, runs_dir=str(home), tracking=TrackingConfig(uri=url)), None)
    run.metrics({"train/loss": 0.5}, 1)
    run.text("words", "note.txt")
    run.finish("FINISHED")
    return run


def test_a_dump_brings_back_what_was_there(postgresql: str, tmp_path: Path):
    if shutil.which("pg_dump") is None:
        pytest.skip("PostgreSQL's tools are not installed: apt-get install postgresql-client")
    database, files = f"postgresql://{postgresql}", str(tmp_path / "files")
    subprocess.run([sys.executable, "-m", "mlflow", "db", "upgrade", database], check=True, timeout=120)
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    with mlflow_server(database, files, tmp_path / "log") as url, mlflow_at(url):
        before = record("before", url, tmp_path)
        before.register(model, "yan-world", "champion")
        shell(runbook("pg_dump", postgresql), tmp_path)
        after = record("after", url, tmp_path)
        mlflow.MlflowClient(url).delete_registered_model("yan-world")
    shell(runbook("pg_restore", postgresql), tmp_path)
    with mlflow_server(database, files, tmp_path / "log") as url, mlflow_at(url):
        client = mlflow.MlflowClient(url)
        assert client.get_run(before.run_id).data.metrics == {"train/loss": 0.5}
        assert client.get_model_version_by_alias("yan-world", "champion").run_id == before.run_id
        with pytest.raises(mlflow.MlflowException, match="not found"):
            client.get_run(after.run_id)
        again = record("again", url, tmp_path)  # ids of new rows do not meet old ones
        again.register(model, "yan-world", "champion")
        assert str(client.get_model_version_by_alias("yan-world", "champion").version) == "2"


def test_server_answers_to_the_names_that_it_is_told_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """MLFLOW_HOSTS of compose.yaml; the container's own health check is answered by any name."""
    compose = yaml.safe_load((CLUSTERS / "mlflow/compose.yaml").read_text())
    ((variable, hosts),) = [
        (name, value) for name, value in compose["services"]["server"]["environment"].items() if "MLFLOW_HOSTS" in value
    ]
    monkeypatch.setenv(variable, re.sub(r"\$\{MLFLOW_HOSTS:-[^}]*\}", "mlflow.team:5000,10.0.0.5:5000", hosts))

    def status(url: str, path: str, host: str) -> int:
        request = urllib.request.Request(f"{url}{path}", headers={"Host": host})
        try:
            return urllib.request.urlopen(request, timeout=60).status
        except urllib.error.HTTPError as error:
            return error.code

    with mlflow_server(f"sqlite:///{tmp_path}/runs.db", str(tmp_path / "files"), tmp_path / "log") as url:
        asked = "/api/2.0/mlflow/experiments/get?experiment_id=0"
        for host in ("mlflow.team:5000", "10.0.0.5:5000"):
            assert status(url, asked, host) == 200
        assert status(url, asked, "127.0.0.1:5000") == status(url, asked, "elsewhere.com") == 403
        assert status(url, "/health", "127.0.0.1:5000") == 200


def test_deleted_runs_go_for_good_with_their_files_and_no_others(postgresql: str, tmp_path: Path):
    database, files = f"postgresql://{postgresql}", tmp_path / "files"
    subprocess.run([sys.executable, "-m", "mlflow", "db", "upgrade", database], check=True, timeout=120)
    with mlflow_server(database, str(files), tmp_path / "log") as url, mlflow_at(url):
        kept, gone = record("kept", url, tmp_path), record("gone", url, tmp_path)
        client = mlflow.MlflowClient(url)
        client.delete_run(gone.run_id)
        assert client.get_run(gone.run_id).info.lifecycle_stage == "deleted"
        shell(runbook("mlflow gc", postgresql, url), tmp_path)
        with pytest.raises(mlflow.MlflowException, match="not found"):
            client.get_run(gone.run_id)
        assert client.get_run(kept.run_id).info.lifecycle_stage == "active"
    left = {path.parts[-3] for path in files.rglob("note.txt")}
    assert left == {kept.run_id}

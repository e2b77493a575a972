"""From the SQLite file of a laptop to the PostgreSQL and the bucket of a team, with nothing lost."""

import os
import re
import shutil
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import boto3
import mlflow
import pytest

from pipelines.tracking import Tracker, mlflow_at
from tests.clusters.checks import CLUSTERS, ROOT, documents
from tests.clusters.conftest import free_port, run_shell
from yan_core.config import RunConfig

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(300)]


COPY_FILES = "aws s3 sync runs/mlartifacts s3://BUCKET/artifacts"


def runbook(database: str) -> str:
    """The runbook's lines for this database; for the last, boto3 stands in, as Amazon's own client is not here."""
    text = (ROOT / "docs/OPERATIONS.md").read_text()
    (block,) = re.findall(r"^From the SQLite file of a laptop.*?```bash\n(.*?)```", text, flags=re.M | re.S)
    *lines, last = block.strip().splitlines()
    assert last == COPY_FILES
    return "\n".join(lines).replace("mlflow:PASSWORD@HOST:5432/mlflow", database)


@contextmanager
def mlflow_server(database: str, files: str, log: Path) -> Iterator[str]:
    """URL of an MLflow server, while the block runs."""
    port = free_port()
    command = [sys.executable, "-m", "mlflow", "server", "--port", str(port), "--workers", "1"]
    variables = {"MLFLOW_BACKEND_STORE_URI": database, "MLFLOW_ARTIFACTS_DESTINATION": files}
    url = f"http://127.0.0.1:{port}"
    with log.open("w") as out:
        server = subprocess.Popen(command, env=os.environ | variables, stdout=out, stderr=out)
        try:
            deadline = time.monotonic() + 120
            while not _answers(f"{url}/health"):
                assert server.poll() is None and time.monotonic() < deadline, log.read_text()
                time.sleep(0.5)
            yield url
        finally:
            server.terminate()
            server.wait(120)


def _answers(url: str) -> bool:
    try:
        return urllib.request.urlopen(url, timeout=5).status == 200
    except (urllib.error.URLError, OSError):
        return False


def test_pods_that_start_at_once_make_the_schema_one_after_the_other(postgresql: str):
    (deployment,) = (d for d in documents(CLUSTERS / "mlflow/kubernetes.yaml") if d["kind"] == "Deployment")
    (schema,) = deployment["spec"]["template"]["spec"]["initContainers"]
    python, *arguments = schema["command"]
    environment = os.environ | {"MLFLOW_BACKEND_STORE_URI": f"postgresql://{postgresql}"}
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
    assert python == "python"
    pods = [
        subprocess.Popen([sys.executable, *arguments], env=environment, stderr=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    said = [pod.communicate(timeout=200)[1] for pod in pods]
    assert [pod.returncode for pod in pods] == [0, 0, 0], said
    client = mlflow.MlflowClient(f"postgresql://{postgresql}")
    assert client.create_experiment("made")


def test_runs_files_and_registry_are_the_same_in_postgresql(postgresql: str, bucket: str, tmp_path: Path):
    if shutil.which("pgloader") is None:
        pytest.skip("pgloader is not installed: apt-get install pgloader")
    runs = tmp_path / "runs"
    runs.mkdir()
    before = Tracker.start(RunConfig(name="world", runs_dir=str(runs)), None)
    before.params({"seed": 3})
    for step in range(20):
        before.metrics({"train/loss": 1 / (step + 1)}, step)
    before.text("words", "note.txt")
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    before.register(model, "yan-world", "champion")
    before.finish("FINISHED")

    (tmp_path / "clusters").symlink_to(CLUSTERS)
    laptops = (runs / "mlflow.db").read_bytes()
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    run_shell(f"cd {tmp_path}\n{runbook(postgresql)}", environment, 250)
    assert (runs / "mlflow.before.db").read_bytes() == laptops
    s3, name = boto3.client("s3"), bucket.removeprefix("s3://")
    for file in (file for file in (runs / "mlartifacts").rglob("*") if file.is_file()):
        s3.upload_file(str(file), name, f"artifacts/{file.relative_to(runs / 'mlartifacts')}")
    shutil.rmtree(runs)

    with mlflow_server(f"postgresql://{postgresql}", f"{bucket}/artifacts", tmp_path / "log") as url, mlflow_at(url):
        client = mlflow.MlflowClient(url)
        run = client.get_run(before.run_id)
        assert run.info.status == "FINISHED" and run.data.params == {"seed": "3"}
        history = client.get_metric_history(before.run_id, "train/loss")
        assert [(m.step, m.value) for m in history] == [(step, 1 / (step + 1)) for step in range(20)]
        assert mlflow.artifacts.load_text(f"{run.info.artifact_uri}/note.txt") == "words"
        assert client.get_model_version_by_alias("yan-world", "champion").run_id == before.run_id
        fetched = Path(
            mlflow.artifacts.download_artifacts("models:/yan-world@champion", dst_path=str(tmp_path / "got"))
        )
        assert [file.read_text() for file in fetched.rglob("config.json")] == ["{}"]
        # Life goes on: ids of new rows do not meet old ones, and new files go to the bucket.
        after = Tracker(url, client.create_run(run.info.experiment_id, run_name="next").info.run_id)
        after.text("more", "note.txt")
        after.register(model, "yan-world", "champion")
        assert str(client.get_model_version_by_alias("yan-world", "champion").version) == "2"
    keys = [item["Key"] for item in s3.list_objects_v2(Bucket=name)["Contents"]]
    assert f"artifacts/{after.run_id}/artifacts/note.txt" in keys

"""The MLflow server of a team."""

import copy
import json
import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.clusters.checks import CLUSTERS, compose, documents, pgloader, written

COMPOSE = yaml.safe_load((CLUSTERS / "mlflow/compose.yaml").read_text())
FILES = sorted(CLUSTERS.glob("*/compose.yaml"))


@pytest.mark.parametrize(
    ("keys", "value", "message"),
    [
        (["services", "server", "depend_on"], [], "depend_on"),
        (["services", "server", "ports"], "5000:5000", "is not of type 'array'"),
        (["service"], {}, "service"),
        (["services", "database", "healthcheck", "retries"], [], "retries"),
    ],
)
def test_checker_finds_wrong_fields(keys: list[str], value: Any, message: str):
    config = copy.deepcopy(COMPOSE)
    place: Any = config
    for key in keys[:-1]:
        place = place[key]
    place[keys[-1]] = value
    assert any(message in error for error in compose(written(config)))


def test_checker_finds_columns_that_mlflow_does_not_have(tmp_path):
    text = (CLUSTERS / "mlflow/sqlite_to_postgresql.load").read_text()
    changed = tmp_path / "changed.load"
    changed.write_text(text.replace("set artifact_uri", "set artefact_uri"))
    assert pgloader(changed) == ["MLflow has no column runs.artefact_uri"]


@pytest.mark.parametrize("file", FILES, ids=lambda f: f.parent.name)
def test_services_are_pinned_cannot_write_to_their_images_and_listen_here_alone(file):
    for name, service in yaml.safe_load(file.read_text())["services"].items():
        assert re.search(r":v?\d+\.\d+", service["image"]), name
        assert service["read_only"] and service["cap_drop"] == ["ALL"] and "mem_limit" in service
        assert all(re.match(r"(\$\{\w+:-)?127\.0\.0\.1\}?:", port) for port in service.get("ports", []))
        if service.get("network_mode") == "host":  # nothing but its own setting keeps it here
            said = [*service.get("command", []), *(f"{k}={v}" for k, v in service.get("environment", {}).items())]
            assert [v for v in said if re.search(r"(listen-address|HTTP_ADDR)=127\.0\.0\.1(:\d+)?$", v)], name


@pytest.mark.parametrize("file", FILES, ids=lambda f: f.parent.name)
def test_secrets_come_from_the_environment_and_must_be_set(file):
    for service in yaml.safe_load(file.read_text())["services"].values():
        for name, value in service.get("environment", {}).items():
            if re.search("PASSWORD|SECRET|ACCESS_KEY", name) or "://mlflow:" in str(value):
                assert re.search(r"\$\{\w+:\?", value), name


@pytest.mark.parametrize("file", FILES, ids=lambda f: f.parent.name)
def test_no_file_is_to_be_written_into_a_root_that_is_read_only(file):
    """Compose writes a config or secret of `content` or `environment` there, and the container does not start."""
    config = yaml.safe_load(file.read_text())
    kinds = [kind for part in ("configs", "secrets") for kind in config.get(part, {}).values()]
    assert not [kind for kind in kinds if "content" in kind or "environment" in kind]


def test_the_account_of_the_file_store_is_what_the_environment_says(tmp_path: Path):
    """Its script is run with a stand-in of `weed`, which shows the file that it is told of."""
    service = COMPOSE["services"]["files"]
    (script,) = service["command"]
    weed = tmp_path / "weed"
    weed.write_text(
        f'#!/bin/sh\nset -e\necho "$@" > {tmp_path}/told\nls -l {tmp_path}/s3.json\ncat {tmp_path}/s3.json\n'
    )
    weed.chmod(0o755)
    done = subprocess.run(
        [*service["entrypoint"], script.replace("$$", "$").replace("/tmp/", f"{tmp_path}/")],
        env={"PATH": f"{tmp_path}:/usr/bin:/bin", "S3_ACCESS_KEY": "ab12", "S3_SECRET_KEY": "cd34"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    mode, _, config = done.stdout.partition("\n")
    (account,) = json.loads(config)["identities"]
    assert mode.startswith("-rw-------") and account["credentials"] == [{"accessKey": "ab12", "secretKey": "cd34"}]
    assert f"-s3.config={tmp_path}/s3.json" in (tmp_path / "told").read_text()
    assert "/tmp" in service["tmpfs"] and {"S3_ACCESS_KEY", "S3_SECRET_KEY"} == set(service["environment"])


def commands() -> list[list[str]]:
    """The `mlflow server` commands of all files."""
    (deployment,) = (d for d in documents(CLUSTERS / "mlflow/kubernetes.yaml") if d["kind"] == "Deployment")
    (container,) = deployment["spec"]["template"]["spec"]["containers"]
    dockerfile = (CLUSTERS / "docker/Dockerfile").read_text()
    return [
        COMPOSE["services"]["server"]["command"],
        shlex.split(container["args"][0].removeprefix("exec ")),
        re.findall(r'"([^"]*)"', re.findall(r'^CMD (\["mlflow".*\])$', dockerfile, flags=re.M)[0]),
    ]


@pytest.mark.parametrize("command", commands(), ids=["compose", "kubernetes", "image"])
def test_mlflow_takes_the_options(command: list[str]):
    from mlflow.cli import server

    assert command[:2] == ["mlflow", "server"]
    assert server.make_context("server", command[2:]).params["port"] == 5000


@pytest.mark.parametrize("variable", ["MLFLOW_BACKEND_STORE_URI", "MLFLOW_ARTIFACTS_DESTINATION"])
def test_mlflow_reads_the_variables(variable: str):
    from mlflow.cli import server

    assert variable in COMPOSE["services"]["server"]["environment"]
    assert variable in [name for option in server.params for name in [option.envvar] if isinstance(name, str)]


def test_schema_command_makes_a_new_database(tmp_path):
    import mlflow
    from click.testing import CliRunner
    from mlflow.cli import cli

    uri = f"sqlite:///{tmp_path}/new.db"
    assert CliRunner().invoke(cli, ["db", "upgrade", uri]).exit_code == 0
    assert [e.name for e in mlflow.MlflowClient(uri).search_experiments()] in ([], ["Default"])

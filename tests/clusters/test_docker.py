"""The Dockerfile, and what goes into images and uploads."""

import os
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from serve import ingress
from tests.clusters.checks import CLUSTERS, ROOT, dockerfile

TEXT = (CLUSTERS / "docker/Dockerfile").read_text()
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
STAGES = {
    match[2]: body
    for part in re.split(r"^FROM ", TEXT, flags=re.M)[1:]
    for match, body in [(re.match(r"(\S+) AS (\S+)\n", part), part)]
    if match
}


@pytest.mark.parametrize(
    ("line", "rule"),
    [
        ("FROM python:latest AS last\nUSER 1000\n", "DL3007"),
        ("FROM python:3.11 AS last\nRUN pip install torch\n", "DL3013"),
        ("FROM python:3.11 AS last\nUSER root\n", "DL3002"),
        ("FROM python:3.11 AS last\nRUNN true\n", "/dev/stdin:"),
    ],
)
def test_checker_finds_wrong_lines(line: str, rule: str, tmp_path: Path):
    file = tmp_path / "Dockerfile"
    file.write_text(f"{TEXT}\n{line}")
    assert any(rule in error for error in dockerfile(file))


@pytest.mark.parametrize("target", ["cpu", "cuda", "mlflow"])
def test_image_runs_as_a_user_without_rights(target: str):
    assert re.findall(r"^USER (\S+)", STAGES[target], flags=re.M)[-1:] == ["1000:1000"]


def test_images_hold_no_secret_and_no_moving_version():
    assert not re.search(r"(?i)token=|password|secret", TEXT)
    assert re.search(r"^ARG PYTHON=3\.11\.\d+-slim-\w+$", TEXT, flags=re.M)
    assert all("-c constraints.txt" in line for line in re.findall(r".*pip install.*", TEXT))
    assert "torch==2.13.0" in PROJECT["project"]["dependencies"] and "-c constraints.txt torch==2.13.0 " in TEXT


def test_nodes_serve_behind_haproxy_as_a_laptop_does():
    node = STAGES["node"].replace("\\\n", "")
    settings = dict(word.split("=", 1) for line in re.findall(r"^ENV (.*)", node, re.M) for word in shlex.split(line))
    assert (settings[ingress.ENABLED], settings["RAY_SERVE_HAPROXY_RETRY_ON"]) == ("1", ingress.RETRIED)
    assert settings[ingress.SEPARATE_LOOP] == "0" and settings["YAN_HAPROXY_LOOPBACK"] == "1"
    copied = ROOT / Path(settings["RAY_SERVE_HAPROXY_BINARY_PATH"]).relative_to("/opt/yan")  # `COPY . /opt/yan`
    assert copied == ingress.SCRIPT and os.access(copied, os.X_OK)
    assert TEXT.count("FROM node AS") == 2  # cpu and cuda


def test_line_that_lists_the_requirements_lists_them_all(tmp_path: Path):
    (line,) = re.findall(r'^RUN python -c "(.*?)" > requirements.txt$', TEXT, flags=re.M | re.S)
    code = line.replace("\\\n", "\n")  # as a shell joins the lines
    code = re.sub(r"\n\s*", "", code)
    (tmp_path / "pyproject.toml").write_text((ROOT / "pyproject.toml").read_text())
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    project = PROJECT["project"]
    extras = (project["optional-dependencies"][name] for name in ("pipelines", "serve", "cluster"))
    assert done.stdout.split("\n")[:-1] == [*project["dependencies"], *(r for extra in extras for r in extra)]


def test_mlflow_image_takes_its_versions_from_the_constraints():
    (pattern,) = re.findall(r"grep -E '(.*?)'", TEXT)
    found = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if re.match(pattern, line)]
    assert [line.split("==")[0] for line in found] == ["boto3", "mlflow", "psycopg", "psycopg-binary"]


def test_image_context_is_the_code_and_its_versions():
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    assert lines[1] == "*"
    named = {line.removeprefix("!") for line in lines if line.startswith("!")}
    packages = {name.split(".")[0] for name in PROJECT["tool"]["setuptools"]["packages"]}
    assert packages | {"pyproject.toml", "constraints.txt"} <= named
    assert all((ROOT / name).exists() for name in named)


def test_job_upload_is_the_code_alone():
    from ray._private.runtime_env.packaging import _dir_travel

    paths: list[Path] = []
    _dir_travel(ROOT, [], paths.append, include_gitignore=True)
    found = [path.relative_to(ROOT).as_posix() for path in paths if path.is_file()]
    size = sum((ROOT / file).stat().st_size for file in found)
    assert {"yan_core/model.py", "pipelines/cli.py", "serve/app.py", "pipelines/configs/world.yaml"} <= set(found)
    assert not [file for file in found if file.split("/")[0] in ("tests", "docs", "clusters", ".git", "runs", ".venv")]
    assert size < 2 * 2**20


def test_a_login_shell_finds_what_the_image_installs(tmp_path: Path):
    """As `ray up` and `ray exec` run their commands; Debian's /etc/profile sets PATH, then reads profile.d."""
    (write,) = re.findall(r"^RUN (echo .* > /etc/profile.d/yan.sh)$", STAGES["base"], flags=re.M)
    file = tmp_path / "yan.sh"
    subprocess.run(["sh", "-c", write.replace("/etc/profile.d/yan.sh", str(file))], check=True)
    command = ["bash", "-c", f'PATH=/usr/local/bin:/usr/bin:/bin; . {file}; echo "$PATH"']
    path = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert path == "/opt/venv/bin:/usr/local/bin:/usr/bin:/bin\n"


def test_yan_is_typed_in_the_image_as_elsewhere(tmp_path: Path):
    """It runs the code of the folder that it is typed in, where there is some."""
    (write,) = re.findall(r"^RUN (printf .* > /usr/local/bin/yan) && chmod 755", STAGES["node"], flags=re.M)
    script = tmp_path / "yan"
    subprocess.run(["sh", "-c", write.replace("/usr/local/bin/yan", str(script))], check=True)
    (tmp_path / "pipelines").mkdir()
    (tmp_path / "pipelines/__init__.py").touch()
    (tmp_path / "pipelines/__main__.py").write_text("import sys; print(sys.argv[1:])")
    environment = {"PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin", "PYTHONPATH": str(ROOT)}
    command = ["sh", str(script), "train", "--name", "a b"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == "['train', '--name', 'a b']\n"


@pytest.mark.parametrize("target", ["cpu", "cuda"])
def test_the_image_knows_the_commit_of_its_code_and_of_no_other(target: str):
    """By a file beside the code: a variable would be told of whatever code a job brings."""
    assert re.search(r"ARG YAN_COMMIT=unknown\nRUN .*write_commit\(\)", STAGES[target])
    assert not re.search(r"ENV .*YAN_COMMIT", TEXT)

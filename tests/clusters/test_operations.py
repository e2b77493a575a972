"""The runbook names what is there."""

import os
import re
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest

from pipelines.arguments import parse_config
from pipelines.cli import COMMANDS
from tests.clusters.checks import CLUSTERS, ROOT, documents
from tests.clusters.machines import PROGRAMS

TEXT = (ROOT / "docs/OPERATIONS.md").read_text()
CODE = [*re.findall(r"```bash\n(.*?)```", TEXT, flags=re.S), *re.findall(r"`([^`\n]+)`", TEXT)]


@pytest.mark.parametrize("path", sorted(set(re.findall(r"(?:clusters|tests|pipelines)/[\w/]+\.\w+", TEXT))))
def test_file_is_there(path: str):
    assert (ROOT / path).is_file()


@pytest.mark.parametrize("name", sorted(set(re.findall(r"`(test_\w+\.py)`", TEXT))))
def test_test_that_is_named_by_its_file_alone_is_there(name: str):
    assert (ROOT / "tests/clusters" / name).is_file() or (ROOT / "tests/pipelines" / name).is_file()


def test_commands_of_ours_are_there():
    named = {word for code in CODE for word in re.findall(r"^yan (\w+)", code, flags=re.M)}
    assert {"submit", "jobs", "stop", "plan"} <= named <= set(COMMANDS)


def test_submit_takes_the_options():
    (line,) = re.findall(r"^yan submit (--address .*)$", TEXT, flags=re.M)
    words = shlex.split(line)
    assert words[0] == "--address"
    config = parse_config("submit", [word.replace("pipelines/", f"{ROOT}/pipelines/") for word in words[2:]])
    assert config.scaling.max_workers == 4


COMMANDS_OF_OTHERS = sorted(
    {
        line.split(" && ")[0] if "'" not in line else line
        for code in CODE
        for line in code.replace("\\\n", " ").splitlines()
        if re.match(r"(ray (up|down|exec|submit|dashboard|job)|serve (deploy|status)|mlflow (db \w+|gc)) ", line)
    }
)


@pytest.mark.parametrize("line", COMMANDS_OF_OTHERS)
def test_ray_and_mlflow_take_the_command(line: str):
    from mlflow.cli import cli as mlflow
    from ray.scripts.scripts import cli as ray
    from ray.serve.scripts import cli as serve

    program, *words = shlex.split(line)
    group: click.Command = {"mlflow": mlflow, "ray": ray, "serve": serve}[program]
    while isinstance(group, click.Group):
        group = group.commands[words.pop(0)]
    words = [str(ROOT / word) if word.startswith("clusters/") else word for word in words]
    unread = group.make_context(line, words, allow_extra_args=False).args
    assert unread == []


def test_enough_of_their_commands_are_read():
    found = {" ".join(line.split()[:2]) for line in COMMANDS_OF_OTHERS}
    assert found >= {"ray up", "ray down", "ray exec", "ray submit", "ray dashboard", "serve deploy", "serve status"}
    assert found >= {"mlflow db", "mlflow gc"}


@pytest.mark.parametrize(
    ("file", "given"),
    [
        ("clusters/monitoring/compose.yaml", re.findall(r"(\w+)=\S+ docker compose -f clusters/monitoring", TEXT)),
        ("clusters/mlflow/compose.yaml", re.findall(r"for name in ([\w ]+);", TEXT)[0].split()),
    ],
)
def test_containers_are_given_the_variables_that_they_must_have(file: str, given: list[str]):
    assert f"-f {file} up" in TEXT
    assert set(given) == set(re.findall(r"\$\{(\w+):\?", (ROOT / file).read_text()))


def test_every_file_of_clusters_is_in_it_or_named_by_one_that_is():
    named = TEXT + "".join(path.read_text() for path in (ROOT / "clusters").rglob("*") if path.is_file())
    for path in (path for path in (ROOT / "clusters").rglob("*") if path.is_file()):
        if "provisioning" not in path.parts:  # its folder is mounted as a whole
            assert path.name in named, path


@pytest.mark.parametrize("alert", re.findall(r"alert: (\w+)", (ROOT / "clusters/monitoring/rules.yml").read_text()))
def test_every_alert_says_what_to_look_at(alert: str):
    assert re.search(rf"^\| .*\b{alert}\b.* \|", TEXT, flags=re.M)


def blocks_from(word: str) -> str:
    """The page's one block of shell that begins so."""
    (block,) = re.findall(rf"```bash\n({re.escape(word)}.*?)```", TEXT, flags=re.S)
    return block


def typed(block: str, home: Path) -> str:
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", block],
        env=os.environ | {"HOME": str(home)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_token_is_for_its_owner_alone_and_where_ray_is_told(tmp_path: Path):
    block = blocks_from("install -d -m 700 ~/.yan/auth")
    told = typed(block + 'echo -n "$RAY_AUTH_MODE $RAY_AUTH_TOKEN_PATH"', tmp_path)
    token = tmp_path / ".yan/auth/auth_token"
    assert told == f"token {token}" and re.fullmatch(r"[0-9a-f]{64}", token.read_text())
    assert (token.stat().st_mode & 0o777, token.parent.stat().st_mode & 0o777) == (0o600, 0o700)


def test_mlflows_passwords_are_made_once_and_for_their_owner_alone(tmp_path: Path):
    first = blocks_from("test -e ~/.yan/mlflow.env").splitlines()[0]
    (tmp_path / ".yan").mkdir()
    typed(first, tmp_path)
    made = tmp_path / ".yan/mlflow.env"
    before = made.read_text()
    typed(first, tmp_path)
    assert made.read_text() == before and made.stat().st_mode & 0o777 == 0o600
    assert re.fullmatch(r"POSTGRES_PASSWORD=\w{48}\nS3_ACCESS_KEY=\w{48}\nS3_SECRET_KEY=\w{48}\n", before)


TABLES = re.findall(r"^\|[^\n]*\| stands behind it \|\n\|[-|]+\|\n((?:\|[^\n]*\n)+)", TEXT, flags=re.M)


PROGRAM = r"(?:ray|serve|yan) [\w-]+|pg_\w+|mlflow gc|for node in HEAD WORKER"
"""What a command of the page begins with."""


def run_by(name: str, command: str) -> bool:
    """Whether a test has a command's words in it, or reads the command itself off the page."""
    (file,) = [f for f in (ROOT / "tests").rglob(Path(name).name) if name in f.as_posix()]
    source = file.read_text()
    words = command.split()
    listed = re.search(rf'"{words[0]}",\s*"{words[-1]}"', source)  # as subprocess and `yan(...)` take them
    called = words[0] == "yan" and re.search(rf'\b(?:yan|main)\(\[?"{words[-1]}"', source)
    return bool(command in source or listed or called or (f"{words[-1]} " in source and "five_commands()" in source))


@pytest.mark.parametrize("row", [row for table in TABLES for row in table.splitlines()])
def test_row_names_a_test_that_runs_its_command_or_wants_a_cloud(row: str):
    what, _, behind = row.strip("|").replace("\\|", "").rpartition("|")
    tests = re.findall(r"`(\S*test_\w+\.py)`", behind)
    commands = [
        c for code in re.findall(r"`([^`]+)`", what.partition("|")[2]) for c in re.findall(rf"^{PROGRAM}", code)
    ]
    if re.search(r"\btests?\b", behind):
        assert tests
        for command in commands:
            assert any(run_by(test, command) for test in tests) or "cloud" in behind, command
    else:
        assert re.search(r"\bcloud\b", behind)


def test_a_test_that_does_not_run_the_command_is_told():
    assert not run_by("tests/clusters/test_docker.py", "serve deploy")
    assert not run_by("test_machines.py", "mlflow gc")
    assert run_by("test_launched.py", "ray dashboard") and run_by("tests/pipelines/test_status.py", "yan status")


@pytest.mark.parametrize("block", re.findall(r"```bash\n(.*?)```", TEXT, flags=re.S))
def test_section_of_a_block_names_its_test_or_wants_a_cloud(block: str):
    section = TEXT[TEXT.index(block) :].partition("\n## ")[0]
    assert re.search(r"`\S*test_\w+\.py`.*\bruns?\b|\bTest\b.*`\S*test_\w+\.py`|\bcloud\b", section)


def secrets_of(value: Any) -> Iterator[str]:
    """Names of the secrets that a manifest cannot do without."""
    if isinstance(value, list):
        for item in value:
            yield from secrets_of(item)
    elif isinstance(value, dict):
        for key, item in value.items():
            if key in ("secretRef", "secretKeyRef", "secret", "authOptions") and not item.get("optional"):
                yield item.get("name") or item["secretName"]
            else:
                yield from secrets_of(item)


def unmet(file: Path, secrets: set[str], services: set[str]) -> set[str]:
    """Secrets and addresses that a manifest names and nothing has made."""
    asked = set(re.findall(r"https?://([\w-]+)\.yan\.svc", file.read_text()))
    return (set(secrets_of(documents(file))) - secrets) | (asked - services)


def test_kubernetes_lines_make_what_later_ones_need():
    """A run refuses to start where MLflow does not answer, and a pod where a secret is missing."""
    (block,) = re.findall(r"```bash\n(kubectl apply -f clusters/kubernetes/namespace.yaml\n.*?)```", TEXT, flags=re.S)
    secrets: set[str] = set()
    services: set[str] = set()
    applied: set[str] = set()
    for line in block.splitlines():
        secrets |= set(re.findall(r"create secret generic (\S+)", line))
        for name in re.findall(r"-f (clusters/\S+)", line):
            file = ROOT / name
            services |= {d["metadata"]["name"] for d in documents(file) if d["kind"] == "Service"}
            assert not unmet(file, secrets, services), line
            applied.add(file.name)
    for name in ("ray_job", "ray_service"):
        assert not unmet(CLUSTERS / f"kubernetes/{name}.yaml", secrets, services)
    assert {"kubernetes.yaml", "ray_cluster.yaml"} <= applied and "mlflow" in services
    assert TEXT.count("create secret generic yan-mlflow-database") == 1


def test_from_nothing_wants_no_more_than_it_says():
    """The first line makes the environment that the others are run in; Debian's own packages are named before it."""
    (before, block) = re.findall(r"^## From nothing [^\n]+\n(.*?)```bash\n(.*?)```", TEXT, flags=re.M | re.S)[0]
    make, *rest = block.splitlines()
    assert make == "make machines && . .venv/bin/activate"
    (packages,) = re.findall(r"`apt-get install ([^`]+)`", before)
    wanted = {package for package in PROGRAMS.values() if package not in ("openssh-client", "util-linux")}
    assert {"make", "python3.11-venv"} | wanted <= set(packages.split())  # the server brings the client
    assert any(line.startswith("curl ") for line in rest) and "curl" in packages.split()

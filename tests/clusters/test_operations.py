"""The runbook names what is there."""

import re
import shlex

import click
import pytest

from pipelines.cli import COMMANDS, parse_config
from tests.clusters.checks import ROOT

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

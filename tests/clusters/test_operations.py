"""The runbook names what is there."""

import re
import shlex

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


def test_every_file_of_clusters_is_in_it_or_named_by_one_that_is():
    named = TEXT + "".join(path.read_text() for path in (ROOT / "clusters").rglob("*") if path.is_file())
    for path in (path for path in (ROOT / "clusters").rglob("*") if path.is_file()):
        if "provisioning" not in path.parts:  # its folder is mounted as a whole
            assert path.name in named, path


@pytest.mark.parametrize("alert", re.findall(r"alert: (\w+)", (ROOT / "clusters/monitoring/rules.yml").read_text()))
def test_every_alert_says_what_to_look_at(alert: str):
    assert re.search(rf"^\| .*\b{alert}\b.* \|", TEXT, flags=re.M)

"""What the machines of this one leave and keep; without namespaces, which are for test_launched.py."""

import sys
from pathlib import Path

import pytest

from tests.clusters import machines
from tests.clusters.machines import Machines


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machines:
    """Machines that have files and no network, nor processes."""

    def start(self: Machines, name: str) -> int:
        (self.folder / name / "home").mkdir(parents=True)
        return 2**30  # no process has such an id

    monkeypatch.setattr(machines, "call", lambda *command, check=True: None)
    monkeypatch.setattr(machines, "missing", lambda: "")
    monkeypatch.setattr(machines, "write_commit", lambda: None)
    monkeypatch.setattr(Machines, "_start", start)
    place = Machines(tmp_path / "machines", tmp_path)
    monkeypatch.setattr(machines, "Machines", lambda *_: place)
    return place


def called(monkeypatch: pytest.MonkeyPatch, word: str) -> None:
    monkeypatch.setattr(sys, "argv", ["machines", word])
    machines.main()


def test_up_again_starts_anew_and_keeps_what_is_shared(place: Machines, monkeypatch: pytest.MonkeyPatch):
    called(monkeypatch, "up")
    model, old = place.shared / "world/model/config.json", place.folder / "head/home/yan/old.py"
    for file in (model, old):
        file.parent.mkdir(parents=True)
        file.write_text("{}")
    place.serve_file.write_text("changed: by somebody")
    key = place.api_key
    called(monkeypatch, "up")
    assert model.read_text() == "{}" and place.serve_file.read_text() == "changed: by somebody"
    assert not old.exists() and place.api_key != key


def test_down_deletes_all_and_says_so(
    place: Machines, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    called(monkeypatch, "up")
    (place.shared / "mlflow.db").touch()
    called(monkeypatch, "down")
    assert not place.folder.exists()
    said = capsys.readouterr().out.splitlines()[-1]
    assert f"{place.folder} is deleted" in said and "runs, models and MLflow" in said

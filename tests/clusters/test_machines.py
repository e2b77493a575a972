"""What the machines of this one leave and keep; without namespaces, which are for test_launched.py."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.clusters import machines
from tests.clusters.machines import Machines


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machines:
    """Machines that have files and no network, nor processes."""

    def start(self: Machines, name: str) -> int:
        (self.homes / name / "home").mkdir(parents=True)
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
    model, old = place.shared / "world/model/config.json", place.homes / "head/home/yan/old.py"
    for file in (model, old):
        file.parent.mkdir(parents=True)
        file.write_text("{}")
    place.serve_file.write_text("changed: by somebody")
    key = place.api_key
    called(monkeypatch, "up")
    assert model.read_text() == "{}" and place.serve_file.read_text() == "changed: by somebody"
    assert not old.exists() and place.api_key != key


def test_machines_of_another_folder_keep_their_network(
    place: Machines, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    """Names of networks are one machine's: a second checkout, or the tests, would take them away."""
    called_for: list[tuple[str, ...]] = []
    monkeypatch.setattr(machines, "call", lambda *command, check=True: called_for.append(command))
    monkeypatch.setattr(machines, "NETWORKS", tmp_path)
    other = tmp_path / "other"
    for folder in (other, tmp_path / machines.BRIDGE):
        folder.mkdir()
    (tmp_path / machines.BRIDGE / "ifalias").write_text(f"{other}\n")
    with subprocess.Popen(["sleep", "60"]) as process:
        (other / "pids.json").write_text(json.dumps({"head": process.pid}))
        read = Path.read_bytes
        while b"sleep" not in read(Path(f"/proc/{process.pid}/cmdline")):
            pass  # it is empty for a moment after the process has begun
        monkeypatch.setattr(Path, "read_bytes", lambda file: read(file).replace(b"sleep", b"unshare"))
        with pytest.raises(SystemExit, match=f"the machines of {other} run"):
            called(monkeypatch, "up")
        with pytest.raises(SystemExit, match=f"the machines of {other} run"):
            called(monkeypatch, "down")
        assert called_for == []
        process.kill()
    called(monkeypatch, "up")  # those that have ended are in nobody's way
    assert ("ip", "link", "set", machines.BRIDGE, "alias", str(place.folder)) in called_for


def test_down_deletes_all_and_says_so(
    place: Machines, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    called(monkeypatch, "up")
    (place.shared / "mlflow.db").touch()
    called(monkeypatch, "down")
    assert not place.folder.exists() and not place.homes.exists()
    said = capsys.readouterr().out.splitlines()[-1]
    assert f"{place.folder} is deleted" in said and "runs, models and MLflow" in said

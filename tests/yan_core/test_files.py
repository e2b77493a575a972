"""Which commit a copy of the code says that it is."""

import importlib.util
import subprocess
from pathlib import Path
from types import ModuleType

import pytest

from yan_core import files


@pytest.fixture
def copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The module in a folder without history, as on a machine that the launcher has copied the code to."""
    monkeypatch.delenv("YAN_COMMIT", raising=False)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path))
    place = tmp_path / "yan/yan_core/files.py"
    place.parent.mkdir(parents=True)
    place.write_text(Path(files.__file__).read_text())
    return place


def load(place: Path) -> ModuleType:
    """The module anew: it remembers what it has found."""
    spec = importlib.util.spec_from_file_location("copied", place)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_copy_knows_no_commit_but_that_it_is_told(copy: Path, monkeypatch: pytest.MonkeyPatch):
    assert load(copy).code_commit() == "unknown"
    noted = copy.parents[1] / ".commit"
    noted.write_text(f"0123456789ab {load(copy).code_fingerprint()}\n")
    assert load(copy).code_commit() == "0123456789ab"
    monkeypatch.setenv("YAN_COMMIT", "told")
    assert load(copy).code_commit() == "told"
    monkeypatch.delenv("YAN_COMMIT")
    noted.write_text("half")
    assert load(copy).code_commit() == "unknown"


def test_copy_that_was_changed_since_says_so(copy: Path):
    """Another `ray up` brings new files; the commit that was noted is not theirs."""
    noted = copy.parents[1] / ".commit"
    for commit, told in (("0123456789ab", "0123456789ab-dirty"), ("ab-dirty", "ab-dirty"), ("unknown", "unknown")):
        noted.write_text(f"{commit} {load(copy).code_fingerprint()}\n")
        (copy.parent / f"{commit}.py").touch()
        assert load(copy).code_commit() == told


def test_what_a_checkout_writes_its_copy_reads(copy: Path):
    ask = ["git", "-C", str(copy.parents[1]), "-c", "user.name=a", "-c", "user.email=a@b"]
    (copy.parents[1] / ".gitignore").write_text("__pycache__/\n")
    for words in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "all"]):
        subprocess.run([*ask, *words], check=True, timeout=60)
    checkout = load(copy)
    checkout.write_commit()
    checkout.write_commit()
    commit = checkout.code_commit()
    assert len(commit) == 12
    # Git overlooks the file by a list of its own; by .gitignore Ray would leave it out of what a job is sent.
    assert not subprocess.run([*ask, "status", "--short"], check=True, capture_output=True, timeout=60).stdout
    assert (copy.parents[1] / ".git/info/exclude").read_text().splitlines().count("/.commit") == 1
    (copy.parents[1] / ".git").rename(copy.parents[2] / "history")
    assert load(copy).code_commit() == commit


def test_gits_own_word_goes_before_the_file(copy: Path, monkeypatch: pytest.MonkeyPatch):
    (copy.parents[1] / ".commit").write_text("old 0\n")
    done = subprocess.CompletedProcess([], 0, stdout="new\n")
    monkeypatch.setattr(subprocess, "run", lambda *args, **kwargs: done)
    assert load(copy).code_commit() == "new"

"""Checkpoints of a training in progress: sealed, verified, and the newest sound one found, in a folder or by URL."""

import errno
import json
import os
from pathlib import Path

import pytest
from safetensors import SafetensorError

from pipelines.checkpoints import SEAL, Checkpoints
from pipelines.order import Position
from yan_core.checkpoint import CheckpointError

NAMES = [f"checkpoint_2026-11-24_00-00-0{i}.000000" for i in range(3)]


def at(step: int) -> Position:
    return Position("finetune", "f", step, epoch=1, position=64)


def write(checkpoints: Checkpoints, name: str, step: int) -> None:
    def fill(folder: Path) -> None:
        (folder / "model").mkdir()
        (folder / "model" / "weights").write_text(f"weights of step {step}")
        (folder / "optimizer.pt").write_bytes(bytes(1000))

    checkpoints.write(name, at(step), fill)


@pytest.fixture(params=["folder", "url"])
def checkpoints(request, tmp_path) -> Checkpoints:
    place = Checkpoints(str(tmp_path / "c") if request.param == "folder" else f"file://{tmp_path}/c")
    for step, name in enumerate(NAMES):
        write(place, name, step)
    return place


def damage(tmp_path: Path, name: str, file: str) -> None:
    path = tmp_path / "c" / name / file
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content[:-20] if file == SEAL else content)


def test_the_newest_is_found_and_brought_back(checkpoints):
    name, position = checkpoints.newest()
    assert (name, position) == (NAMES[2], at(2))
    with checkpoints.fetch(name) as folder:
        assert (folder / "model" / "weights").read_text() == "weights of step 2"


@pytest.mark.parametrize("file", ["optimizer.pt", "model/weights", SEAL])
def test_a_damaged_one_is_named_and_the_one_before_it_used(checkpoints, tmp_path, caplog, file):
    damage(tmp_path, NAMES[2], file)
    with pytest.raises(CheckpointError, match=f"{NAMES[2]}/{file} is damaged"):
        checkpoints.verify(NAMES[2])
    assert checkpoints.newest() == (NAMES[1], at(1))
    assert f"{NAMES[2]}/{file} is damaged" in caplog.text and "the checkpoint before it is used" in caplog.text


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
    ],
)
def test_a_full_disk_is_said_and_costs_no_checkpoint_that_is_there(checkpoints, error):
    def fill(folder: Path) -> None:
        (folder / "begun").touch()
        raise error

    with pytest.raises(CheckpointError, match="no space left for checkpoint_new in .*: free some"):
        checkpoints.write("checkpoint_new", at(9), fill)
    assert checkpoints.names() == NAMES[::-1] and checkpoints.newest() == (NAMES[2], at(2))


def test_a_cut_short_or_unfinished_one_is_passed_over(checkpoints, tmp_path):
    (tmp_path / "c" / NAMES[2] / "model" / "weights").unlink()
    (tmp_path / "c" / NAMES[1] / SEAL).unlink()
    assert checkpoints.newest() == (NAMES[0], at(0))
    with pytest.raises(CheckpointError, match="was never finished"):
        checkpoints.verify(NAMES[1])


def test_training_does_not_begin_anew_because_every_one_is_damaged(checkpoints, tmp_path):
    (tmp_path / "c" / NAMES[2] / SEAL).unlink()  # its writer was killed
    for name in NAMES[:2]:
        damage(tmp_path, name, "optimizer.pt")
    with pytest.raises(
        CheckpointError, match=f"no checkpoint in .* is sound.*{NAMES[1]}/optimizer.pt.*delete that place"
    ):
        checkpoints.decide(["f"])
    for name in NAMES[:2]:
        (tmp_path / "c" / name / SEAL).unlink()
    assert checkpoints.decide(["f"]) is None  # none was ever finished: nothing is lost


@pytest.mark.parametrize("file", [SEAL, "model/weights"])
def test_a_storage_that_does_not_answer_says_nothing_of_them(checkpoints, monkeypatch, file):
    """To begin anew, or to go on from an older one, because a bucket is busy would lose what is there."""

    class Busy:
        def open_input_stream(self, path: str):
            if path.endswith(file):
                raise OSError("SlowDown: please reduce your request rate")
            return store.open_input_stream(path)

        def __getattr__(self, name: str):
            return getattr(store, name)

    store, root = checkpoints._open()
    monkeypatch.setattr(Checkpoints, "_open", lambda self: (Busy(), root))
    with pytest.raises(OSError, match="SlowDown"):
        checkpoints.decide(["f"])


def test_one_that_broke_off_leaves_nothing_that_could_be_taken_for_one(checkpoints):
    def fill(folder: Path) -> None:
        (folder / "half").write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        checkpoints.write("checkpoint_2027-01-01_00-00-00.000000", at(9), fill)
    assert checkpoints.newest() == (NAMES[2], at(2))


def test_a_file_that_ray_train_leaves_beside_them_is_none(checkpoints, tmp_path):
    (tmp_path / "c" / "checkpoint_manager_snapshot.json").write_text("{}")
    assert checkpoints.names() == sorted(NAMES, reverse=True) and checkpoints.newest() == (NAMES[2], at(2))


def test_what_was_decided_is_what_every_worker_reads(checkpoints):
    assert checkpoints.decide(["e", "f"]) == (NAMES[2], at(2)) == checkpoints.decided()
    assert checkpoints.decide(["g"]) is None and checkpoints.decided() is None


def test_none_where_nothing_is(tmp_path):
    empty = Checkpoints(str(tmp_path / "nothing"))
    assert empty.names() == [] and empty.newest() is None
    assert empty.decide(["f"]) is None and empty.decided() is None


def test_the_seal_lists_every_file(checkpoints, tmp_path):
    seal = json.loads((tmp_path / "c" / NAMES[0] / SEAL).read_text())
    assert set(seal["sha256"]) == {"optimizer.pt", "model/weights"}
    assert seal["position"] == vars(at(0))


def test_deleted_without_what_is_beside_them(checkpoints, tmp_path):
    (tmp_path / "notes").write_text("of someone else")
    for _ in range(2):
        checkpoints.delete()
        assert [f.name for f in tmp_path.iterdir()] == ["notes"]

"""Checkpoints of a training in progress, in a folder or below a URL: whole or not there, and verified before use."""

from __future__ import annotations

import hashlib
import json
import logging
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray.train
from pyarrow import fs
from safetensors import SafetensorError

from pipelines.order import Position
from yan_core.checkpoint import CheckpointError
from yan_core.files import atomic_folder, sha256_file, write_file

logger = logging.getLogger(__name__)

SEAL = "checkpoint.json"
"""Written last: where the checkpoint was taken, and the SHA-256 of every file in it."""

DECISION = "goes_on_from.json"
"""Which checkpoint the workers that run now went on from."""


class Unfinished(CheckpointError):
    """A checkpoint was never sealed: its writer was killed."""


class Checkpoints:
    """The checkpoints of one training. Ray Train gives each a name that sorts by time, and deletes the old ones."""

    def __init__(self, root: str) -> None:
        """Name the place.

        Args:
            root: Folder, or URL that pyarrow can open (s3://, gs://, file://), that all nodes reach.
        """
        self.root = root
        self.is_local = "://" not in root

    def _open(self) -> tuple[fs.FileSystem, str]:
        return (fs.LocalFileSystem(), str(Path(self.root))) if self.is_local else fs.FileSystem.from_uri(self.root)

    def write(self, name: str, position: Position, fill: Callable[[Path], None]) -> ray.train.Checkpoint:
        """Write one, and give Ray Train's handle of it.

        Args:
            name: Its name.
            position: Where it was taken.
            fill: Writes its files into the folder it is given.

        Raises:
            CheckpointError: If the disk is full; those before it stay as they are.
        """
        try:
            return self._write(name, position, fill)
        except (OSError, SafetensorError) as error:
            if "No space left on device" not in str(error):
                raise
            where = self.root if self.is_local else f"{self.root} or {tempfile.gettempdir()}"
            raise CheckpointError(
                f"no space left for {name} in {where}: free some, then give the same command again; it goes on from "
                "the checkpoint before"
            ) from error

    def _write(self, name: str, position: Position, fill: Callable[[Path], None]) -> ray.train.Checkpoint:
        if self.is_local:
            with atomic_folder(Path(self.root) / name) as folder:
                _fill_and_seal(folder, position, fill)
            return ray.train.Checkpoint(str(Path(self.root) / name))
        store, root = self._open()
        with tempfile.TemporaryDirectory() as scratch:
            _fill_and_seal(Path(scratch), position, fill)
            seal = Path(scratch) / SEAL
            sealed = seal.read_bytes()
            seal.unlink()
            store.create_dir(f"{root}/{name}")
            fs.copy_files(scratch, f"{root}/{name}", destination_filesystem=store)
            with store.open_output_stream(f"{root}/{name}/{SEAL}") as out:
                out.write(sealed)
        return ray.train.Checkpoint(f"{root}/{name}", filesystem=store)

    def names(self, prefix: str = "checkpoint_") -> list[str]:
        """All of them, the newest first; those that were never finished too."""
        store, root = self._open()
        found = store.get_file_info(fs.FileSelector(root, allow_not_found=True))
        folders = (f.base_name for f in found if f.type == fs.FileType.Directory)  # Ray Train has a file beside them
        return sorted((name for name in folders if name.startswith(prefix)), reverse=True)

    def remove(self, name: str) -> None:
        """Delete one."""
        store, root = self._open()
        store.delete_dir(f"{root}/{name}")

    def verify(self, name: str) -> Position:
        """Where a checkpoint was taken, if every file of it is sound.

        Raises:
            CheckpointError: If one is not; names it.
            OSError: If the storage does not answer, which says nothing of the checkpoint.
        """
        store, root = self._open()
        where = f"{self.root}/{name}"
        try:
            with store.open_input_stream(f"{root}/{name}/{SEAL}") as file:
                seal = json.loads(file.read())
            position = Position(**seal["position"])
            sums = dict(seal["sha256"])
        except FileNotFoundError as error:
            raise Unfinished(f"{where} was never finished: it has no {SEAL}") from error
        except (ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{where}/{SEAL} is damaged ({error})") from error
        for file, expected in sums.items():
            if _sha256(store, f"{root}/{name}/{file}") != expected:
                raise CheckpointError(f"{where}/{file} is damaged or missing: its SHA-256 is not the one in {SEAL}")
        return position

    def newest(self) -> tuple[str, Position] | None:
        """Name and position of the newest sound one; a damaged one is named in the log and passed over.

        Raises:
            CheckpointError: If there are some and all are damaged: to begin anew is for a person to decide.
        """
        damage: CheckpointError | None = None
        for name in self.names():
            try:
                return name, self.verify(name)
            except CheckpointError as error:
                logger.warning("%s; the checkpoint before it is used", error)
                damage = damage if isinstance(error, Unfinished) else damage or error
        if damage is not None:
            raise CheckpointError(
                f"no checkpoint in {self.root} is sound. {damage}. Mend the storage, or delete that place to train "
                "from the first step"
            ) from damage
        return None

    def decide(self, fingerprints: list[str]) -> tuple[str, Position] | None:
        """The newest sound one of the given trainings; writes down which, so that all workers go on from the same."""
        found = self.newest()
        if found is not None and found[1].fingerprint not in fingerprints:
            found = None  # of a stage that is done, or whose inputs have changed since
        text = json.dumps({"name": found[0], "position": vars(found[1])} if found else None)
        store, root = self._open()
        store.create_dir(root)
        with store.open_output_stream(f"{root}/{DECISION}") as out:
            out.write(text.encode())
        return found

    def decided(self) -> tuple[str, Position] | None:
        """What `decide` found last."""
        store, root = self._open()
        with store.open_input_stream(f"{root}/{DECISION}") as file:
            found = json.loads(file.read())
        return (found["name"], Position(**found["position"])) if found else None

    def delete(self) -> None:
        """Delete the place with all that is in it."""
        store, root = self._open()
        if store.get_file_info(root).type == fs.FileType.Directory:
            store.delete_dir(root)

    @contextmanager
    def fetch(self, name: str) -> Iterator[Path]:
        """A local folder with one's files, while the block runs."""
        if self.is_local:
            yield Path(self.root) / name
            return
        store, root = self._open()
        with tempfile.TemporaryDirectory() as scratch:
            fs.copy_files(f"{root}/{name}", scratch, source_filesystem=store)
            yield Path(scratch)


def _fill_and_seal(folder: Path, position: Position, fill: Callable[[Path], None]) -> None:
    fill(folder)
    sums = {p.relative_to(folder).as_posix(): sha256_file(p) for p in sorted(folder.rglob("*")) if p.is_file()}
    seal: dict[str, Any] = {"position": vars(position), "sha256": sums}
    write_file(folder / SEAL, json.dumps(seal, indent=2))


def _sha256(store: fs.FileSystem, path: str) -> str:
    digest = hashlib.sha256()
    try:
        with store.open_input_stream(path) as file:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
    except FileNotFoundError:
        return ""
    return digest.hexdigest()

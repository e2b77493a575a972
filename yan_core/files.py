"""Folders that appear whole or not at all, hashes, which copy of this code runs, addresses for show. No torch here."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
from collections.abc import Generator
from contextlib import contextmanager
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path


@contextmanager
def atomic_folder(path: Path) -> Generator[Path]:
    """Give a scratch folder that takes the place of `path` when the block ends well, and vanishes when it does not."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.{os.getpid()}.part")
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir()
    try:
        yield scratch
        for file in scratch.rglob("*"):
            if file.is_file():
                with file.open("rb") as handle:
                    os.fsync(handle.fileno())
        old = path.with_name(f".{path.name}.{os.getpid()}.old")
        if path.exists():
            shutil.rmtree(old, ignore_errors=True)  # a process of the same id (1 in a container) may have left it
            path.rename(old)
        scratch.rename(path)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def clear_leftovers(folder: Path) -> None:
    """Clear up after writers that were killed: scratch goes, and a result that was just being replaced comes back.

    Call it only where nobody else writes in `folder`.
    """
    for left in folder.glob(".*.old"):
        path = left.with_name(left.name[1:].rsplit(".", 2)[0])
        if not path.exists():
            left.rename(path)
    for left in (*folder.glob(".*.part"), *folder.glob(".*.old")):
        if left.is_dir():
            shutil.rmtree(left, ignore_errors=True)
        else:
            left.unlink(missing_ok=True)


def sha256_file(path: Path) -> str:
    """Hexadecimal SHA-256 of a file."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


PACKAGES = ("yan_core", "pipelines", "serve")
"""Folders of the code, side by side."""


COMMIT_FILE = ".commit"
"""Beside the packages, in a copy of the code without its history: commit and fingerprint of what was copied."""


def write_commit(root: Path = Path(__file__).parents[1]) -> None:
    """Leave word of commit and fingerprint for those who copy the code without its history.

    Git is told by its own list to overlook it: Ray leaves out of a job's code what `.gitignore` names.
    """
    write_file(root / COMMIT_FILE, f"{code_commit()} {code_fingerprint()}\n")
    try:
        ask = ["git", "-C", str(root), "rev-parse", "--path-format=absolute", "--git-path", "info/exclude"]
        exclude = Path(subprocess.run(ask, capture_output=True, text=True, timeout=10, check=True).stdout.strip())
    except (OSError, subprocess.SubprocessError):
        return  # no checkout
    known = exclude.read_text(encoding="utf-8") if exclude.is_file() else ""
    if f"/{COMMIT_FILE}" not in known.splitlines():
        write_file(exclude, "".join(f"{line}\n" for line in [*known.splitlines(), f"/{COMMIT_FILE}"]))


def _copied_commit() -> str:
    try:
        commit, fingerprint = (Path(__file__).parents[1] / COMMIT_FILE).read_text(encoding="utf-8").split()
    except (OSError, ValueError):
        return "unknown"
    changed = fingerprint != code_fingerprint() and commit != "unknown" and not commit.endswith("-dirty")
    return f"{commit}-dirty" if changed else commit


@lru_cache(maxsize=1)
def code_commit() -> str:
    """Commit of the code that runs, with `-dirty` where files differ from it.

    Outside a checkout it is that of the variable YAN_COMMIT, or else of the file `.commit`; `unknown` without either.
    """
    here = Path(__file__).parent
    try:
        ask = ["git", "-C", str(here), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
        found = subprocess.run(ask, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return os.environ.get("YAN_COMMIT") or _copied_commit()
    return found.stdout.strip()


@lru_cache(maxsize=1)
def code_fingerprint() -> str:
    """Short hash of the source files, this package's and its neighbours': equal where the same code runs."""
    digest, root = hashlib.sha256(), Path(__file__).parents[1]
    for file in sorted(file for package in PACKAGES for file in (root / package).rglob("*.py")):
        digest.update(file.relative_to(root).as_posix().encode() + file.read_bytes())
    return digest.hexdigest()[:12]


def code_description() -> str:
    """Which copy of this package runs, for people: version, commit, fingerprint and folder."""
    try:
        release = version("yan")
    except PackageNotFoundError:  # run from its folder
        release = "not installed"
    return f"{release}, commit {code_commit()}, sources {code_fingerprint()}, in {Path(__file__).parent}"


def write_file(path: Path, text: str) -> None:
    """Write a small file whole or not at all; what is there and no file, such as `/dev/stdout`, is written to."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists() and not path.is_file():
        path.write_text(text, encoding="utf-8")
        return
    scratch = path.with_name(f".{path.name}.{os.getpid()}.part")
    scratch.write_text(text, encoding="utf-8")
    scratch.replace(path)


def without_password(text: str) -> str:
    """Text, or an address alone, as it may be shown and recorded: passwords of the URLs in it are gone."""
    return re.sub(r"(://[^/@:\s]*):[^/@\s]*@", r"\1:***@", text)

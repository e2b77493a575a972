"""Folders of results: one process at a time in each, and what its results were made from. No Ray, no torch."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from yan_core.config import RunConfig, to_dict
from yan_core.files import clear_leftovers, without_password


def recorded(config: RunConfig) -> dict[str, Any]:
    """The settings as they are kept with a run: without the password of MLflow's address."""
    settings = to_dict(config)
    settings["tracking"]["uri"] = without_password(config.tracking.uri)
    return settings


def own_store(runs_dir: str = RunConfig.runs_dir) -> str:
    """Address of MLflow's store where none is named: a file beside the runs."""
    return f"sqlite:///{Path(runs_dir).resolve()}/mlflow.db"


def store_here() -> str:
    """The address of `own_store` in this folder, if there is one; else empty."""
    return own_store() if Path(own_store().removeprefix("sqlite:///")).is_file() else ""


def where_to_look(uri: str, run_id: str) -> str:
    """A run's page, or the command that opens its store in a browser."""
    if uri.startswith("http"):
        return f"{re.sub('://[^/@]*@', '://', uri).rstrip('/')}/#/runs/{run_id}"  # a browser asks for who it is
    shown = without_password(uri)
    return f"mlflow ui --backend-store-uri {shown}" + ("" if shown == uri else " (***: its password)")


def flat(values: Any, where: str = "") -> dict[str, Any]:
    """Nested settings by their dotted keys."""
    if not isinstance(values, dict):
        return {where: values}
    return {
        k: v for name, value in values.items() for k, v in flat(value, f"{where}.{name}" if where else name).items()
    }


def difference(old: dict[str, Any], new: dict[str, Any]) -> str:
    """The first setting in which two inputs differ."""
    before, after = flat(old), flat(new)
    for key in [*after, *before]:
        if before.get(key) != after.get(key):
            return (
                "the step before it was redone" if key == "before" else f"{key}: {before.get(key)} -> {after.get(key)}"
            )
    return "nothing"


def read_inputs(path: Path) -> dict[str, Any] | None:
    """Inputs recorded beside a result, or None."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError):
        return None


@contextmanager
def run_lock(folder: Path, fresh: bool = False, instead: str = "--runs_dir or --name") -> Iterator[None]:
    """Let one process at a time work in a folder; what a killed one left half-written there is cleared up.

    Args:
        folder: That of a run, or of answers.
        fresh: Whether to empty it.
        instead: The option that names another folder.

    Raises:
        ValueError: If another one does; names its process. If the folder cannot be written to.
    """
    import fcntl

    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / ".lock").touch()
    except OSError as error:
        raise ValueError(
            f"{folder} cannot be made and written to: {error.strerror}; choose another {instead}"
        ) from error
    with (folder / ".lock").open("a+") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            handle.seek(0)
            raise ValueError(
                f"process {handle.read().strip() or '?'} is working in {folder}: "
                f"wait for it, or choose another {instead}"
            ) from error
        handle.truncate(0)
        handle.write(str(os.getpid()))
        handle.flush()
        if fresh:
            for old in folder.iterdir():
                if old.is_dir():
                    shutil.rmtree(old)
                elif old.name != ".lock":
                    old.unlink()
        for place in (folder, folder / "stages"):
            clear_leftovers(place)
        yield

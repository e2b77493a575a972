"""A path, folder, glob or URL of a config -> the files that it names, and what is said where there is none."""

from __future__ import annotations

import csv
import glob
import os
import re
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Literal

import pyarrow as pa
from pyarrow import fs

from yan_core.config import DataConfig, DatasetConfig
from yan_core.files import sha256_file, without_password


class DataError(ValueError):
    """The data a config names are missing, empty or not as described."""


class UnreadableFile(DataError):
    """A file is damaged, or gone since it was listed."""


READ_ERRORS = (OSError, pa.ArrowException, UnicodeDecodeError, csv.Error)
"""What reading a damaged file raises."""


def reason_of(error: BaseException) -> str:
    """What went wrong, in a line: the last `SomeError: ...` of a text that Ray has put tracebacks and advice into.

    Passwords of URLs in it are left out.
    """
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return without_password((raised_in(lines)[-1:] or lines or [type(error).__name__])[0])[:300]


def raised_in(lines: list[str]) -> list[str]:
    """Those of the form `SomeError: ...`; if there are others, without Ray Data's own, which says that there are."""
    found = [line for line in lines if re.match(r"[\w.]*(Error|Exception|Invalid): ", line)]
    return [line for line in found if not line.startswith("ray.exceptions.UserCodeException: ")] or found


def locate(data: DataConfig, where: str) -> str:
    """A path of a data set below data.root; absolute paths and URLs stay as they are."""
    if "://" in where or os.path.isabs(where):
        return where
    if "://" in data.root:
        return f"{data.root.rstrip('/')}/{where}"
    return os.path.join(data.root, where)


HASHED_BYTES = 2_000_000_000
"""Local files of as much in all are known by what is in them."""


def identities(paths: Sequence[str]) -> dict[str, list[int | str]]:
    """What tells whether local files are still the same.

    Size and SHA-256, so that files which were copied, fetched again or touched are; of more than HASHED_BYTES in all,
    size and time, since to read them through would take minutes.

    Raises:
        OSError: If one cannot be read.
    """
    found = {path: os.stat(path) for path in paths}
    hashed = sum(info.st_size for info in found.values()) <= HASHED_BYTES
    return {
        path: [info.st_size, _sha256(path, info.st_size, info.st_mtime_ns) if hashed else info.st_mtime_ns]
        for path, info in found.items()
    }


@lru_cache(maxsize=65_536)
def _sha256(path: str, size: int, modified_ns: int) -> str:
    """Of a file as it was then: a run asks several times."""
    return sha256_file(Path(path))


def open_store(path: str) -> tuple[fs.FileSystem, str]:
    """The file system of a path or URL, and the path in it."""
    return fs.FileSystem.from_uri(path) if "://" in path else (fs.LocalFileSystem(), os.path.abspath(path))


def files_of(data: DataConfig, dataset: DatasetConfig, where: str) -> list[str]:
    """Files that a path, folder or glob names, in order; a URL too, whose globs have `*`, `**` and `[...]`.

    Raises:
        DataError: If there is none.
    """
    if not where:
        raise DataError("a data set of files needs both `train` and `validation` paths; one of them is empty")
    path = locate(data, where)
    found = list_files(path)
    if not found:
        raise DataError(
            f"no file at {os.path.abspath(path) if '://' not in path else path} (data.root={data.root!r}, {where!r}). "
            "Set --data.root to the folder that holds the data, or correct the data set's path."
        )
    return found


def list_files(path: str) -> list[str]:
    """Files that a path, folder or glob names, in order, maybe none; a URL's globs have `*`, `**` and `[...]`.

    Raises:
        DataError: If a URL cannot be opened.
    """
    if "://" in path:
        return _remote_files(path)
    if os.path.isdir(path):
        inside = (f for f in glob.glob(os.path.join(path, "**", "*"), recursive=True) if os.path.isfile(f))
        return sorted(f for f in inside if _is_data(os.path.relpath(f, path)))
    return sorted(glob.glob(path))


def sizes_of(files: list[str]) -> dict[str, list[int]]:
    """Size and time of the last change of those that are files, here or in a bucket; others are left out."""
    folders: dict[str, list[str]] = {}
    for file in files:
        where, asked, options = file.partition("?") if "://" in file else (file, "", "")
        folders.setdefault(f"{os.path.dirname(where)}{asked}{options}", []).append(file)
    found: dict[str, list[int]] = {}
    for folder, inside in folders.items():  # a listing each: a bucket would be asked for every file apart
        try:
            store, path = open_store(folder)
            listed = store.get_file_info(fs.FileSelector(path, allow_not_found=True))
        except (OSError, pa.ArrowException):  # what is gone, the reading says more of
            continue
        infos = {info.base_name: info for info in listed if info.type == fs.FileType.File}
        for file in inside:
            info = infos.get(os.path.basename(file.partition("?")[0] if "://" in file else file))
            if info is not None:
                found[file] = [info.size, info.mtime_ns or 0]
    return found


def _remote_files(url: str) -> list[str]:
    where, asked, options = url.partition("?")
    scheme, _, rest = where.partition("://")
    user, at, _ = rest.partition("/")[0].rpartition("@")
    above = re.split(r"[*[]", rest, maxsplit=1)[0]
    above = above if above == rest else above.rpartition("/")[0]  # the folder that a glob begins in
    try:
        store, path = open_store(f"{scheme}://{above}{asked}{options}")
        info = store.get_file_info(path)
        if info.type == fs.FileType.File:
            return [url]
        inside = store.get_file_info(fs.FileSelector(path, recursive=True, allow_not_found=True))
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"cannot open {url}: {reason_of(error)}") from error
    files = (f.path for f in inside if f.type == fs.FileType.File)
    wanted = re.compile(_pattern(rest[len(above) :].strip("/")))
    names = ((file, file.removeprefix(path).lstrip("/")) for file in files)
    found = (
        f"{scheme}://{user}{at}{file}{asked}{options}"
        for file, name in names
        if _is_data(name) and wanted.fullmatch(name)
    )
    return sorted(found)


def _pattern(names: str) -> str:
    """The regular expression of a glob of `*`, `**` and `[...]`; of none, any name."""
    wild = {"**/": "(?:[^/]+/)*", "*": "[^/]*"}

    def expression(part: str) -> str:
        if len(part) > 2 and part[0] == "[":
            among = re.escape(part[1:-1].removeprefix("!")).replace(r"\-", "-")
            return f"[^/{among}]" if part[1] == "!" else f"[{among}]"
        return wild.get(part, re.escape(part))

    return "".join(map(expression, re.split(r"(\*\*/|\*|\[!?[^]/]+\])", names))) if names else ".*"


def _is_data(inside: str) -> bool:
    """Whether a file of a folder holds rows: `_SUCCESS`, `_temporary/...`, `.part.crc` and their like do not."""
    return not any(part.startswith(("_", ".")) for part in inside.split("/"))


ENDINGS: dict[str, Literal["parquet", "jsonl", "csv", "text"]] = {
    ".parquet": "parquet",
    ".jsonl": "jsonl",
    ".json": "jsonl",
    ".csv": "csv",
    ".txt": "text",
}
"""Ending of a file's name -> its format."""


def format_of(path: str) -> Literal["parquet", "jsonl", "csv", "text"] | None:
    """The format that a file's ending tells, beneath that of a compression; None where it tells none."""
    endings = [ending for ending in Path(path).suffixes if ending not in (".gz", ".bz2", ".zst")]
    return ENDINGS.get(endings[-1]) if endings else None

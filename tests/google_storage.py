"""A server that stands in for Google Cloud Storage: `python -m tests.google_storage PORT`, one empty bucket `yan`.

A process of its own: in one with the reader, reads hang.
"""

import sys
from typing import Any

from gcp_storage_emulator.exceptions import NotFound
from gcp_storage_emulator.server import create_server
from gcp_storage_emulator.storage import Storage

list_files = Storage.get_file_list


def with_folders(
    self: Storage, bucket: str, prefix: str | None = None, delimiter: str | None = None, *rest: Any, **named: Any
) -> tuple[list[Any], list[str]]:
    """The listing with `includeTrailingDelimiter`, by which Arrow finds folders; the emulator lacks it."""
    files, folders = list_files(self, bucket, prefix, delimiter, *rest, **named)
    for folder in folders:
        try:
            files.append(self.get_file_obj(bucket, folder))
        except NotFound:
            continue  # A folder that nobody made: only the files in it are there.
    return files, folders


Storage.get_file_list = with_folders

if __name__ == "__main__":
    create_server("127.0.0.1", int(sys.argv[1]), in_memory=True, default_bucket="yan").run()

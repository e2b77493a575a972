"""A plugin of coverage: figures are written every second, since Ray ends its workers without asking them."""

import threading
import time

import coverage


def coverage_init(registry: object, options: object) -> None:
    """Begin to write; coverage calls this in every process that it measures."""
    threading.Thread(target=_write, daemon=True).start()


def _write() -> None:
    while True:
        time.sleep(1)
        if measured := coverage.Coverage.current():
            measured.save()

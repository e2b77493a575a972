"""Metrics on their way to MLflow, from a thread of their own."""

from __future__ import annotations

import itertools
import json
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from yan_core.files import write_file

if TYPE_CHECKING:
    from pipelines.tracking import Tracker


class Value(NamedTuple):
    """A metric's value: when it was taken, in ms since 1970, and at which step."""

    name: str
    value: float
    timestamp_ms: int
    step: int


UNSENT = "unsent_metrics-{}.jsonl"
"""In a run's folder: what could not be sent to the MLflow run of that id; other settings are another run."""

logger = logging.getLogger(__name__)


def _send(
    tracker: Tracker,
    batch: list[Value],
    store_errors: tuple[type[Exception], ...],
    is_refusal: Callable[[BaseException], bool],
) -> None:
    """Send values, and leave out those that the store will never take."""
    try:
        tracker.send(batch)
    except store_errors as error:
        if not is_refusal(error):
            raise
        if len(batch) == 1:
            logger.warning("MLflow refuses %s, which is left out: %s", batch[0], error)
        else:
            for value in batch:
                _send(tracker, [value], store_errors, is_refusal)


class MetricsBuffer:
    """Sends metrics to MLflow from a thread of its own: a slow or absent server neither slows nor stops training.

    What cannot be sent is kept and tried again; at the end, or at a checkpoint, what is left goes to a file, which the
    next buffer on that file sends.
    """

    def __init__(self, connect: Callable[[], Tracker], unsent: Path, retry_s: float = 5.0) -> None:
        """Begin to send.

        Args:
            connect: Gives the run, in that thread.
            unsent: File for what could not be sent; what an earlier buffer left there is sent first.
            retry_s: Time between attempts while the server does not answer.
        """
        self.connect, self.unsent, self.retry_s = connect, unsent, retry_s
        self.pending: deque[Value] = deque(self._left())
        self.tables: deque[tuple[list[dict[str, str]], str]] = deque()
        self.changed, self.closing = threading.Condition(), False
        self.thread = threading.Thread(target=self._work, daemon=True)
        self.thread.start()

    def _left(self) -> list[Value]:
        if not self.unsent.is_file():
            return []
        lines = self.unsent.read_text(encoding="utf-8").splitlines()  # it stays until they are sent: see `spool`
        return [Value(*json.loads(line)) for line in lines]

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        """Take metrics of a step; returns at once."""
        now = int(time.time() * 1000)
        with self.changed:
            self.pending.extend(Value(name, float(value), now, step) for name, value in values.items())
            self.changed.notify()

    def table(self, rows: list[dict[str, str]], file: str) -> None:
        """Take rows of a table; returns at once. Unlike metrics, they are lost where MLflow never answers."""
        with self.changed:
            self.tables.append((rows, file))
            self.changed.notify()

    def _work(self) -> None:
        # MLflow: three seconds of imports, here beside the training.
        from pipelines.tracking import STORE_ERRORS, is_refusal

        tracker: Tracker | None = None
        while True:
            with self.changed:
                self.changed.wait_for(lambda: self.pending or self.tables or self.closing)
                batch, table = list(itertools.islice(self.pending, 500)), self.tables[0] if self.tables else None
                if not batch and table is None:
                    return
            try:
                tracker = tracker or self.connect()
                if batch:
                    _send(tracker, batch, STORE_ERRORS, is_refusal)
                elif table is not None:
                    try:
                        tracker.table(*table)
                    except STORE_ERRORS as error:
                        if not is_refusal(error):
                            raise
                        logger.warning("MLflow refuses a table of %s, which is left out: %s", table[1], error)
            except STORE_ERRORS as error:
                logger.warning("MLflow: %s; tried again", error)
                with self.changed:
                    if self.changed.wait_for(lambda: self.closing, self.retry_s):
                        return
                continue
            with self.changed:
                for _ in batch:
                    self.pending.popleft()
                if not batch:
                    self.tables.popleft()
                self.changed.notify_all()

    def spool(self) -> int:
        """Write what is not sent yet to the file, in case this process ends; gives how much that is."""
        with self.changed:
            left = list(self.pending)
        if left:
            lines = [json.dumps(value) for value in left]
            write_file(self.unsent, "".join(f"{line}\n" for line in lines))
        else:
            self.unsent.unlink(missing_ok=True)
        return len(left)

    def close(self, timeout_s: float = 20.0) -> int:
        """Send what is left, for as long as that; gives how many values are in the file instead."""
        with self.changed:
            self.changed.wait_for(lambda: not self.pending and not self.tables, timeout_s)
            self.closing = True
            self.changed.notify_all()
        self.thread.join(timeout_s)
        return self.spool()

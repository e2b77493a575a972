"""Task templates: a row of a data set -> (source, target), for training, evaluation and serving alike."""

from __future__ import annotations

import string
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from yan_core.config import unknown_name


@dataclass(frozen=True)
class Task:
    """How a row becomes a source and a target.

    Attributes:
        name: Name in configs and requests.
        source: Format string over the row's fields.
        target: Field that holds the answer.
        keep: Which end of a source stays when it is too long.
        metric: Name under which the share of exactly right answers is reported.
    """

    name: str
    source: str
    target: str
    keep: Literal["start", "end"]
    metric: str

    @property
    def fields(self) -> tuple[str, ...]:
        """Fields a row must have, the target last."""
        return (*(name for _, name, _, _ in string.Formatter().parse(self.source) if name), self.target)

    def pair(self, row: Mapping[str, Any]) -> tuple[str, str]:
        """Source and target of a row.

        Raises:
            ValueError: If a field is missing, null, not text or blank; the message names it.
        """
        for name in self.fields:
            if name not in row:
                raise ValueError(f"field {name!r} is missing; the row has {', '.join(sorted(map(str, row)))}")
            value = row[name]
            if not isinstance(value, str):
                raise ValueError(f"field {name!r} must be text, got {value!r} ({type(value).__name__})")
            if not value.strip():
                raise ValueError(f"field {name!r} is blank")
        return self.source.format_map(row), row[self.target]


TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task("question_answering", "{context} {question}", "answer", keep="end", metric="exact_match"),
        Task("classification", "{text}", "label", keep="start", metric="accuracy"),
    )
}
"""All templates by name."""


def get_task(name: str) -> Task:
    """The template of a name.

    Raises:
        ValueError: If there is none; offers the nearest.
    """
    if name not in TASKS:
        raise ValueError(unknown_name("data.task", name, list(TASKS)))
    return TASKS[name]

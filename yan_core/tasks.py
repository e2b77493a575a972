"""Task templates: a row of a data set -> (source, target), for training, evaluation and serving alike."""

from __future__ import annotations

import hashlib
import string
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from yan_core.config import unknown_name
from yan_core.tokenization import MASK


@dataclass(frozen=True)
class Task:
    """How a row becomes a source and a target.

    Attributes:
        name: Name in configs and requests.
        source: Format string over the row's fields.
        target: Field that holds the answer.
        keep: Which end of a source stays when it is too long.
        metric: What answers are scored by, see yan_core/metrics.py.
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
        self.check(row)
        return self.source.format_map(row), row[self.target]

    def check(self, row: Mapping[str, Any]) -> None:
        """Refuse a row that lacks what the template needs.

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


@dataclass(frozen=True)
class InfillingTask(Task):
    """Text infilling: one run of words gives way to `<mask>`, and is the answer (arXiv:2604.15009, sec. on infilling).

    The answer is the hidden words alone: to write the whole text again and to score all of it would count what was
    copied. Where the run is follows from the text itself, so that it is the same wherever the row is read.

    Attributes:
        max_words: Longest run; lengths are uniform in 1..max_words.
    """

    max_words: int = 3

    @property
    def fields(self) -> tuple[str, ...]:
        """The one field."""
        return (self.target,)

    def pair(self, row: Mapping[str, Any]) -> tuple[str, str]:
        """The text with its mask, and the words under it.

        Raises:
            ValueError: As `Task.pair`, and on a text of one word.
        """
        self.check(row)
        words = row[self.target].split()
        if len(words) < 2:
            raise ValueError(f"field {self.target!r} has one word, infilling needs at least two")
        digest = hashlib.blake2b(row[self.target].encode(), digest_size=12).digest()
        count = min(1 + int.from_bytes(digest[:4], "little") % self.max_words, len(words) - 1)
        start = int.from_bytes(digest[4:], "little") % (len(words) - count + 1)
        hidden = words[start : start + count]
        return " ".join([*words[:start], MASK, *words[start + count :]]), " ".join(hidden)


TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task("question_answering", "{context} {question}", "answer", keep="end", metric="exact_match"),
        Task("classification", "{text}", "label", keep="start", metric="accuracy"),
        InfillingTask("infilling", "{text}", "text", keep="start", metric="token_f1"),
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

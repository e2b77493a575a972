"""Task templates: a row of a data set -> (source, target), for training, evaluation and answers to whole files alike.

The server takes sources as they are, and makes that of an infilling by the same template.

Where an answer is cut out of a text (infilling, last word, continuation), the place follows from the text itself, so
that it is the same wherever and whenever the row is read. docs/TASKS.md shows one example of each.
"""

from __future__ import annotations

import hashlib
import re
import string
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from yan_core.config import unknown_name
from yan_core.tokenization import MASK

OVERLAP = ("rouge_l", "rouge_1", "rouge_2", "bleu", "token_f1")
"""Metrics of answers that may be worded in many ways."""


@dataclass(frozen=True)
class Task:
    """How a row becomes a source and a target.

    Attributes:
        name: Name in configs and requests.
        source: Format string over the row's fields.
        target: Field that holds the answer.
        keep: Which end of a source stays when it is too long.
        metrics: What answers are scored by, the main one first; see yan_core/metrics.py.
        references: Field that may hold the list of all right answers; empty: there is one, the target.
        pipeline_tag: What the model hub calls such a task.
    """

    name: str
    source: str
    target: str
    keep: Literal["start", "end"]
    metrics: tuple[str, ...]
    references: str = ""
    pipeline_tag: str = "text-generation"

    @property
    def metric(self) -> str:
        """The main metric, the one that training looks at."""
        return self.metrics[0]

    @property
    def source_fields(self) -> tuple[str, ...]:
        """Fields that the source is made of."""
        return tuple(name for _, name, _, _ in string.Formatter().parse(self.source) if name)

    @property
    def fields(self) -> tuple[str, ...]:
        """Fields a row must have, the target last; the list of right answers may stand for the target."""
        return (*self.source_fields, self.target)

    @property
    def document(self) -> str:
        """Field that tells documents apart where no column does: the first one of the source, the text that is read."""
        return self.source_fields[0]

    def pair(self, row: Mapping[str, Any]) -> tuple[str, str]:
        """Source and target of a row.

        Raises:
            ValueError: If a field is missing, null, not text or blank; the message names it.
        """
        return self.prompt(row), self.answers(row)[0]

    def prompt(self, row: Mapping[str, Any]) -> str:
        """Source of a row whose answer is not known.

        Raises:
            ValueError: If a field of the source is missing, null, not text or blank; the message names it.
        """
        for name in self.source_fields:
            _check_text(row, name)
        return self.source.format_map(row)

    def answers(self, row: Mapping[str, Any]) -> list[str]:
        """Every right answer of a row, any of which counts; the first is the target that is trained on.

        That is the target field where the row has it, else the first of the list.

        Raises:
            ValueError: As `pair`, or if the list of right answers is empty or holds something else than text.
        """
        listed = row.get(self.references) if self.references else None
        if listed is None:
            _check_text(row, self.target, self.references)
            return [row[self.target]]
        if not isinstance(listed, (list, tuple)) or not listed:
            raise ValueError(f"field {self.references!r} must be a list of at least one text, got {listed!r:.80}")
        for entry in listed:
            if not isinstance(entry, str) or not entry.strip():
                raise ValueError(f"field {self.references!r} must hold texts that are not blank, got {entry!r:.80}")
        if row.get(self.target) is None:
            return list(listed)
        _check_text(row, self.target)
        return list(dict.fromkeys([row[self.target], *listed]))

    def texts(self, row: Mapping[str, Any]) -> list[str]:
        """What a vocabulary can be learnt from: the texts in the template's fields, whatever else is wrong."""
        found = [row[name] for name in dict.fromkeys(self.fields) if isinstance(row.get(name), str)]
        listed = row.get(self.references) if self.references else None
        return found + [entry for entry in listed or [] if isinstance(entry, str)]

    def whole(self, source: str, answer: str) -> str:
        """The text that an answer is a part of; the answer itself where it is none."""
        return answer


def _check_text(row: Mapping[str, Any], name: str, or_else: str = "") -> None:
    if name not in row:
        beside = f", and so is {or_else!r}" if or_else else ""
        raise ValueError(f"field {name!r} is missing{beside}; the row has {', '.join(sorted(map(str, row)))}")
    value = row[name]
    if not isinstance(value, str):
        raise ValueError(f"field {name!r} must be text, got {value!r} ({type(value).__name__})")
    if not value.strip():
        raise ValueError(f"field {name!r} is blank")


@dataclass(frozen=True)
class TextTask(Task, ABC):
    """A task whose source and target are parts of one text, the field `text`."""

    @abstractmethod
    def split(self, text: str, row: Mapping[str, Any]) -> tuple[str, str]:
        """The parts of a text that is not blank.

        Raises:
            ValueError: If it is too short to be cut in two.
        """

    @property
    def fields(self) -> tuple[str, ...]:
        """The one field."""
        return (self.target,)

    def pair(self, row: Mapping[str, Any]) -> tuple[str, str]:
        """Source and target of a row.

        Raises:
            ValueError: As `Task.pair`, and on a text that is too short to be cut in two.
        """
        _check_text(row, self.target)
        return self.split(row[self.target], row)

    def prompt(self, row: Mapping[str, Any]) -> str:
        """The text as it stands: nothing is cut out of it, as the answer is not in it.

        Raises:
            ValueError: If the text is missing, null, not text or blank.
        """
        return " ".join(super().prompt(row).split())

    def answers(self, row: Mapping[str, Any]) -> list[str]:
        """The one right answer: what was cut out."""
        return [self.pair(row)[1]]


@dataclass(frozen=True)
class InfillingTask(TextTask):
    """Text infilling: one run of words gives way to `<mask>`, and is the answer (arXiv:2604.15009, sec. on infilling).

    The answer is the hidden words alone: to write the whole text again and to score all of it would count what was
    copied. Of a long text the words around the mask are read, for else most masks would be cut off with its end.

    Attributes:
        max_words: Longest run; lengths are uniform in 1..max_words.
        context_words: Most words that are left before the mask, and after it.
        variant: Field that a row may have: rows of one text that differ in it have their masks at different places.
    """

    max_words: int = 3
    context_words: int = 64
    variant: str = "variant"

    def split(self, text: str, row: Mapping[str, Any]) -> tuple[str, str]:
        """The text with its mask, and the words under it.

        Raises:
            ValueError: On a text of one word.
        """
        words = text.split()
        if len(words) < 2:
            raise ValueError(f"field {self.target!r} has one word, infilling needs at least two")
        digest = hashlib.blake2b(f"{text}{row.get(self.variant) or ''}".encode(), digest_size=12).digest()
        count = min(1 + int.from_bytes(digest[:4], "little") % self.max_words, len(words) - 1)
        start = int.from_bytes(digest[4:], "little") % (len(words) - count + 1)
        end = start + count
        return self._join(words[:start], words[end:]), " ".join(words[start:end])

    def around(self, text: str) -> str:
        """A text with its mask as `split` makes it: of a long one, the words around the mask."""
        before, _, after = text.partition(MASK)
        return self._join(before.split(), after.split())

    def _join(self, before: list[str], after: list[str]) -> str:
        return " ".join([*before[max(0, len(before) - self.context_words) :], MASK, *after[: self.context_words]])

    def prompt(self, row: Mapping[str, Any]) -> str:
        """A text that has its mask already, with as many words around it as in training.

        Raises:
            ValueError: As `TextTask.prompt`, and on a text without a mask or with several.
        """
        text = super().prompt(row)
        if text.count(MASK) != 1:
            raise ValueError(
                f"field {self.target!r} must have {MASK} once, where words are missing, got it {text.count(MASK)} times"
            )
        return self.around(text)

    def whole(self, source: str, answer: str) -> str:
        """The source with the answer in the place of its mask."""
        return source.replace(MASK, answer, 1)


@dataclass(frozen=True)
class LastWordTask(TextTask):
    """Last-word completion: the text without its last word -> that word (as in LAMBADA, arXiv:1606.06031).

    Punctuation after the word belongs to neither side, since a full stop would be easy to say and tells that the word
    is the last one; an opening quote before the word stays with the source.
    """

    def split(self, text: str, row: Mapping[str, Any]) -> tuple[str, str]:
        """The text before its last word, and the word.

        Raises:
            ValueError: If there are fewer than two words.
        """
        words = text.split()
        while words and not re.search(r"[^\W_]", words[-1]):
            words.pop()
        if len(words) < 2:
            raise ValueError(f"field {self.target!r} has fewer than two words, there is no last one to leave out")
        found = re.fullmatch(r"([\W_]*)([^\W_](?:.*[^\W_])?)[\W_]*", words[-1])
        assert found is not None
        opening, word = found.groups()
        return " ".join([*words[:-1], *([opening] if opening else [])]), word


@dataclass(frozen=True)
class ContinuationTask(TextTask):
    """Free continuation: the first half of a text's sentences -> the sentences that follow.

    A text of one sentence is cut in the middle of its words.

    Attributes:
        max_words: The target is as many whole sentences as have no more words together; at least the first words.
    """

    max_words: int = 40

    def split(self, text: str, row: Mapping[str, Any]) -> tuple[str, str]:
        """The first half, and what follows.

        Raises:
            ValueError: On a text of one word.
        """
        parts = [part.split() for part in re.split(r"(?<=[.!?])\s+|(?<=[.!?][\"'”’)])\s+", text.strip())]
        if len(parts) < 2:
            parts = [[word] for word in text.split()]
        if len(parts) < 2:
            raise ValueError(f"field {self.target!r} has one word, a continuation needs at least two")
        half = (len(parts) + 1) // 2
        target = parts[half][: self.max_words]
        for part in parts[half + 1 :]:
            if len(target) + len(part) > self.max_words:
                break
            target = [*target, *part]
        return " ".join(word for part in parts[:half] for word in part), " ".join(target)


TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task(
            "question_answering",
            "{context} {question}",
            "answer",
            keep="end",
            metrics=("exact_match", "token_f1", "squad_em", "squad_f1", "rouge_l", "rouge_1", "rouge_2"),
            references="answers",
            pipeline_tag="question-answering",
        ),
        Task(
            "classification",
            "{text}",
            "label",
            keep="start",
            metrics=("accuracy", "macro_f1"),
            pipeline_tag="text-classification",
        ),
        Task("summarisation", "{text}", "summary", keep="start", metrics=OVERLAP, pipeline_tag="summarization"),
        InfillingTask(
            "infilling",
            "{text}",
            "text",
            keep="start",
            metrics=("token_f1", "exact_match", "rouge_l", "rouge_1", "rouge_2", "bleu"),
            pipeline_tag="fill-mask",
        ),
        LastWordTask("last_word", "{text}", "text", keep="end", metrics=("exact_match", "squad_em")),
        ContinuationTask("continuation", "{text}", "text", keep="end", metrics=OVERLAP),
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

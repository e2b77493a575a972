"""Text <-> token ids, with a vocabulary trained on the corpus.

Both kinds keep spaces inside the tokens, so that decoding an encoding gives the text back.
"""

from __future__ import annotations

import array
import itertools
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, trainers

from yan_core.config import TokenizerConfig
from yan_core.word_cache import WORDS, word_cache

PAD, EOS, UNK, MASK = "<pad>", "<eos>", "<unk>", "<mask>"
SPECIAL_TOKENS = (PAD, EOS, UNK, MASK)
"""Padding, end of text, unknown word, masked span; their ids are 0 to 3."""


@dataclass(frozen=True)
class Encoding:
    """Token ids of one text, and how many tokens were cut off to fit."""

    ids: list[int]
    num_cut: int


CHARS_AT_ONCE = 1 << 18
"""Characters that the backend encodes in one call: its encodings take a hundred times the room of the text."""

TABLE_THREADS = 4
"""Up to so many threads the table of words is faster than the backend with all of them."""


def _at_once(texts: Sequence[str], most: int) -> Iterator[list[str]]:
    """The texts in groups of at most so many characters, or of one text."""
    group: list[str] = []
    size = 0
    for text in texts:
        if group and size + len(text) > most:
            yield group
            group, size = [], 0
        group.append(text)
        size += len(text)
    if group:
        yield group


class Tokenizer:
    """A `tokenizers` tokenizer with YAN's special tokens.

    In a text, `<mask>` stands for a masked span; the other special tokens are never read from text.
    """

    pad_id, eos_id, unk_id, mask_id = range(4)

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        """Wrap a tokenizer whose first four ids are SPECIAL_TOKENS.

        Raises:
            ValueError: If they are not.
        """
        found = [backend.token_to_id(token) for token in SPECIAL_TOKENS]
        if found != [0, 1, 2, 3]:
            raise ValueError(f"the tokenizer's ids of {SPECIAL_TOKENS} must be 0 to 3, got {found}")
        self.backend = backend
        self._words = word_cache(backend)

    @classmethod
    def train(cls, texts: Iterable[str], config: TokenizerConfig) -> Tokenizer:
        """Learn a vocabulary.

        Args:
            texts: The corpus, or a sample of it.
            config: Kind and size of the vocabulary.

        Raises:
            ValueError: If the texts hold no word.
        """
        # The mask takes the space before it, or that space would be a token which no masked text of training holds.
        special_tokens = [AddedToken(token, special=True, lstrip=token == MASK) for token in SPECIAL_TOKENS]
        if config.kind == "word":
            special_ids = {token: i for i, token in enumerate(SPECIAL_TOKENS)}
            backend = tokenizers.Tokenizer(models.WordLevel(special_ids, unk_token=UNK))
            # Each word or run of punctuation keeps the space before it ("▁"), so the text can be put together again.
            backend.pre_tokenizer = pre_tokenizers.Sequence(
                [
                    pre_tokenizers.Metaspace(prepend_scheme="always", split=False),
                    pre_tokenizers.Split(Regex(WORDS), behavior="isolated"),
                ]
            )
            backend.decoder = decoders.Metaspace(prepend_scheme="always")
            trainer = trainers.WordLevelTrainer(
                vocab_size=config.vocab_size, special_tokens=special_tokens, show_progress=False
            )
        else:
            backend = tokenizers.Tokenizer(models.BPE(unk_token=UNK))
            backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
            backend.decoder = decoders.ByteLevel()
            trainer = trainers.BpeTrainer(
                vocab_size=config.vocab_size,
                special_tokens=special_tokens,
                initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
                show_progress=False,
            )
        if config.lowercase:
            backend.normalizer = normalizers.Lowercase()
        backend.train_from_iterator(texts, trainer)
        words = (token.strip("▁") for token in backend.get_vocab() if token not in SPECIAL_TOKENS)
        if config.kind == "word" and not any(word and not word.isspace() for word in words):
            raise ValueError("no word was found to make a vocabulary of: the corpus is empty or blank")
        return cls(backend)

    @classmethod
    def from_json(cls, text: str) -> Tokenizer:
        """Read a tokenizer from the text of its `tokenizer.json`."""
        return cls(tokenizers.Tokenizer.from_str(text))

    def to_json(self) -> str:
        """The text of a `tokenizer.json`, readable by the `tokenizers` and `transformers` libraries."""
        return self.backend.to_str(pretty=True)

    def transformers_json(self) -> str:
        """The text of the `tokenizer_config.json` that `transformers.AutoTokenizer` wants beside `tokenizer.json`.

        It encodes as `encode_batch` does, but reads `<pad>` and `<eos>` from text too.
        """
        names = {"pad_token": PAD, "eos_token": EOS, "unk_token": UNK, "mask_token": MASK}
        kind = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
        return json.dumps({**kind, **names}, indent=2)

    @property
    def vocab_size(self) -> int:
        """Number of token ids, special tokens included."""
        return self.backend.get_vocab_size()

    def encode_batch(
        self, texts: Sequence[str], max_tokens: int | None = None, keep: Literal["start", "end"] = "start"
    ) -> list[Encoding]:
        """Encode texts.

        Args:
            texts: Texts.
            max_tokens: Longest result, in tokens; None: no limit.
            keep: Which end of a longer text stays.

        Returns:
            One encoding a text; no special token is added.
        """
        result = []
        for found in self.backend.encode_batch_fast(list(texts), add_special_tokens=False):
            ids = [i if i not in (self.pad_id, self.eos_id) else self.unk_id for i in found.ids]
            num_cut = 0 if max_tokens is None else max(0, len(ids) - max_tokens)
            if num_cut:
                ids = ids[num_cut:] if keep == "end" else ids[:max_tokens]
            result.append(Encoding(ids=ids, num_cut=num_cut))
        return result

    def encode_arrays(self, texts: Sequence[str], threads: int = 1) -> tuple[np.ndarray, np.ndarray]:
        """Encode texts into one array, for many texts at a time.

        Args:
            texts: Texts.
            threads: How many there are for it. The table of words is read by one, which many are faster than.

        Returns:
            Token ids of all texts, int32, [tokens], and where each text begins and the last one ends, int64,
            [texts + 1]; no special token is added.
        """
        table = self._words if threads <= TABLE_THREADS else None
        known = [None if table is None else table.ids(text) for text in texts]
        left = [text for text, ids in zip(texts, known, strict=True) if ids is None]
        rest = (
            array.array("i", encoding.ids).tobytes()
            for some in _at_once(left, CHARS_AT_ONCE)
            for encoding in self.backend.encode_batch_fast(some, add_special_tokens=False)
        )
        parts = [next(rest) if ids is None else ids for ids in known]
        values = np.frombuffer(bytearray().join(parts), np.int32)
        values[(values == self.pad_id) | (values == self.eos_id)] = self.unk_id
        return values, np.cumsum([0, *map(len, parts)], dtype=np.int64) // values.itemsize

    def normalize(self, text: str) -> str:
        """The text as this tokenizer can write it: in lower case where it was trained so, else unchanged."""
        return text if self.backend.normalizer is None else self.backend.normalizer.normalize_str(text)

    def until_eos(self, ids: Sequence[int]) -> list[int]:
        """The ids before the first end-of-text token."""
        ids = list(ids)
        return ids[: ids.index(self.eos_id)] if self.eos_id in ids else ids

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids, up to the first end-of-text token; padding and unknown words are left out."""
        return self.backend.decode(self.until_eos(ids), skip_special_tokens=True).strip()

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """What each token adds to the text: as many as there are ids before the end of text, together `decode(ids)`.

        A token that ends in the middle of a character adds nothing, the one that ends the character all of it.
        """
        ids = self.until_eos(ids)
        starts = self.backend.decode_batch([ids[: i + 1] for i in range(len(ids))], skip_special_tokens=True)
        text, ends = self.decode(ids), [0]
        for start in starts:
            ends.append(max(ends[-1], len(os.path.commonprefix([start.strip(), text]))))
        ends[-1] = len(text) if ids else 0
        return [text[start:end] for start, end in itertools.pairwise(ends)]

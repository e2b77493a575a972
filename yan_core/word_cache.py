"""Token ids of texts word by word, each word given to the tokenizer once.

A tokenizer of ours splits a text by an expression and looks at each word alone, so the ids of a text are those of its
words in a row. A table of words is therefore exact. What it cannot be sure of is left to the tokenizer itself: special
tokens in the text, and characters beyond CHARACTERS, about whose classes two versions of Unicode may differ. So are
texts of which too many words are new (identifiers, hexadecimal numbers): to ask for words one by one is slower.
"""

from __future__ import annotations

import array
import json
import re
import unicodedata

import tokenizers
from tokenizers import pre_tokenizers

CHARACTERS = [
    *range(0x2B0),
    *range(0x300, 0x370),
    *range(0x400, 0x530),
    *range(0x2010, 0x2028),
    *range(0x2030, 0x205F),
    *range(0x20A0, 0x20C0),
    *range(0x2100, 0x2460),
    *range(0x2500, 0x2581),  # without "▁", which Metaspace puts in the place of spaces
    *range(0x2582, 0x2800),
    *range(0x1F300, 0x1FB00),
]
"""Latin and Cyrillic letters, accents, punctuation, signs and emoji. Of Greek capitals, lower case depends on place."""

MOST_WORDS, LONGEST_WORD = 1 << 17, 64
"""Words that a table holds, some 25 MB, before it begins anew; longer ones, in characters, are not kept."""

LOOK_AFTER, MOST_NEW = 1 << 15, 0.15
"""After how many words it is looked how many were new, and the share from which on the tokenizer is asked for whole
texts: for LEAST_PAUSE of them, and for twice as many each time until fewer are new, at most MOST_PAUSE."""
LEAST_PAUSE, MOST_PAUSE = 1 << 10, 1 << 16

BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}
METASPACE = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": False}
WORDS = r"▁?\w+|▁?[^\w▁]|▁"
"""How the vocabulary of words splits a text: each word or sign keeps the space before it."""


def _class(*categories: str) -> str:
    """The characters of some Unicode categories, for an expression's brackets."""
    return "".join(re.escape(chr(c)) for c in CHARACTERS if unicodedata.category(chr(c)).startswith(categories))


_SPACES = "\t-\r \x85\xa0"
_LETTERS, _NUMBERS = _class("L"), _class("N")
_IN_WORDS = _class("L", "M", "Nd", "Nl", "Pc") + "\xb2\xb3\xb9\xbc\xbd\xbe"  # of the other numbers, Latin-1's alone
_KNOWN = re.compile(f"[{''.join(re.escape(chr(c)) for c in CHARACTERS)}]*")
_BYTE_LEVEL_WORDS = re.compile(
    rf" ?[{_LETTERS}]+| ?[{_NUMBERS}]+|'(?:[stmd]|re|ve|ll)| ?[^{_SPACES}{_LETTERS}{_NUMBERS}]+"
    rf"|[{_SPACES}]+(?![^{_SPACES}])|[{_SPACES}]+"
)
"""The expression of ByteLevel (that of GPT-2) with its classes written out for CHARACTERS."""
_METASPACE_WORDS = re.compile(f"▁?[{_IN_WORDS}]+|▁?[^{_IN_WORDS}▁]|▁")


class WordCache(dict[str, bytes]):
    """Word -> its token ids as the bytes of int32 numbers; a word that is not there is asked for and kept."""

    def __init__(self, backend: tokenizers.Tokenizer, byte_level: bool, lower: bool) -> None:
        """See `word_cache`."""
        self.model, self.byte_level, self.lower = backend.model, byte_level, lower
        self.special = list(backend.get_added_tokens_decoder().values())
        self.to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        self.words = self.new = self.texts_left = 0
        self.pause = LEAST_PAUSE

    def __missing__(self, word: str) -> bytes:
        self.new += 1
        written = self.to_bytes.pre_tokenize_str(word)[0][0] if self.byte_level else word
        found = array.array("i", [token.id for token in self.model.tokenize(written)]).tobytes()
        if len(word) <= LONGEST_WORD:
            if len(self) >= MOST_WORDS:
                self.clear()
            self[word] = found
        return found

    def _look(self) -> None:
        """Leave some texts to the tokenizer where too many words were new."""
        if self.new > MOST_NEW * self.words:
            self.texts_left, self.pause = self.pause, min(2 * self.pause, MOST_PAUSE)
        else:
            self.pause = LEAST_PAUSE
        self.words = self.new = 0

    def ids(self, text: str) -> bytes | None:
        """Token ids of a text as the bytes of int32 numbers; None if the tokenizer has to be asked."""
        if self.texts_left:
            self.texts_left -= 1
            return None
        if "<" in text and any(token.content in text for token in self.special):
            return None
        if self.lower:
            text = text.lower()
        if not text.isascii() and not _KNOWN.fullmatch(text):
            return None
        if not text:
            return b""
        if self.byte_level:
            words = _BYTE_LEVEL_WORDS.findall(text if text[0] == " " else f" {text}")
        else:
            words = _METASPACE_WORDS.findall(("" if text[0] == " " else "▁") + text.replace(" ", "▁"))
        found = b"".join(map(self.__getitem__, words))
        self.words += len(words)
        if self.words >= LOOK_AFTER:
            self._look()
        return found


def word_cache(backend: tokenizers.Tokenizer) -> WordCache | None:
    """An empty table for a tokenizer, as it is now; None if it is not made as ours are."""
    made = json.loads(backend.to_str())
    normal = made["normalizer"] in (None, {"type": "Lowercase"})
    tokens = all(t["special"] and "<" in t["content"] and not t["normalized"] for t in made["added_tokens"])
    plain = not (made["truncation"] or made["padding"] or made["post_processor"] or made["model"].get("dropout"))
    byte_level = made["model"]["type"] == "BPE" and made["pre_tokenizer"] == BYTE_LEVEL
    split = {"type": "Split", "pattern": {"Regex": WORDS}, "behavior": "Isolated", "invert": False}
    sequence = {"type": "Sequence", "pretokenizers": [METASPACE, split]}
    words = made["model"]["type"] == "WordLevel" and made["pre_tokenizer"] == sequence
    if normal and tokens and plain and (byte_level or words):
        return WordCache(backend, byte_level, lower=made["normalizer"] is not None)
    return None

"""Ids word by word: those of the tokenizer itself, for every text that the table takes on."""

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import pre_tokenizers

from yan_core import word_cache as module
from yan_core.config import TokenizerConfig
from yan_core.tokenization import SPECIAL_TOKENS, Tokenizer
from yan_core.word_cache import CHARACTERS, word_cache

TEXTS = ["The cat's here: 12 of them, and don't ask.", "Caf\u00e9 \u2014 it is 1\u00b2 or \u00bd", "a_b x  y"]
KINDS = [("bpe", False), ("bpe", True), ("word", False), ("word", True)]
PARTS = [
    "a",
    "B",
    "z1",
    " ",
    "  ",
    "\n",
    "\t",
    ".",
    ",",
    "'s",
    "'LL",
    "'",
    "\u00e9",
    "\u2014",
    "9",
    "_",
    "\u00a0",
    "<",
    "\u4e2d",
]


@pytest.fixture(scope="module")
def made() -> dict[tuple[str, bool], Tokenizer]:
    configs = {(k, lower): TokenizerConfig(kind=k, lowercase=lower, vocab_size=300) for k, lower in KINDS}  # type: ignore[arg-type]
    return {key: Tokenizer.train(TEXTS * 3, config) for key, config in configs.items()}


def ids_of(tokenizer: Tokenizer, texts: list[str]) -> list[list[int]]:
    values, ends = tokenizer.encode_arrays(texts)
    return [values[start:end].tolist() for start, end in zip(ends, ends[1:], strict=False)]


@pytest.mark.parametrize("kind", KINDS)
def test_every_known_character_is_read_as_the_tokenizer_does(made, kind, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "LOOK_AFTER", 10**9)  # so many words are new
    texts = [f"a{c}b {c} 1{c}2 {c}{c} .{c} x  {c}  {c}" for c in map(chr, CHARACTERS)]
    table = word_cache(made[kind].backend)
    assert table is not None
    taken = [text for text in texts if table.ids(text) is not None]
    assert len(taken) >= len(texts) - 12  # lower case may be beyond them
    tokenizer = Tokenizer(made[kind].backend)
    assert ids_of(tokenizer, texts) == [e.ids for e in tokenizer.encode_batch(texts)]


@settings(max_examples=400, deadline=None)
@given(
    text=st.lists(st.sampled_from([*PARTS, *SPECIAL_TOKENS, "<MASK>"]), max_size=12).map("".join) | st.text(max_size=30)
)
def test_any_text_is_read_as_the_tokenizer_does(made, text):
    for tokenizer in made.values():
        assert ids_of(tokenizer, [text, "between", text]) == [
            e.ids for e in tokenizer.encode_batch([text, "between", text])
        ]


def test_what_may_be_read_otherwise_is_left_to_the_tokenizer(made):
    table = word_cache(made["bpe", False].backend)
    assert table is not None
    assert all(table.ids(f"a {token} b") is None for token in SPECIAL_TOKENS)
    assert table.ids("a \u4e2d b") is None and table.ids("\u03a3\u03a3") is None
    assert table.ids("\u2581a") is None
    assert table.ids("a <b> c") is not None and table.ids("") == b""


def test_a_full_table_begins_anew_and_gives_the_same(made, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "MOST_WORDS", 3)
    tokenizer = Tokenizer(made["bpe", False].backend)
    assert ids_of(tokenizer, TEXTS) == [e.ids for e in tokenizer.encode_batch(TEXTS)]
    assert tokenizer._words is not None and 1 <= len(tokenizer._words) <= 3


def test_another_tokenizer_than_ours_has_no_table(made):
    text = made["bpe", False].to_json()
    for change in (
        lambda t: setattr(t, "pre_tokenizer", pre_tokenizers.Whitespace()),
        lambda t: setattr(t, "normalizer", tokenizers.normalizers.NFKC()),
        lambda t: t.enable_truncation(3),
        lambda t: t.add_tokens(["here"]),
        lambda t: t.add_special_tokens(["[CLS]"]),
    ):
        other = tokenizers.Tokenizer.from_str(text)
        change(other)
        assert word_cache(other) is None
        tokenizer = Tokenizer(other)
        assert ids_of(tokenizer, TEXTS) == [e.ids for e in tokenizer.encode_batch(TEXTS)]
        assert ids_of(tokenizer, ["[CLS] here"]) == [tokenizer.encode_batch(["[CLS] here"])[0].ids]
    assert word_cache(tokenizers.Tokenizer.from_str(text)) is not None


def test_texts_of_new_words_are_left_to_the_tokenizer_for_longer_and_longer(made, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "LOOK_AFTER", 20)
    monkeypatch.setattr(module, "LEAST_PAUSE", 4)
    monkeypatch.setattr(module, "MOST_PAUSE", 8)
    table = word_cache(made["bpe", False].backend)
    assert table is not None

    def left_alone(texts: list[str]) -> int:
        return sum(table.ids(text) is None for text in texts)

    new = iter(" ".join(f"{chr(97 + i % 26)}{chr(97 + i // 26)}{chr(97 + j)}" for j in range(20)) for i in range(600))
    assert left_alone([next(new) for _ in range(1 + 4)]) == 4
    assert left_alone([next(new) for _ in range(1 + 8 + 1 + 8)]) == 16
    assert left_alone(["a b " * 10]) == 0  # all known, or nearly
    assert left_alone([next(new) for _ in range(1 + 4)]) == 4


def test_a_long_word_is_not_kept(made):
    tokenizer = Tokenizer(made["bpe", False].backend)
    texts = ["acgt" * 1000, "short"]
    assert ids_of(tokenizer, texts) == [e.ids for e in tokenizer.encode_batch(texts)]
    assert tokenizer._words is not None and list(tokenizer._words) == [" short"]

"""Tokenization: texts come back, special tokens stay ours, and what is cut is counted."""

from pathlib import Path

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from yan_core.config import TokenizerConfig
from yan_core.tokenization import SPECIAL_TOKENS, Encoding, Tokenizer

TEXTS = [
    "Mary went to the kitchen. Where is the apple?",
    "Don't stop -- it's 3.14, or 1,000; a_b/c!",
    "naïve café — “quoted” … ½ №7",
    "日本語のテキスト と русский и العربية",
    "emoji 🙂👩‍👩‍👧 and combining e\u0301",
    "two  spaces,   three and\ta tab\nand a line",
    "<b>not special</b> <mas k> [MASK] < mask >",
    "CamelCase UPPER lower 0x1F",
]


def train(kind: str, texts: list[str] = TEXTS, **settings: object) -> Tokenizer:
    return Tokenizer.train(texts, TokenizerConfig(kind=kind, vocab_size=600, **settings))  # type: ignore[arg-type]


@pytest.fixture(scope="module", params=["word", "bpe"])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    return train(request.param)


def ids_of(tokenizer: Tokenizer, text: str) -> list[int]:
    return tokenizer.encode_batch([text])[0].ids


@pytest.mark.parametrize("text", TEXTS)
def test_decoding_an_encoding_gives_the_text_back(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(ids_of(tokenizer, text)) == text


def test_space_around_a_text_is_not_kept(tokenizer: Tokenizer) -> None:
    assert tokenizer.decode(ids_of(tokenizer, "  the apple ")) == "the apple"


BPE = train("bpe")


@pytest.mark.property
@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.text(max_size=60).filter(lambda text: not any(token in text for token in SPECIAL_TOKENS)))
def test_bytes_of_any_text_come_back(text: str) -> None:
    ids = ids_of(BPE, text)
    assert BPE.decode(ids) == text.strip()
    assert not set(ids) & {0, 1, 2, 3}


def test_a_text_keeps_its_tokens_whatever_else_is_in_the_batch(tokenizer: Tokenizer) -> None:
    together = [encoding.ids for encoding in tokenizer.encode_batch(TEXTS)]
    assert together == [ids_of(tokenizer, text) for text in TEXTS]


def test_a_word_that_was_not_met_is_unknown_and_left_out_of_text() -> None:
    tokenizer = train("word")
    ids = ids_of(tokenizer, "the zebra kitchen")
    assert ids[1] == Tokenizer.unk_id and ids.count(Tokenizer.unk_id) == 1
    assert tokenizer.decode(ids) == "the kitchen"


def test_lowercase(tokenizer: Tokenizer) -> None:
    lower = train("word", lowercase=True)
    assert lower.decode(ids_of(lower, "Mary WENT")) == "mary went"
    assert tokenizer.decode(ids_of(tokenizer, "Mary UPPER")) == "Mary UPPER"


def test_special_tokens_have_the_first_ids(tokenizer: Tokenizer) -> None:
    assert (Tokenizer.pad_id, Tokenizer.eos_id, Tokenizer.unk_id, Tokenizer.mask_id) == (0, 1, 2, 3)
    assert [tokenizer.backend.id_to_token(i) for i in range(4)] == list(SPECIAL_TOKENS)


@pytest.mark.parametrize("token", ["<pad>", "<eos>", "<unk>"])
@pytest.mark.parametrize("around", ["{}", "the {} apple", "the{}apple", "{}{}"])
def test_special_tokens_are_never_read_from_text(tokenizer: Tokenizer, token: str, around: str) -> None:
    ids = ids_of(tokenizer, around.replace("{}", token))
    assert not set(ids) & {Tokenizer.pad_id, Tokenizer.eos_id, Tokenizer.mask_id}


@pytest.mark.parametrize("text", ["the <mask> apple", "the<mask>apple", "the <mask>apple", "the<mask> apple"])
def test_mask_in_a_text_is_one_token_and_brings_none_with_it(tokenizer: Tokenizer, text: str) -> None:
    the, apple = ids_of(tokenizer, "the apple")
    assert ids_of(tokenizer, text) == [the, Tokenizer.mask_id, apple]


def test_no_special_token_is_added(tokenizer: Tokenizer) -> None:
    assert ids_of(tokenizer, "") == []


@pytest.mark.parametrize(("keep", "left"), [("start", slice(0, 3)), ("end", slice(-3, None))])
def test_what_is_too_long_is_cut_at_the_other_end_and_counted(tokenizer: Tokenizer, keep: str, left: slice) -> None:
    texts = ["Mary went to the kitchen", "the apple", "Mary went the"]
    whole = [ids_of(tokenizer, text) for text in texts]
    cut = tokenizer.encode_batch(texts, max_tokens=3, keep=keep)  # type: ignore[arg-type]
    assert cut == [Encoding(ids=ids[left], num_cut=max(0, len(ids) - 3)) for ids in whole]


@pytest.mark.parametrize("keep", ["start", "end"])
def test_cutting_to_nothing_and_not_cutting(tokenizer: Tokenizer, keep: str) -> None:
    text = "Mary went to the kitchen"
    ids = ids_of(tokenizer, text)
    assert tokenizer.encode_batch([text], 0, keep) == [Encoding(ids=[], num_cut=len(ids))]  # type: ignore[arg-type]
    assert tokenizer.encode_batch([text], len(ids), keep) == [Encoding(ids=ids, num_cut=0)]  # type: ignore[arg-type]


def test_text_ends_at_the_first_end_of_text_token(tokenizer: Tokenizer) -> None:
    the, apple = ids_of(tokenizer, "the apple")
    assert tokenizer.until_eos([the, 1, apple, 1]) == [the]
    assert tokenizer.until_eos([the, apple]) == [the, apple]
    assert tokenizer.until_eos([1]) == tokenizer.until_eos([]) == []
    assert tokenizer.decode([the, 1, apple]) == "the"
    assert tokenizer.decode([the, 0, apple, 3]) == "the apple"


@pytest.mark.parametrize("texts", [[], ["", "   "], ["\n"]])
def test_a_corpus_without_a_word_is_refused(texts: list[str]) -> None:
    with pytest.raises(ValueError, match="corpus is empty or blank"):
        train("word", texts)


def test_json_round_trip(tokenizer: Tokenizer) -> None:
    again = Tokenizer.from_json(tokenizer.to_json())
    texts = [*TEXTS, "the <mask> apple", "a <eos> b", "never met: ẞ"]
    assert again.encode_batch(texts) == tokenizer.encode_batch(texts)
    assert again.vocab_size == tokenizer.vocab_size
    assert again.to_json() == tokenizer.to_json()


@pytest.mark.parametrize("kind", ["word", "bpe"])
@pytest.mark.parametrize("lowercase", [False, True])
def test_transformers_reads_it_to_the_same_ids_and_texts(tmp_path: Path, kind: str, lowercase: bool) -> None:
    transformers = pytest.importorskip("transformers", reason="needs the extra `baselines`")
    ours = train(kind, lowercase=lowercase)
    (tmp_path / "tokenizer.json").write_text(ours.to_json(), encoding="utf-8")
    (tmp_path / "tokenizer_config.json").write_text(ours.transformers_json(), encoding="utf-8")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path, local_files_only=True)
    masked = ["the <mask> apple", "the<mask>apple", "Mary WENT to the <mask>, twice", "<mask>"]
    texts = [*TEXTS, *masked, "", "  the  apple ", "never met: ẞ zebra", "The KITCHEN , the apple ."]
    assert theirs(texts)["input_ids"] == [ids_of(ours, text) for text in texts]
    for text in texts:
        ids = ids_of(ours, text)
        assert theirs.decode(ids, skip_special_tokens=True).strip() == ours.decode(ids)
    special = (theirs.pad_token_id, theirs.eos_token_id, theirs.unk_token_id, theirs.mask_token_id)
    assert special == (0, 1, 2, 3) and len(theirs) == ours.vocab_size
    theirs.save_pretrained(tmp_path / "again")
    again = transformers.AutoTokenizer.from_pretrained(tmp_path / "again", local_files_only=True)
    assert again(texts)["input_ids"] == theirs(texts)["input_ids"]


def test_training_is_deterministic_and_bounded(tokenizer: Tokenizer) -> None:
    assert train("bpe").to_json() == BPE.to_json()
    small = Tokenizer.train(TEXTS, TokenizerConfig(kind="word", vocab_size=10))
    assert small.vocab_size == 10
    assert 4 < tokenizer.vocab_size <= 600


def test_a_tokenizer_with_other_special_ids_is_refused() -> None:
    with pytest.raises(ValueError, match=r"must be 0 to 3, got \[None"):
        Tokenizer(tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0}, unk_token="a")))


@pytest.mark.parametrize("text", [*TEXTS, "", " the apple "])
def test_the_pieces_of_tokens_make_up_the_text(tokenizer: Tokenizer, text: str) -> None:
    ids = ids_of(tokenizer, text)
    pieces = tokenizer.pieces([*ids, Tokenizer.eos_id, 5])
    assert len(pieces) == len(ids)
    assert "".join(pieces) == tokenizer.decode(ids)


def test_a_piece_has_the_space_before_its_word() -> None:
    words = train("word")
    assert words.pieces(ids_of(words, "the apple.")) == ["the", " apple", "."]


@pytest.mark.parametrize("most", [1, 20, 1 << 18])
def test_many_texts_become_the_ids_of_each_however_many_are_encoded_at_once(
    tokenizer: Tokenizer, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("yan_core.tokenization.CHARS_AT_ONCE", most)
    texts = [*TEXTS, "", *TEXTS[::-1]]
    values, offsets = tokenizer.encode_arrays(texts)
    found = [values[a:b].tolist() for a, b in zip(offsets[:-1], offsets[1:], strict=True)]
    assert found == [ids_of(tokenizer, text) for text in texts]
    assert all(map(np.array_equal, (values, offsets), tokenizer.encode_arrays(texts, threads=16)))
    values, offsets = tokenizer.encode_arrays([])
    assert (len(values), offsets.tolist()) == (0, [0])

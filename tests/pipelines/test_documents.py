"""Which texts are kept: clean-up, duplicates, and documents that fall into one split."""

import sys
import unicodedata
from dataclasses import replace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.documents import clean, document_key, split_of, text_key
from pipelines.listing import DataError
from pipelines.prepare import prepare
from tests.pipelines.rows import ROWS, config_for, corpus_config, windows_of, write
from yan_core.config import CleanConfig, DatasetConfig, RunConfig, from_dict

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("local_ray")]


def test_texts_are_cleaned_and_those_too_short_or_long_counted(tmp_path):
    texts = [
        "cafe\u0301 \u200bau lait",
        "no",
        "a " * 100,
        "  ",
        "plain words here",
        "tab\tand\x00null",
        "\u200b\x00",
        "no\x00",
    ]
    config = corpus_config(tmp_path, texts, clean={"min_chars": 3, "max_chars": 50})
    prepared = prepare(config, tmp_path / "out")
    assert windows_of(prepared) == sorted(["caf\u00e9 au lait", "plain words here", "tab\tandnull"])
    assert prepared.manifest["dropped"] == {"too short": 2, "too long": 1, "blank": 2}


STORY = "The quick brown fox jumps over the lazy dog and runs far away into the deep green forest near the old mill"


@pytest.mark.parametrize("duplicates, left", [("keep", 5), ("exact", 4), ("near", 3)])
def test_of_duplicates_the_first_stays_whichever_file_it_is_in(tmp_path, duplicates, left):
    near = STORY.replace("mill", "bridge")
    texts = [STORY, "Something else altogether that shares no words", f"  {STORY.upper()} ", near, "A last one, apart"]
    clean = {"duplicates": duplicates} | ({"near_threshold": 0.7} if duplicates == "near" else {})
    config = corpus_config(tmp_path, texts, clean=clean)
    prepared = prepare(config, tmp_path / "out")
    found = windows_of(prepared)
    assert len(found) == left and sum(STORY in text for text in found) == 1
    assert prepared.manifest["dropped"] == ({"duplicate": 5 - left} if left < 5 else {})


def test_rows_of_one_document_fall_into_one_split(tmp_path):
    rows = [{**ROWS[0], "story": f"Passage number {i // 5}.", "question": f"Which {i}?"} for i in range(1000)]
    path = tmp_path / "all.parquet"
    pq.write_table(pa.Table.from_pylist(rows), path)
    own = {"train": str(path), "held_out": 0.2, "document": "story", "columns": {"context": "story"}}
    config = from_dict(RunConfig, {"data": {"dataset": "own", "datasets": {"own": own}}})
    prepared = prepare(config, tmp_path / "out")
    counts = prepared.manifest["rows"]
    assert counts["finetune"] + counts["validation"] + counts["test"] == 1000
    assert 100 < counts["validation"] < 300 and 100 < counts["test"] < 300
    assert prepared.manifest["dropped"] == {"held out": counts["validation"] + counts["test"]}

    def passages(part: str) -> set[str]:
        table = pq.read_table(prepared.folder / part).to_pylist()
        texts = [prepared.tokenizer.decode(r["source"]) if part == "finetune" else r["source"] for r in table]
        return {text.split(".")[0] for text in texts}

    train, validation, test = (passages(part) for part in ("finetune", "validation", "test"))
    assert not train & validation and not train & test and not validation & test
    assert len(train | validation | test) == 200


def test_a_passage_of_the_validation_rows_is_not_trained_on(tmp_path):
    rows = [{**ROWS[0], "story": f"Passage {i}."} for i in range(20)]
    other = [{**ROWS[0], "story": f"passage  {i}.", "question": "Where was Mary?"} for i in range(0, 20, 4)]
    for name, part in (("train", rows), ("validation", other)):
        pq.write_table(pa.Table.from_pylist(part), tmp_path / f"{name}.parquet")
    own = {"train": str(tmp_path / "train.parquet"), "validation": str(tmp_path / "validation.parquet")}
    own |= {"document": "story", "columns": {"context": "story"}}
    config = from_dict(RunConfig, {"data": {"dataset": "own", "datasets": {"own": own}}})
    prepared = prepare(config, tmp_path / "out")
    assert prepared.manifest["rows"]["finetune"] == 15 and prepared.manifest["dropped"] == {"in validation": 5}


def test_a_passage_of_the_validation_rows_is_left_out_of_the_corpus(tmp_path):
    texts = "".join(f"Passage {i} is a long one.\n" for i in range(20))
    (tmp_path / "corpus.txt").write_text(texts)
    rows = [{**ROWS[0], "story": f"Passage {i} is a long one."} for i in range(0, 20, 4)]
    base = config_for(
        tmp_path, path=write(tmp_path, "jsonl"), held_out=write(tmp_path, "jsonl", rows, "held"), rows=None
    )
    plain = DatasetConfig(format="text", train=str(tmp_path / "corpus.txt"))
    data = replace(base.data, corpus="plain", datasets={**base.data.datasets, "plain": plain})
    config = replace(base, data=data)
    prepared = prepare(config, tmp_path / "out")
    assert prepared.manifest["dropped"]["in validation"] == 5 and prepared.manifest["rows"]["flow"] == 15


def test_two_questions_about_one_passage_are_one_document(tmp_path):
    rows = [{**ROWS[0], "story": f"Passage number {i // 5}.", "question": f"Which {i}?"} for i in range(500)]
    path = tmp_path / "all.parquet"
    pq.write_table(pa.Table.from_pylist(rows), path)
    own = {"train": str(path), "held_out": 0.2, "columns": {"context": "story"}}
    prepared = prepare(from_dict(RunConfig, {"data": {"dataset": "own", "datasets": {"own": own}}}), tmp_path / "out")
    counts = prepared.manifest["rows"]
    assert all(counts[part] and counts[part] % 5 == 0 for part in ("finetune", "validation", "test"))


def test_a_document_column_that_is_not_there_is_refused(tmp_path):
    base = config_for(tmp_path)
    own = replace(base.data.datasets["own"], document="storry")
    config = replace(base, data=replace(base.data, datasets={"own": own}))
    with pytest.raises(
        DataError, match=r"data\.datasets\.own\.document: unknown name 'storry'; did you mean 'story'\?"
    ):
        prepare(config, tmp_path / "out")


def test_held_out_documents_are_left_out_of_another_corpus(tmp_path):
    rows = [{**ROWS[0], "story": f"Passage {i} is a long one."} for i in range(200)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    (tmp_path / "corpus.txt").write_text("".join(f"{row['story']}\n" for row in rows) + "One more.\n")
    own = {"train": str(tmp_path / "rows.parquet"), "held_out": 0.2, "columns": {"context": "story"}}
    plain = {"format": "text", "train": str(tmp_path / "corpus.txt")}
    data = {"dataset": "own", "corpus": "plain", "datasets": {"own": own, "plain": plain}}
    prepared = prepare(from_dict(RunConfig, {"data": data}), tmp_path / "out")
    counts, corpus = prepared.manifest["rows"], windows_of(prepared)
    assert counts["validation"] > 20 and len(corpus) == counts["finetune"] + 1
    held = {row["source"].split(" is")[0] for row in prepared.validation(200)}
    assert not held & {text.split(" is")[0] for text in corpus}


def test_training_rows_that_are_there_twice_are_dropped(tmp_path):
    again = {**ROWS[0], "story": f" {ROWS[0]['story'].replace(' ', '  ')}\u200b"}
    loud = {**ROWS[0], "story": ROWS[0]["story"].upper()}  # another text: the case counts
    twice = [*ROWS, again, loud, {**ROWS[0], "answer": "elsewhere"}]
    config = config_for(tmp_path, rows=twice, clean={"duplicates": "exact"})
    prepared = prepare(config, tmp_path / "out")
    assert prepared.manifest["dropped"] == {"duplicate": 1} and prepared.manifest["rows"]["finetune"] == 22


def test_a_row_that_is_left_out_makes_no_other_one_a_duplicate(tmp_path):
    """Of equal rows those that are held out, or share a passage with one that is, are counted as such."""
    rows = [{**ROWS[0], "story": f"Story {i}.", "page": f"page {i}"} for i in range(100)]
    again = [{**row, "page": f"copy of {row['page']}"} for row in rows]
    pq.write_table(pa.Table.from_pylist([*rows, *again]), tmp_path / "rows.parquet")
    path = str(tmp_path / "rows.parquet")
    own = {"train": path, "held_out": 0.25, "document": "page", "columns": {"context": "story"}}
    data = {"dataset": "own", "datasets": {"own": own}, "clean": {"duplicates": "exact"}}
    prepared = prepare(from_dict(RunConfig, {"data": data}), tmp_path / "out")
    documents = {r["page"]: split_of(document_key(r["page"]), 0.25) for r in [*rows, *again]}
    pairs = [{documents[f"page {i}"], documents[f"copy of page {i}"]} for i in range(100)]
    trained = pairs.count({"train"})  # of each the first; where one of two is held out, the other has its passage
    held = sum(split != "train" for split in documents.values())
    assert prepared.manifest["rows"]["finetune"] == trained > 10
    dropped = {"duplicate": trained, "held out": held, "in validation": 200 - 2 * trained - held}
    assert prepared.manifest["dropped"] == dropped and min(dropped.values()) > 10


@pytest.mark.parametrize(
    "setting, message",
    [
        ({"min_chars": 9}, r"data\.clean\.min_chars=9 would do nothing"),
        ({"max_chars": 9, "duplicates": "near"}, r"max_chars=9, data\.clean\.duplicates=near would do nothing"),
        ({"near_threshold": 0.5, "duplicates": "exact"}, r"near_threshold=0\.5 is for duplicates=near, got 'exact'"),
    ],
)
def test_a_clean_up_that_would_do_nothing_is_refused(tmp_path, setting, message):
    with pytest.raises(ValueError, match=message):
        prepare(config_for(tmp_path, clean=setting), tmp_path / "out")


@pytest.mark.parametrize("kind", ["parquet", "jsonl"])
def test_columns_inside_columns_are_known_by_name(tmp_path, kind):
    rows = [
        {
            "page": {"id": f"p{i}", "lang": "en" if i < 15 else "de", "text": f"Story {i}."},
            "question": "Who?",
            "answer": "x",
        }
        for i in range(20)
    ]
    held = [{**row, "page": {**row["page"], "id": f"h{i}", "text": f"Tale {i}."}} for i, row in enumerate(rows)]
    files = {"train": write(tmp_path, kind, rows), "validation": write(tmp_path, kind, held, "held")}

    def config(**changed) -> RunConfig:
        own = {
            "format": kind,
            **files,
            "columns": {"context": "page.text"},
            "document": "page.id",
            "where": {"page.lang": "en"},
        }
        plain = {"format": kind, "train": files["train"], "columns": {"text": "page.text"}}
        return from_dict(
            RunConfig,
            {"data": {"dataset": "own", "corpus": "plain", "datasets": {"own": {**own, **changed}, "plain": plain}}},
        )

    manifest = prepare(config(), tmp_path / "out").manifest
    assert manifest["rows"]["finetune"] == 15 and manifest["rows"]["flow"] == 20
    with pytest.raises(
        DataError, match=r"data\.datasets\.own\.document: unknown name 'page\.idd'; did you mean 'page\.id'\?"
    ):
        prepare(config(document="page.idd"), tmp_path / "out")
    with pytest.raises(DataError, match=r"where: unknown name 'page\.lnag'; did you mean 'page\.lang'\?"):
        prepare(config(where={"page.lnag": "en"}), tmp_path / "out")
    with pytest.raises(DataError, match=r"no column 'page\.txt' for field 'context'.*it has page, page\.id"):
        prepare(config(columns={"context": "page.txt"}), tmp_path / "out")


def test_texts_that_differ_in_what_clean_up_takes_out_are_duplicates(tmp_path):
    config = corpus_config(tmp_path, ["caf\u00e9 here", "cafe\u0301\u200b here"], clean={"duplicates": "exact"})
    assert windows_of(prepare(config, tmp_path / "out")) == ["caf\u00e9 here"]


def test_a_pairs_texts_are_cleaned_wherever_they_go(tmp_path):
    rows = [{**row, "story": f"{row['story']} cafe\u0301\x00", "answer": "caf\u00e9"} for row in ROWS]
    prepared = prepare(config_for(tmp_path, rows=rows), tmp_path / "out")
    sources = pq.read_table([s.path for s in prepared.shards("finetune")]).column("source").to_pylist()
    assert all("caf\u00e9" in prepared.tokenizer.decode(ids) for ids in sources)
    assert all("caf\u00e9" in text for text in windows_of(prepared))
    assert all(row["answers"] == [row["target"]] for row in prepared.validation(50))


def test_a_field_that_the_first_row_lacks_is_a_column(tmp_path):
    first = {name: value for name, value in ROWS[0].items() if name != "answer"}
    prepared = prepare(config_for(tmp_path, rows=[first, *ROWS], bad_rows_allowed=0.2), tmp_path / "out")
    assert prepared.manifest["bad_rows"]["train"] == 1 and prepared.manifest["rows"]["finetune"] == 20


def test_control_and_format_characters_go_and_words_stay_apart():
    config = CleanConfig()
    for code in range(sys.maxunicode + 1):
        goes = unicodedata.category(chr(code)) in ("Cc", "Cf", "Cs", "Co")
        goes &= chr(code) not in "\n\t\r\v\f\x1c\x1d\x1e\x1f\x85\u200c\u200d"
        if goes:
            assert clean(f"a{chr(code)}b", config) == "ab", hex(code)
        elif code in range(0x20, 0x7F) or code in range(0xA0, 0x3000):
            assert clean(f"a{chr(code)}b", config) == unicodedata.normalize("NFC", f"a{chr(code)}b"), hex(code)
    assert clean("page\x0cone\r\ntwo\rthree\x0bfour\x85five\x1fsix", config) == "page\none\ntwo\nthree\nfour\nfive six"
    assert (
        clean("\u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645\x00", config)
        == "\u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645"
    )


def test_white_space_and_case_do_not_tell_documents_apart():
    same = ["A caf\u00e9  Here", "a\tCAF\u00c9 here\n", "a\u00a0caf\u00e9\u3000here"]
    assert len({document_key(text) for text in same}) == 1
    assert document_key("plain words") == document_key(" plain\r\nWORDS") != document_key("plain word")
    assert text_key("plain words") == text_key("plain  words") != text_key("Plain words")
    assert isinstance(text_key("\ud800"), int)  # half a character, as JSON may hold one


def test_a_passage_of_the_validation_rows_is_not_trained_on_under_another_name(tmp_path):
    rows = [{**ROWS[0], "story": f"Passage {i}.", "page": f"a{i}"} for i in range(20)]
    held = [{**ROWS[0], "story": f"passage  {i}.", "page": f"b{i}"} for i in range(0, 20, 4)]
    files = {"train": write(tmp_path, "jsonl", rows), "validation": write(tmp_path, "jsonl", held, "held")}
    own = {"format": "jsonl", **files, "document": "page", "columns": {"context": "story"}}
    texts = [{"text": row["story"], "page": f"c{row['page']}"} for row in rows]
    plain = {"format": "jsonl", "train": write(tmp_path, "jsonl", texts, "texts"), "document": "page"}
    data = {"dataset": "own", "corpus": "plain", "datasets": {"own": own, "plain": plain}}
    manifest = prepare(from_dict(RunConfig, {"data": data}), tmp_path / "out").manifest
    assert manifest["rows"]["finetune"] == manifest["rows"]["flow"] == 15 and manifest["dropped"] == {
        "in validation": 10
    }

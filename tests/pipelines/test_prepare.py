"""Rows of every format -> shards, and what is said about rows that cannot be used."""

import dataclasses
import gzip
import json
import re
import shutil
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines import stream
from pipelines.documents import KeepOut
from pipelines.encode import Encode
from pipelines.listing import DataError, UnreadableFile
from pipelines.prepare import _source_of, cpus_of_a_task, open_prepared, prepare, read_text_rows
from pipelines.sources import Piece, _read_parquet, open_source
from pipelines.stream import read_rows_of
from tests.pipelines.rows import HELD_OUT, ROWS, config_for, windows_of, write
from yan_core.config import DatasetConfig, RunConfig, from_dict
from yan_core.tasks import get_task
from yan_core.tokenization import Tokenizer

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("local_ray")]


def left_behind(tmp_path: Path) -> Path:
    """Folder of what an interrupted preparation of `out` has done so far."""
    (folder,) = (tmp_path / "out.unfinished").iterdir()
    return folder


@pytest.mark.parametrize("kind", ["parquet", "jsonl", "csv"])
def test_files_become_filtered_mapped_tokenised_shards(tmp_path, kind):
    prepared = prepare(config_for(tmp_path, kind), tmp_path / "out")
    assert prepared.manifest["rows"]["finetune"] == 20
    assert prepared.manifest["filtered"] == {"train": 20, "validation": 20}  # by `where`
    table = pq.read_table([shard.path for shard in prepared.shards("finetune")])
    tokenizer = prepared.tokenizer
    pairs = {(tokenizer.decode(r["source"]), tokenizer.decode(r["target"])) for r in table.to_pylist()}
    assert pairs == {(f"{r['story']} {r['question']}", r["answer"]) for r in ROWS if r["task"] == "a"}
    assert [r["target"] for r in prepared.validation(99)] == [r["answer"] for r in ROWS if r["task"] == "a"]


def test_plain_text_files_are_a_corpus(tmp_path):
    (tmp_path / "corpus.txt").write_text("one two three four five\n\nsix seven\n")
    base = config_for(tmp_path)
    datasets = {
        "own": {**vars(base.data.datasets["own"])},
        "plain": {"format": "text", "train": str(tmp_path / "corpus.txt")},
    }
    datasets["own"]["kinds"] = []
    config = from_dict(
        RunConfig, {"data": {"dataset": "own", "corpus": "plain", "datasets": datasets, "window_tokens": 3}}
    )
    prepared = prepare(config, tmp_path / "out")
    windows = [
        prepared.tokenizer.decode(r["target"])
        for r in pq.read_table([shard.path for shard in prepared.shards("flow")]).to_pylist()
    ]
    assert sorted(windows) == sorted(["one two three", "four five", "six seven"])


def test_a_hugging_face_data_set_is_streamed_from_a_local_folder(tmp_path):
    folder = tmp_path / "hub"
    folder.mkdir()
    for split, rows in (("train", ROWS), ("validation", HELD_OUT)):
        pq.write_table(pa.Table.from_pylist(rows), folder / f"{split}-00000-of-00001.parquet")
    datasets = {"own": {"format": "huggingface", "path": str(folder), "columns": {"context": "story"}}}
    config = from_dict(RunConfig, {"data": {"dataset": "own", "datasets": datasets}})
    assert prepare(config, tmp_path / "out").manifest["rows"]["finetune"] == len(ROWS)
    datasets["own"]["where"] = {"task": "a"}
    filtered = from_dict(RunConfig, {"data": {"dataset": "own", "datasets": datasets}})
    assert prepare(filtered, tmp_path / "out").manifest["rows"]["finetune"] == len(ROWS) // 2


def test_labels_of_a_hugging_face_data_set_come_by_name(tmp_path):
    features = datasets.Features(text=datasets.Value("string"), label=datasets.ClassLabel(names=["Sports", "World"]))
    rows = {"text": ["a match", "a treaty", "a goal"], "label": [0, 1, 0]}
    for split in ("train", "validation"):
        (tmp_path / "hub").mkdir(exist_ok=True)
        rows["text"] = [f"{text} of {split}" for text in rows["text"]]
        made = datasets.Dataset.from_dict(rows, features=features)
        made.to_parquet(str(tmp_path / "hub" / f"{split}-00000-of-00001.parquet"))
    own = {"own": {"format": "huggingface", "path": str(tmp_path / "hub")}}
    data = {"dataset": "own", "datasets": own, "task": "classification"}
    prepared = prepare(from_dict(RunConfig, {"data": data}), tmp_path / "out")
    assert [r["target"] for r in prepared.validation(9)] == ["Sports", "World", "Sports"]


def test_a_corpus_row_that_is_no_text_counts(tmp_path):
    texts = ["one two " * 50, None, " ", "three"]  # the first is many windows, and one text
    (tmp_path / "corpus.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    base = config_for(tmp_path)
    datasets = {"own": vars(base.data.datasets["own"]) | {"kinds": []}}
    datasets["plain"] = {"format": "jsonl", "train": str(tmp_path / "corpus.jsonl")}
    data = {"dataset": "own", "corpus": "plain", "datasets": datasets}
    with pytest.raises(DataError, match="1 of 4 corpus rows of 'plain'.*'text' must be text, got None"):
        prepare(from_dict(RunConfig, {"data": data}), tmp_path / "out")
    prepared = prepare(from_dict(RunConfig, {"data": {**data, "bad_rows_allowed": 0.5}}), tmp_path / "out")
    assert prepared.manifest["bad_rows"]["corpus"] == 1 and prepared.manifest["rows"]["flow"] == 5


def test_damaged_shards_are_noticed(tmp_path):
    prepared = prepare(config_for(tmp_path), tmp_path / "out")
    assert prepared.is_whole()
    shard = Path(prepared.shards("finetune")[0].path)
    whole = shard.read_bytes()
    for damage in (lambda: shard.write_bytes(whole[:-10]), shard.unlink):
        damage()
        assert not open_prepared(tmp_path / "out").is_whole()
        shard.write_bytes(whole)
    assert open_prepared(tmp_path / "out").is_whole()


def test_a_byte_that_changed_in_a_shard_is_noticed_where_it_is_read(tmp_path):
    prepared = prepare(config_for(tmp_path), tmp_path / "out")
    (name,) = [name for name in prepared.manifest["files"] if name.startswith("finetune/")]
    path = prepared.folder / name
    places = [(str(path), np.arange(20))]
    assert read_rows_of(places, ["source"]).num_rows == 20
    content = bytearray(path.read_bytes())
    metadata = pq.read_metadata(path).row_group(0).column(0)
    content[metadata.data_page_offset + metadata.total_compressed_size // 2] ^= 1
    path.write_bytes(content)
    for cache in (stream._open, stream._row_group):
        cache.cache_clear()
    with pytest.raises(OSError, match="CRC checksum verification failed"):
        read_rows_of(places, ["source", "target"])


def test_a_killed_preparation_is_in_nobodys_way(tmp_path):
    config = config_for(tmp_path)
    prepare(config, tmp_path / "out")
    shutil.copytree(
        tmp_path / "out", tmp_path / "out.replaced"
    )  # killed between putting the old one aside and deleting it
    assert prepare(config, tmp_path / "out").is_whole()
    assert not (tmp_path / "out.replaced").exists()


def test_files_of_a_folder_that_hold_no_rows_are_passed_over(tmp_path):
    folder = tmp_path / "spark"
    (folder / "_temporary").mkdir(parents=True)
    write(folder, "jsonl")
    for name in ("_SUCCESS", ".rows.jsonl.crc", "_temporary/0.jsonl"):
        (folder / name).write_text("")
    config = config_for(tmp_path, path=str(folder), held_out=write(tmp_path, "jsonl", HELD_OUT, "held_out"), rows=None)
    assert prepare(config, tmp_path / "out").manifest["rows"]["finetune"] == 20


def test_the_same_seed_gives_the_same_shards(tmp_path, tiny_config):
    first, second = (prepare(tiny_config, tmp_path / name) for name in ("one", "two"))
    assert first.manifest == second.manifest  # the checksum of every shard included


@pytest.mark.parametrize(
    "bad, reason",
    [
        ({**ROWS[0], "answer": None}, "field 'answer' must be text, got None"),
        ({**ROWS[0], "answer": "  "}, "field 'answer' is blank"),
        ({**ROWS[0], "answer": "a b c d e f g h"}, "target has 8 tokens, data.max_target_tokens=4"),
    ],
)
def test_a_bad_row_stops_the_job_with_its_reason_or_is_set_aside(tmp_path, bad, reason):
    rows = [*ROWS, bad]
    with pytest.raises(
        DataError, match=r"1 of 21 train rows of 'own' cannot be used.*--data.bad_rows_allowed"
    ) as caught:
        prepare(config_for(tmp_path, "jsonl", rows), tmp_path / "out")
    assert reason in str(caught.value)
    assert not (tmp_path / "out").exists()
    (aside,) = (left_behind(tmp_path) / "quarantine" / "train").glob("*.jsonl")  # for a look
    assert str(aside.parent) in str(caught.value)
    prepared = prepare(config_for(tmp_path, "jsonl", rows, bad_rows_allowed=0.05), tmp_path / "out")
    assert prepared.manifest["rows"]["finetune"] == 20
    assert prepared.manifest["bad_rows"]["train"] == 1
    (aside,) = (prepared.folder / "quarantine" / "train").glob("*.jsonl")
    assert reason in aside.read_text()


def test_a_column_of_the_wrong_type_is_said_once_not_a_thousand_times(tmp_path):
    rows = [{**r, "answer": 3} for r in ROWS]
    with pytest.raises(DataError, match=r"20 of 20 train rows.*must be text, got 3 \(int\)"):
        prepare(config_for(tmp_path, "jsonl", rows), tmp_path / "out")


@pytest.mark.parametrize(
    "data, message",
    [
        ({"path": "nowhere.parquet", "rows": None}, r"no file at .*nowhere.parquet.*--data.root"),
        ({"dataset": "onw"}, "did you mean 'own'"),
        ({"task": "question_answerin"}, "did you mean 'question_answering'"),
        ({"task": "classification"}, "has no column 'text' for field 'text'.*Map it"),
        ({"corpus": "own", "corpus_column": "txt"}, "no column 'txt' \\(data.corpus_column\\)"),
    ],
)
def test_data_that_are_not_there_or_not_as_described(tmp_path, data, message):
    with pytest.raises(ValueError, match=message):
        prepare(config_for(tmp_path, **data), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_empty_and_broken_files(tmp_path):
    empty = tmp_path / "empty.jsonl"
    empty.write_text("")
    broken = tmp_path / "broken.parquet"
    broken.write_bytes(b"PAR1 no")
    with pytest.raises(DataError, match="empty"):
        prepare(config_for(tmp_path, path=str(empty), rows=None), tmp_path / "out")
    with pytest.raises(DataError, match="cannot read .*broken.parquet as parquet"):
        prepare(config_for(tmp_path, "parquet", path=str(broken), rows=None), tmp_path / "out")
    cut = tmp_path / "cut.jsonl"
    cut.write_text("".join(json.dumps(r) + "\n" for r in ROWS) + '{"story": "Mary we')
    with pytest.raises(DataError, match="(?i)json.*") as caught:
        prepare(config_for(tmp_path, path=str(cut), rows=None), tmp_path / "out")
    assert len(str(caught.value)) < 600 and "retry" not in str(caught.value)
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".*"))
    assert "cut.jsonl" in (left_behind(tmp_path) / "quarantine" / "train" / "own-000000.jsonl").read_text()


def test_a_filter_that_matches_nothing_is_an_error(tmp_path):
    with pytest.raises(DataError, match="gave no usable train row.*filter `where` matches none"):
        prepare(config_for(tmp_path, rows=[r for r in ROWS if r["task"] == "b"]), tmp_path / "out")


def test_evaluation_rows_go_through_the_same_filter_and_template(tmp_path):
    config = config_for(tmp_path)
    rows = read_text_rows(config, write(tmp_path, "jsonl"))
    assert len(rows) == 20
    assert rows[0]["source"] == f"{ROWS[0]['story']} {ROWS[0]['question']}"
    assert read_text_rows(config, write(tmp_path, "parquet")) == rows  # the file's own ending tells its format
    with pytest.raises(DataError, match="--data: no file"):
        read_text_rows(config, str(tmp_path / "nowhere.jsonl"))


def test_prepared_data_that_are_not_there(tmp_path):
    with pytest.raises(DataError, match="yan prepare"):
        open_prepared(tmp_path)


def test_a_preparation_that_must_fail_ends_early(tmp_path):
    folder = tmp_path / "rows"
    folder.mkdir()
    bad = [{**row, "answer": None} for row in ROWS]
    for i in range(40):
        write(folder, "jsonl", bad, f"{i:02d}")
    held_out = write(tmp_path, "jsonl", HELD_OUT, "held_out")

    def stops(**data) -> int:
        config = config_for(tmp_path, "jsonl", path=str(folder), held_out=held_out, rows=None, **data)
        with pytest.raises(DataError, match=r"\d+ of \d+ train rows of 'own' cannot be used") as raised:
            prepare(config, tmp_path / "out")
        (left,) = re.findall(r"(\d+) of 40 pieces were not read any more", str(raised.value))
        return int(left)

    assert stops() == 39
    assert 25 <= stops(bad_rows_allowed=0.1) <= 32


def test_a_bad_line_and_an_unreadable_file_are_set_aside_with_file_and_row(tmp_path):
    folder = tmp_path / "rows"
    folder.mkdir()
    (folder / "0.jsonl").write_text("".join(json.dumps(r) + "\n" for r in ROWS) + '{"story": "Mary we\n[1]\n')
    (folder / "1.jsonl.gz").write_bytes(gzip.compress(json.dumps(ROWS[0]).encode() * 99)[:60])
    held_out = write(tmp_path, "jsonl", HELD_OUT, "held_out")
    with pytest.raises(DataError, match=r"cannot read .*1\.jsonl\.gz as jsonl: .*--data\.bad_rows_allowed"):
        prepare(
            config_for(tmp_path, "jsonl", path=str(folder), held_out=held_out, rows=None, bad_rows_allowed=0.1),
            tmp_path / "out",
        )
    prepared = prepare(
        config_for(tmp_path, "jsonl", path=str(folder), held_out=held_out, rows=None, bad_rows_allowed=0.5),
        tmp_path / "out",
    )
    assert prepared.manifest["bad_rows"]["train"] == 2
    quarantine = prepared.folder / "quarantine" / "train"
    found = [json.loads(line) for f in sorted(quarantine.glob("*")) for line in f.read_text().splitlines()]
    assert [(Path(f["file"]).name, f["row_number"]) for f in found] == [
        ("0.jsonl", 40),
        ("0.jsonl", 41),
        ("1.jsonl.gz", None),
    ]
    assert found[0]["reason"].startswith("no JSON") and found[1]["reason"].startswith("a row must be a JSON object")


def test_what_is_prepared_is_not_done_again_after_an_interruption(tmp_path):
    """The records of finished pieces are used; another setting makes them worthless."""
    config = config_for(tmp_path, "jsonl", [*ROWS, {**ROWS[0], "answer": None}])
    said: list[str] = []
    with pytest.raises(DataError, match="cannot be used"):
        prepare(config, tmp_path / "out", said.append)
    records = left_behind(tmp_path) / "records"
    assert "tokenizer: " in said.pop() and not said
    before = {f.name: f.stat().st_mtime_ns for f in records.iterdir()}
    assert "train-own-000000.json" in before  # the other one may not have been done any more
    (records / "validation-own-000000.json").unlink(missing_ok=True)  # as if it had been interrupted there
    allowed = dataclasses.replace(config, data=dataclasses.replace(config.data, bad_rows_allowed=0.5))
    shorter = dataclasses.replace(allowed, data=dataclasses.replace(allowed.data, max_source_tokens=5))
    with pytest.raises(DataError, match="cannot be used"):
        prepare(config, tmp_path / "out", said.append)
    after = {f.name: f.stat().st_mtime_ns for f in records.iterdir()}
    assert {name for name in before if before[name] == after[name]} == {"train-own-000000.json"} and not said
    prepared = prepare(shorter, tmp_path / "out", said.append)
    assert "made from other data or settings" in said[0]
    assert prepared.manifest["sources_cut"] == 20 and not (tmp_path / "out.unfinished").exists()


def test_the_same_rows_for_training_and_validation_are_refused(tmp_path):
    config = config_for(tmp_path, path=write(tmp_path, "jsonl"), rows=None)
    with pytest.raises(DataError, match=r"no train row of 'own' is left \(in validation: 20\).*name other files"):
        prepare(config, tmp_path / "out")


def test_a_mixture_is_read_in_the_shares_it_is_given(tmp_path):
    sets = {}
    for name, count in (("big", 300), ("small", 100)):
        pq.write_table(pa.table({"text": [f"{name} text {i}" for i in range(count)]}), tmp_path / f"{name}.parquet")
        sets[name] = {"format": "parquet", "train": str(tmp_path / f"{name}.parquet")}
    base = config_for(tmp_path, "parquet")
    sets["own"] = vars(base.data.datasets["own"]) | {"kinds": []}

    def shards(mixture):
        config = from_dict(RunConfig, {"data": {"dataset": "own", "datasets": sets, "mixture": mixture}})
        found = prepare(config, tmp_path / "out").shards("flow")
        return {Path(s.path).name.split("-")[0]: (s.rows, s.epochs) for s in found}

    assert shards({"big": {}, "small": {"epochs": 3.0}}) == {"big": (300, 1.0), "small": (100, 3.0)}
    halves = shards({"big": {"share": 0.5}, "small": {"share": 0.5}})
    assert halves == {"big": (300, 1.0), "small": (100, pytest.approx(3.0))}


@pytest.mark.parametrize("ending, opener", [("gz", "gzip"), ("bz2", "bz2")])
def test_compressed_text_is_read(tmp_path, ending, opener):
    import importlib

    with importlib.import_module(opener).open(tmp_path / f"corpus.txt.{ending}", "wt") as out:
        out.write("one two\nthree four\n")
    base = config_for(tmp_path)
    sets = {"own": vars(base.data.datasets["own"]) | {"kinds": []}}
    sets["plain"] = {"format": "text", "train": str(tmp_path / f"corpus.txt.{ending}")}
    config = from_dict(RunConfig, {"data": {"dataset": "own", "corpus": "plain", "datasets": sets}})
    assert windows_of(prepare(config, tmp_path / "out")) == ["one two", "three four"]


def test_a_straggler_of_an_interrupted_preparation_spoils_nothing(tmp_path):
    """A task that goes on after its job has failed writes where only its own settings and files are read."""
    config = config_for(tmp_path, "jsonl", [*ROWS, {**ROWS[0], "answer": None}])
    with pytest.raises(DataError, match="cannot be used"):
        prepare(config, tmp_path / "out")
    old = left_behind(tmp_path)
    shorter = dataclasses.replace(config.data, bad_rows_allowed=0.5, max_source_tokens=5)
    with pytest.raises(DataError, match="cannot be used"):
        prepare(dataclasses.replace(config, data=dataclasses.replace(shorter, bad_rows_allowed=0)), tmp_path / "out")
    assert left_behind(tmp_path) != old
    shutil.copytree(left_behind(tmp_path), old)  # what a task of the first writes only now
    prepared = prepare(dataclasses.replace(config, data=shorter), tmp_path / "out")
    assert prepared.manifest["sources_cut"] == 20 and prepared.is_whole()
    assert not list(prepared.folder.rglob("scratch")) and not (tmp_path / "out.unfinished").exists()


def test_a_vocabulary_is_learnt_from_every_file_of_a_corpus(tmp_path):
    """Files of a corpus may be of different kinds; a sample from the first one alone would know only its words."""
    for i in range(4):
        words = [f"word{chr(97 + i)}{chr(97 + j)}" for j in range(26)]
        rows = [{"text": f"{words[j % 26]} here"} for j in range(3000)]
        write(tmp_path, "jsonl", rows, f"part{i}")
    base = config_for(tmp_path)
    plain = DatasetConfig(format="jsonl", train=str(tmp_path / "part*.jsonl"))
    data = replace(base.data, corpus="plain", datasets={**base.data.datasets, "plain": plain})
    prepared = prepare(
        replace(base, data=data, tokenizer=replace(base.tokenizer, sample_rows=4 * 1024)), tmp_path / "out"
    )
    every = " ".join(f"word{chr(97 + i)}{chr(97 + j)}" for i in range(4) for j in range(26))
    (found,) = prepared.tokenizer.encode_batch([every])
    assert prepared.tokenizer.decode(found.ids) == every  # unknown words are left out


def test_a_bad_row_of_any_kind_is_set_aside_alone(tmp_path):
    """Dates, bytes and halves of characters have no JSON of their own; a bad byte is a bad row, not a bad file."""
    when = datetime(2026, 1, 2, tzinfo=UTC)
    dated = [{**row, "when": when, "raw": b"\xff"} for row in [*ROWS, {**ROWS[0], "answer": None}]]
    for kind, rows in (("parquet", dated), ("jsonl", [*ROWS, {**ROWS[0], "story": "\ud83d", "answer": None}])):
        prepared = prepare(config_for(tmp_path, kind, rows, bad_rows_allowed=0.1), tmp_path / kind)
        assert prepared.manifest["bad_rows"]["train"] == 1 and prepared.manifest["rows"]["finetune"] == 20
    lines = [json.dumps(row).encode() for row in ROWS]
    path = tmp_path / "bytes.jsonl"
    path.write_bytes(b"\n".join([*lines[:9], b'{"story": "\xff\xfe"}', *lines[9:]]))
    held_out = write(tmp_path, "jsonl", HELD_OUT, "held")
    config = config_for(tmp_path, path=str(path), held_out=held_out, rows=None, bad_rows_allowed=0.1)
    prepared = prepare(config, tmp_path / "bytes")
    assert prepared.manifest["bad_rows"]["train"] == 1 and prepared.manifest["rows"]["finetune"] == 20
    (line,) = (prepared.folder / "quarantine" / "train" / "own-000000.jsonl").read_text().splitlines()
    assert (json.loads(line)["row_number"], json.loads(line)["reason"]) == (9, "no UTF-8")


def test_what_one_pass_could_not_read_the_next_one_leaves_out(tmp_path, monkeypatch):
    """Else a file that fails once and is read later would be evaluated on, and trained on too."""
    folder = tmp_path / "held"
    folder.mkdir()
    for i in range(2):
        write(folder, "jsonl", [{**row, "story": f"{i} {row['story']}"} for row in ROWS], str(i))
    train = write(tmp_path, "jsonl", [{**row, "story": f"1 {row['story']}"} for row in ROWS] + HELD_OUT)
    config = config_for(tmp_path, path=train, held_out=str(folder), rows=None, bad_rows_allowed=0.5)
    work = tmp_path / "work"
    source = open_source(config.data, "own", "validation", 0)
    keep_out = KeepOut(source, get_task(config.data.task), config.data.clean, 0.0, work)
    keep_out(0)
    (folder / "1.jsonl").rename(folder / "1.away")
    keep_out(1)
    (folder / "1.away").rename(folder / "1.jsonl")
    tokenizer = Tokenizer.train([ROWS[0]["story"]], config.tokenizer).to_json()
    encode = Encode(
        source, "validation", get_task(config.data.task), config.data, tokenizer, work, np.zeros(0, np.uint64)
    )
    assert [bool(encode(number).unreadable) for number in range(2)] == [False, True]
    keep_out(1)  # of the next call: it is there again
    assert not encode(1).unreadable


@pytest.mark.parametrize(
    "nodes, here, pieces, threads, of_core",
    [
        ([8.0, 8.0, 8.0], 4, 2, 8, 1.0),  # 12 cores a piece, but a node has 8
        ([8.0, 8.0, 8.0], 4, 100, 1, 1.0),
        ([32.0, 0.0], 4, 4, 8, 1.0),
        ([4.0], 2, 2, 1, 2.0),  # a Ray of one's own on two cores
        ([4.0], 2, 1, 2, 2.0),
    ],
)
def test_a_task_asks_for_no_more_than_a_node_has(nodes, here, pieces, threads, of_core):
    assert cpus_of_a_task(nodes, here, pieces) == (threads, of_core)
    assert threads * of_core <= max(nodes)


def test_a_bucket_or_folder_that_has_changed_is_read_anew(tmp_path):
    """A file more moves the numbers of all pieces behind it, which what is done so far is found by."""
    folder = tmp_path / "rows"
    folder.mkdir()
    write(folder, "jsonl", [*ROWS, {**ROWS[0], "answer": None}], "b")
    held_out = write(tmp_path, "jsonl", HELD_OUT, "held")
    config = config_for(tmp_path, path=str(folder), held_out=held_out, rows=None)
    with pytest.raises(DataError, match="cannot be used"):
        prepare(config, tmp_path / "out")
    before = left_behind(tmp_path)
    write(folder, "jsonl", [{**row, "story": f"Also {row['story']}"} for row in ROWS], "a")
    with pytest.raises(DataError, match="cannot be used"):
        prepare(config, tmp_path / "out")
    assert left_behind(tmp_path) != before


def test_row_groups_of_any_size_are_read_with_the_numbers_of_their_rows(tmp_path):
    """Empty ones too; in pieces and as a whole."""
    path = tmp_path / "rows.parquet"
    sizes = [0, 700, 0, 0, 700, 1, 3000, 0]
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    with pq.ParquetWriter(path, pa.schema([("n", pa.int64())])) as out:
        for start, size in zip(starts, sizes, strict=True):
            out.write_table(pa.table({"n": pa.array(range(start, start + size), pa.int64())}))
    groups = pq.ParquetFile(path).num_row_groups
    for piece in (Piece(str(path)), Piece(str(path), 0, groups), Piece(str(path), groups - 3, groups)):
        read = [(n, row["n"]) for some in _read_parquet(piece) for n, row in zip(some.numbers, some.rows, strict=True)]
        first = sum(pq.ParquetFile(path).metadata.row_group(g).num_rows for g in range(piece.start))
        assert read == [(n, n) for n in range(first, sum(sizes))]


def test_a_file_that_has_shrunk_since_it_was_listed_is_set_aside(tmp_path):
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.Table.from_pylist(ROWS), path, row_group_size=10)
    config = config_for(tmp_path, "parquet", None, path=str(path), held_out=str(path))
    source = replace(open_source(config.data, "own", "train", 0), pieces=[Piece(str(path), 2, 4)])
    pq.write_table(pa.Table.from_pylist(ROWS), path, row_group_size=20)
    with pytest.raises(UnreadableFile, match="2 row groups in place of 4"):
        list(source.rows(source.pieces[0]))


@pytest.mark.parametrize("name", ["flow/my-corpus-000001-0000.parquet", "flow/my-corpus-000001-12345.parquet"])
def test_the_data_set_of_a_shard_is_known_however_many_there_are(name):
    assert _source_of(name) == "my-corpus"

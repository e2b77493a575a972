"""Rows of files -> answers: order, seeds, what is set aside, and what an interrupted call leaves to do."""

import gzip
import json
from pathlib import Path

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from mlflow import MlflowClient

import yan_core
from pipelines.answer import Answer, Read, Settings, kept_names
from pipelines.benchmarks import generate as benchmark
from pipelines.cli import main
from pipelines.cluster import ray_session
from pipelines.generate import GenerateError, generate
from pipelines.listing import DataError
from pipelines.tables import Input, scan
from tests.yan_core.tiny import randomize, tiny_config
from yan_core.checkpoint import CheckpointError, save_pretrained
from yan_core.config import SamplingConfig, TokenizerConfig
from yan_core.files import write_file
from yan_core.model import build_model
from yan_core.tasks import get_task
from yan_core.tokenization import Tokenizer

NAMES = ("Mary", "John", "Sandra", "Daniel")
ROWS = [
    {
        "number": i,
        "context": f"{NAMES[i % 4]} went to the kitchen. " * (1 + i % 3),
        "question": f"Where is {NAMES[i % 3]}?",
    }
    for i in range(23)
]
TWO = Settings(num_steps=2, rows_per_shard=5)


def save_model(folder: Path, task="question_answering", seed=0, target_tokens=4, **tokenizer) -> Path:
    texts = [f"{row['context']} {row['question']}" for row in ROWS]
    vocabulary = Tokenizer.train(texts, TokenizerConfig(**tokenizer))
    model = randomize(build_model(tiny_config(), vocabulary.vocab_size, seed), seed)
    details = {"task": task, "max_source_tokens": 16, "max_target_tokens": target_tokens}
    save_pretrained(folder, model, vocabulary, details)
    return folder


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def local_ray():
    with ray_session(2, 1):
        yield


def write(folder: Path, kind: str, rows=ROWS, name="rows") -> str:
    path = folder / f"{name}.{kind}"
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=4)
    elif kind == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif kind == "jsonl.gz":
        with gzip.open(path, "wt") as out:
            out.writelines(json.dumps(row) + "\n" for row in rows)
    elif kind == "csv":
        path.write_text("\n".join([",".join(rows[0])] + [",".join(f'"{v}"' for v in row.values()) for row in rows]))
    return str(path)


def read(*files: str) -> Input:
    kind = {"parquet": "parquet", "csv": "csv", "txt": "text"}.get(files[0].rsplit(".", 1)[1], "jsonl")
    return Input.of(kind, list(files), [scan(kind, file) for file in files])


def answer(rows: Input, model: Path, folder: Path, settings=TWO, batch_size=64, task="question_answering") -> pa.Table:
    """What a job writes, without Ray: a reader and an actor in this process."""
    folder.mkdir()
    actor = Answer(model, folder, folder / "_records", settings, batch_size)
    reader = Read(rows, get_task(task), settings)
    numbers = list(range(-(-rows.num_rows // settings.rows_per_shard)))
    for shard in reader(pa.table({"shards": [numbers]})):
        actor(shard)
    return pq.read_table(folder)


def answers_of(model: Path, rows=ROWS, settings=TWO) -> list[str]:
    """Of the generator alone, a row at a time."""
    generator, how = yan_core.load(model), settings.sampling
    return [
        generator.generate([f"{row['context']} {row['question']}"], 2, seeds=settings.seed * 2**32 + i, sampling=how)[
            0
        ].text
        for i, row in enumerate(rows)
    ]


# --- reading ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["parquet", "jsonl", "jsonl.gz", "csv"])
def test_rows_of_all_files_come_in_order_from_any_place_on(tmp_path, kind):
    files = [
        write(tmp_path, kind, ROWS[:7], "a"),
        write(tmp_path, kind, ROWS[7:8], "b"),
        write(tmp_path, kind, ROWS[8:], "c"),
    ]
    rows = read(*files)
    assert (rows.num_rows, rows.counts) == (23, [7, 1, 15])
    assert rows.place(0) == (files[0], 0) and rows.place(7) == (files[1], 0) and rows.place(22) == (files[2], 14)
    for start, stop in ((0, 23), (6, 9), (11, 14), (20, 99)):
        parts = list(rows.parts(start, stop, ["question"]))
        numbers = [int(n) for part in parts for n in part.table["number"].to_pylist()]
        assert numbers == list(range(start, min(stop, 23)))
        assert [r["question"] for part in parts for r in part.rows] == [r["question"] for r in ROWS[start:stop]]


def test_a_reader_gives_the_shards_it_is_asked_for_each_in_a_block(tmp_path):
    reader = Read(read(write(tmp_path, "jsonl")), get_task("question_answering"), TWO)
    blocks = list(reader(pa.table({"shards": [[1, 4]]})))
    assert [block["shard"].to_pylist() for block in blocks] == [[1], [4]]
    assert [len(block["prompts"][0]) for block in blocks] == [5, 3]
    assert blocks[0]["prompts"][0][0].as_py() == f"{ROWS[5]['context']} {ROWS[5]['question']}"


def test_json_values_keep_their_types_and_mixed_ones_become_text(tmp_path):
    values = [
        {"whole": 1, "real": 1, "list": [], "mixed": "a", "object": {"a": 1}, "late": None, "empty": {}},
        {"whole": 2, "real": 2.5, "list": ["x"], "mixed": 7, "object": {"b": "c"}, "empty": {}, "extra": True},
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(v) + "\n" for v in values) + "{broken\n")
    rows = read(str(tmp_path / "rows.jsonl"))
    (part,) = rows.parts(0, 3, ["mixed"])
    pq.write_table(part.table, tmp_path / "out.parquet")
    found = pq.read_table(tmp_path / "out.parquet").to_pylist()
    assert [row["whole"] for row in found] == [1, 2, None] and [row["real"] for row in found] == [1.0, 2.5, None]
    assert [row["list"] for row in found] == [[], ["x"], None] and [row["mixed"] for row in found] == ["a", "7", None]
    assert found[0]["object"] == {"a": 1, "b": None} and found[1]["extra"] is True and found[0]["empty"] == "{}"
    assert part.rows[1] == {"mixed": 7} and part.reasons[:2] == ["", ""] and "no JSON" in part.reasons[2]


def test_parquet_files_that_do_not_go_together_are_named(tmp_path):
    one, other = write(tmp_path, "parquet", [{"a": 1}], "one"), write(tmp_path, "parquet", [{"a": "x"}], "other")
    with pytest.raises(DataError, match=r"column 'a' is int64 in .*one.parquet and string in .*other.parquet"):
        read(one, other)


def test_columns_of_the_answers_own_names_are_kept_under_others():
    assert kept_names(["a", "answer", "input_answer", "error"]) == [
        "a",
        "input_input_answer",
        "input_answer",
        "input_error",
    ]


# --- answering --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size, shard", [(1, 5), (4, 23), (64, 1000)])
@pytest.mark.parametrize("how", [{}, {"num_candidates": 3}])
def test_answers_are_the_generators_whatever_the_batches_and_shards(tmp_path, model_folder, batch_size, shard, how):
    settings = Settings(num_steps=2, rows_per_shard=shard, seed=3, sampling=SamplingConfig(**how))
    found = answer(read(write(tmp_path, "parquet")), model_folder, tmp_path / "out", settings, batch_size)
    assert found["answer"].to_pylist() == answers_of(model_folder, settings=settings)
    assert len(set(found["answer"].to_pylist())) > 5
    assert found["number"].to_pylist() == list(range(23)) and found["error"].null_count == 23
    assert found.schema.field("number").type == pa.int64() and max(found["tokens"].to_pylist()) <= 4


def test_unusable_rows_are_set_aside_and_the_others_answered_as_without_them(tmp_path, model_folder):
    bad = {3: None, 8: 5, 9: " ", 17: "\ud800"}
    rows = [{**row, "question": bad.get(i, row["question"])} for i, row in enumerate(ROWS)]
    lines = [json.dumps(row) for row in rows]
    lines[20] = lines[20][:30]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines) + "\n")
    found = answer(read(str(tmp_path / "rows.jsonl")), model_folder, tmp_path / "out").to_pylist()
    right = answers_of(model_folder)
    for i, row in enumerate(found):
        if i in (*bad, 20):
            assert row["answer"] is row["tokens"] is None
        else:
            assert (row["number"], row["answer"], row["error"]) == (i, right[i], None)
    reasons = {3: "got None", 8: "must be text, got 5", 9: "is blank", 17: "cannot be kept", 20: "no JSON"}
    assert all(reason in found[i]["error"] for i, reason in reasons.items())


def test_of_a_batch_that_fails_the_rows_are_answered_one_by_one(tmp_path, model_folder, monkeypatch):
    plain = yan_core.TextGenerator.generate

    def failing(self, sources, *args, **kwargs):
        if any("Where is John?" in source for source in sources):
            raise RuntimeError("too much John")
        return plain(self, sources, *args, **kwargs)

    monkeypatch.setattr(yan_core.TextGenerator, "generate", failing)
    found = answer(read(write(tmp_path, "jsonl")), model_folder, tmp_path / "out").to_pylist()
    monkeypatch.undo()
    right = answers_of(model_folder)
    failed = [row["number"] for row in found if row["error"] == "RuntimeError: too much John"]
    assert failed == [row["number"] for row in ROWS if "John" in row["question"]]
    assert all(row["answer"] == right[row["number"]] for row in found if row["number"] not in failed)


def test_columns_are_mapped_and_a_right_answer_is_not_needed(tmp_path, model_folder):
    rows = [{"story": {"text": row["context"]}, "asked": row["question"], "answer": "x"} for row in ROWS]
    settings = Settings(num_steps=2, columns={"context": "story.text", "question": "asked"})
    for kind in ("jsonl", "parquet"):
        found = answer(read(write(tmp_path, kind, rows)), model_folder, tmp_path / f"out-{kind}", settings)
        assert found["answer"].to_pylist() == answers_of(model_folder)
        assert set(found["input_answer"].to_pylist()) == {"x"} and found["story"][0].as_py() == rows[0]["story"]


def test_a_model_of_lower_case_and_one_that_continues_texts(tmp_path):
    model = save_model(tmp_path / "model", task="continuation", lowercase=True)
    (tmp_path / "rows.txt").write_text("MARY went  to the kitchen.\nmary went to the kitchen.\n\n")
    found = answer(read(str(tmp_path / "rows.txt")), model, tmp_path / "out", task="continuation").to_pylist()
    right = yan_core.load(model).generate(["mary went to the kitchen."] * 2, 2, seeds=[0, 1])
    assert [row["answer"] for row in found] == [*(r.text for r in right), None]
    assert found[0]["text"] == "MARY went  to the kitchen." and found[2]["error"] == "field 'text' is blank"


# --- whole jobs -------------------------------------------------------------------------------------------------------


def shards(folder: Path) -> dict[str, tuple[int, bytes]]:
    return {file.name: (file.stat().st_mtime_ns, file.read_bytes()) for file in folder.glob("*.parquet")}


@pytest.mark.ray
def test_a_job_is_done_once_in_order_and_changes_are_refused(tmp_path, model_folder, local_ray):
    files, lines, out = [write(tmp_path, "jsonl")], [], tmp_path / "out"
    manifest = generate(model_folder, files, out, TWO, num_workers=2, say=lines.append)
    found = pq.read_table(out)
    assert found["answer"].to_pylist() == answers_of(model_folder) and found["number"].to_pylist() == list(range(23))
    assert manifest == json.loads((out / "_manifest.json").read_text())
    assert (manifest["rows"], manifest["failed"], manifest["tokens"]) == (23, 0, sum(found["tokens"].to_pylist()))
    assert sorted(manifest["shards"]) == sorted(shards(out)) == [f"part-{i:06d}.parquet" for i in range(5)]
    assert sorted(p.name for p in out.iterdir() if p.suffix != ".parquet") == [".lock", "_manifest.json"]

    before = shards(out)
    assert generate(model_folder, files, out, TWO, num_workers=1, batch_size=2, say=lines.append) == manifest
    assert shards(out) == before and "done before" in lines[-1]
    for change, settings in (
        ("seed: 0 -> 1", Settings(num_steps=2, rows_per_shard=5, seed=1)),
        ("num_steps: 2 -> 3", Settings()),
    ):
        with pytest.raises(GenerateError, match=f"settings.{change}.*--output.*--fresh"):
            generate(model_folder, files, out, settings)
    with pytest.raises(GenerateError, match="model_sha256"):
        generate(save_model(tmp_path / "other", seed=1), files, out, TWO)
    write(tmp_path, "jsonl", ROWS[:9])
    with pytest.raises(GenerateError, match=r"inputs.*rows.jsonl.bytes: \d+ -> \d+"):
        generate(model_folder, files, out, TWO)
    assert shards(out) == before
    assert generate(model_folder, files, out, TWO, num_workers=1, fresh=True)["rows"] == 9
    assert pq.read_table(out)["answer"].to_pylist() == answers_of(model_folder)[:9]


@pytest.mark.ray
def test_an_interrupted_job_goes_on_at_the_missing_shards_and_gives_the_same_bytes(tmp_path, model_folder, local_ray):
    class Stop(Exception):
        pass

    def stop(said):
        raise Stop

    files, calm, wild = [write(tmp_path, "parquet")], tmp_path / "calm", tmp_path / "wild"
    generate(model_folder, files, calm, TWO, num_workers=1)
    with pytest.raises(Stop):
        generate(model_folder, files, wild, TWO, num_workers=1, on_shard=stop)
    records = {file.name.removesuffix(".json") for file in (wild / "_unfinished" / "records").iterdir()}
    before, again = shards(wild), []
    assert records and not (wild / "_manifest.json").exists()
    (wild / ".part-000004.parquet.1.part").write_bytes(b"half")
    manifest = generate(model_folder, files, wild, TWO, num_workers=2, on_shard=lambda s: again.append(s["name"]))
    after = shards(wild)
    assert not records & set(again) and records | set(again) == set(after)
    assert all(after[name] == before[name] for name in records)
    assert {name: data for name, (_, data) in after.items()} == {name: data for name, (_, data) in shards(calm).items()}
    assert sorted(p.name for p in wild.iterdir()) == [".lock", "_manifest.json", *sorted(after)]

    (wild / "_manifest.json").unlink()  # as if it had ended just before
    for name, record in manifest["shards"].items():
        write_file(wild / "_unfinished" / "records" / f"{name}.json", json.dumps(record))
    write_file(wild / "_unfinished" / "asked.json", json.dumps(manifest["asked"]))
    assert generate(model_folder, files, wild, TWO) == manifest and shards(wild) == after

    (wild / "part-000002.parquet").unlink()
    assert generate(model_folder, files, wild, TWO, num_workers=1) == manifest
    assert {name: data for name, (_, data) in shards(wild).items()} == {n: data for n, (_, data) in after.items()}


@pytest.mark.ray
def test_the_shards_of_a_worker_that_dies_are_answered_by_another(tmp_path, model_folder, local_ray):
    killed = []

    def kill(said):
        if not killed:
            killed.append(said["worker"])
            psutil.Process(int(said["worker"].split(":")[1])).kill()

    settings = Settings(num_steps=2, rows_per_shard=1)
    generate(model_folder, [write(tmp_path, "parquet")], tmp_path / "out", settings, num_workers=1, on_shard=kill)
    assert killed and pq.read_table(tmp_path / "out")["answer"].to_pylist() == answers_of(model_folder)


@pytest.mark.ray
def test_the_command_tells_how_many_failed_and_ends_well(tmp_path, model_folder, local_ray, capsys):
    rows = [{**row, "question": None if i == 4 else row["question"]} for i, row in enumerate(ROWS)]
    path, out = write(tmp_path, "jsonl", rows), str(tmp_path / "out")
    options = [
        "--model",
        str(model_folder),
        "--input",
        str(tmp_path / "*.jsonl"),
        "--output",
        out,
        "--num-workers",
        "1",
    ]
    assert main(["generate", *options]) == 0
    said = capsys.readouterr().out
    sources = [f"{row['context']} {row['question']}" for i, row in enumerate(ROWS) if i != 4]
    cut = sum(encoding.num_cut > 0 for encoding in yan_core.load(model_folder).encode(sources))
    assert 0 < cut < len(sources) and f"23 rows in {out}, 1 failed, {cut} read in part, being too long\n" in said
    assert f"row 5 of {path}: field 'question' must be text, got None" in said
    assert main(["generate", *options, "--guidance-scale", "inf", "--fresh"]) == 1
    assert "guidance_scale must be finite" in capsys.readouterr().err
    assert main(["generate", *options, "--output", "s3://bucket/out"]) == 2
    assert "--output must be a folder" in capsys.readouterr().err


@pytest.mark.ray
def test_a_registered_model_answers_as_its_folder_does(tmp_path, model_folder, local_ray):
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    client = MlflowClient(uri, uri)
    client.create_registered_model("yan-tiny")
    client.create_model_version("yan-tiny", model_folder.as_uri())
    options = ["--input", write(tmp_path, "parquet"), "--num-workers", "1", "--tracking-uri", uri]
    assert main(["generate", "--model", "models:/yan-tiny/1", *options, "--output", str(tmp_path / "out")]) == 0
    assert main(["generate", "--model", str(model_folder), *options, "--output", str(tmp_path / "same")]) == 0
    registered, plain = (pq.read_table(tmp_path / name)["answer"].to_pylist() for name in ("out", "same"))
    assert len(registered) == len(ROWS) and registered == plain


@pytest.mark.ray
def test_what_no_row_can_be_answered_with_stops_the_job(tmp_path, model_folder, local_ray):
    with pytest.raises(DataError, match="no column 'context'.*it has number, asked. Map it: --columns context=COLUMN"):
        rows = [{"number": 1, "asked": "Where?"}]
        generate(model_folder, [write(tmp_path, "jsonl", rows, "other")], tmp_path / "a", TWO)
    with pytest.raises(DataError, match="there is no row"):
        generate(model_folder, [write(tmp_path, "jsonl", [], "none")], tmp_path / "b", TWO)
    with pytest.raises(GenerateError, match="no more answers: ValueError: .*99.*0 of 23 rows are done"):
        generate(save_model(tmp_path / "long", target_tokens=99), [write(tmp_path, "jsonl")], tmp_path / "c", TWO)


def test_mistakes_are_named_before_anything_starts(tmp_path, model_folder):
    good, out = write(tmp_path, "jsonl"), tmp_path / "out"
    (tmp_path / "rows.dat").write_text("x")
    for inputs, message in (
        ([str(tmp_path / "no*.parquet")], r"no file at .*no\*.parquet"),
        ([str(tmp_path / "rows.dat")], "its ending tells no format.*.parquet"),
        ([good, write(tmp_path, "parquet")], "different formats"),
    ):
        with pytest.raises(DataError, match=message):
            generate(model_folder, inputs, out)
    with pytest.raises(CheckpointError, match="not a YAN model"):
        generate(tmp_path / "nowhere", [good], out)
    with pytest.raises(GenerateError, match="columns.*contxt.*did you mean .context"):
        generate(model_folder, [good], out, Settings(columns={"contxt": "story"}))
    with pytest.raises(GenerateError, match="has not written"):
        generate(model_folder, [good], tmp_path, fresh=True)
    assert not out.exists() and (tmp_path / "rows.dat").exists()
    for wrong in ({"num_steps": 0}, {"rows_per_shard": 0}, {"seed": -1}, {"seed": 2**31}):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))} must be"):
            Settings(**wrong)


# --- the benchmark ----------------------------------------------------------------------------------------------------


def test_the_steady_state_is_when_every_worker_is_at_work():
    def shard(worker, began_s, ended_s):
        return {"worker": worker, "began_s": began_s, "ended_s": ended_s, "record": {"rows": 10}}

    said = [shard("a", 0, 4), shard("b", 2, 4), shard("a", 5, 7), shard("b", 5, 10)]
    rate, begins_s = benchmark.steady(said)
    assert begins_s == 2 and rate == pytest.approx((5 + 10 + 10 + 4) / 5)
    with pytest.raises(ValueError, match="never at work together"):
        benchmark.steady([shard("a", 0, 1), shard("b", 2, 3)])


@pytest.mark.ray
def test_the_benchmark_reports_its_ratio(tmp_path, local_ray):
    options = ["--tiny", "--rows", "120", "--rows-per-shard", "20", "--batch-size", "10", "--target-tokens", "4"]
    assert benchmark.main([*options, "--num-workers", "1", "--turns", "1", "--results", str(tmp_path)]) == 0
    report = json.loads((tmp_path / "generate.jsonl").read_text())
    fastest = max(report["bare_rows_per_s_processes"], report["bare_rows_per_s_threads"])
    assert report["ratio"] == pytest.approx(report["rows_per_s"] / fastest) and report["rows_per_s"] > 1
    assert report["rows_per_s_with_start"] < report["rows_per_s"] and report["start_s"] > 0

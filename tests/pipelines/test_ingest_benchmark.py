"""The ingest benchmark: its corpus, and one small run."""

import json
import sys
import time

import psutil
import pyarrow.parquet as pq
import pytest

from pipelines.benchmarks import ingest
from yan_core.config import TokenizerConfig
from yan_core.tokenization import Tokenizer


def test_the_corpus_has_the_size_it_is_told_and_is_the_same_each_time(tmp_path):
    for name in ("one", "two"):
        ingest.write_corpus(tmp_path / name, megabytes=2.0, files=2)
    one, two = (pq.read_table(tmp_path / name).column("text").to_pylist() for name in ("one", "two"))
    assert one == two and len(set(one)) == len(one)
    assert sum(map(len, one)) == pytest.approx(2e6, rel=0.6)


@pytest.mark.ray
def test_the_benchmark_reports_its_ratio(tmp_path):
    options = ["--megabytes", "1", "--files", "2", "--vocab-size", "300", "--turns", "1", "--results", str(tmp_path)]
    assert ingest.main([*options, "--json", str(tmp_path / "out.json")]) == 0
    report = json.loads((tmp_path / "out.json").read_text())
    (turn,) = report["turns"]
    rate = report["tokens"] / turn["tokens_per_s_bare"]
    assert report["ratio_with_vocabulary"] == pytest.approx(rate / turn["seconds"])
    assert report["ratio"] == pytest.approx(rate / (turn["seconds"] - turn["vocabulary_s"]))
    assert turn["turns_of_bare"] >= 1
    assert 0 < turn["vocabulary_s"] < turn["seconds"] and 0 < turn["vocabulary_cpu_s"] < turn["cpu_s"]
    assert report["peak_bytes_beyond_object_store"] == sum(turn["peak_bytes_of"].values()) > 1e7
    assert {"driver", "gcs_server", "raylet"} <= turn["peak_bytes_of"].keys()
    assert json.loads((tmp_path / "ingest.jsonl").read_text()) == report


def stops(process: psutil.Process) -> bool:
    """Whether it is stopped, or soon will be: a process takes a signal when it comes to run."""
    until = time.monotonic() + 10
    while (stopped := process.status() == psutil.STATUS_STOPPED) is False and time.monotonic() < until:
        time.sleep(0.01)
    return stopped


def test_the_tokenizer_alone_has_its_turns_while_the_tasks_are_stopped(tmp_path, monkeypatch):
    monkeypatch.setattr(ingest, "BARE_S", 0.2)
    ingest.write_corpus(tmp_path, megabytes=0.5, files=1)
    bare, seen = ingest.Bare(tmp_path), list[bool]()
    bare.start(Tokenizer.train(bare.texts[:50], TokenizerConfig(kind="bpe", vocab_size=300)).to_json())
    encode = bare._some
    monkeypatch.setattr(bare, "_some", lambda: seen.append(stops(task)) or encode())
    with psutil.Popen([sys.executable, "-c", "import time; time.sleep(600)"]) as task:
        try:
            bare.turn([task])
            assert all(seen) and task.status() != psutil.STATUS_STOPPED
        finally:
            task.kill()
    ((seconds, cpu_s, tokens),) = bare.turns
    assert seconds >= 0.2 and cpu_s > 0 and tokens > 1000

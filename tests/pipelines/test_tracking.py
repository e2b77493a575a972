"""Metrics on their way to MLflow: in order, at once, and not lost when it does not answer."""

import contextlib
import os
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast
from unittest.mock import Mock

import mlflow
import pytest
import torch
from mlflow.protos.databricks_pb2 import INVALID_PARAMETER_VALUE, RESOURCE_DOES_NOT_EXIST

from pipelines import publish, run
from pipelines.contestants import report_of
from pipelines.metrics_buffer import UNSENT, MetricsBuffer
from pipelines.publish import begin_tracking, end_tracking, record_start, send_unsent
from pipelines.tracking import Tracker, TrackingError, mlflow_at, patiently
from yan_core.config import RunConfig, TokenizerConfig, TrackingConfig
from yan_core.tokenization import Tokenizer


class Server:
    """A tracking client that answers or not."""

    def __init__(self, up: bool = True) -> None:
        self.up, self.asked, self.may_answer = up, threading.Event(), threading.Event()
        self.may_answer.set()
        self.values: list[tuple[str, float, int]] = []

    def log_batch(self, run_id: str, metrics: list[mlflow.entities.Metric]) -> None:
        self.asked.set()
        assert self.may_answer.wait(60)
        if not self.up:
            raise mlflow.MlflowException("no answer")
        if any(not m.key.isascii() for m in metrics):
            raise mlflow.MlflowException("Invalid metric name", INVALID_PARAMETER_VALUE)
        self.values += [(m.key, m.value, m.step) for m in metrics]

    def log_table(self, run_id: str, columns: dict[str, list[str]], file: str) -> None:
        raise mlflow.MlflowException(f"Invalid path {file}", INVALID_PARAMETER_VALUE)


def buffer_to(server: Server, tmp_path: Path, retry_s: float = 0.05) -> MetricsBuffer:
    tracker = Tracker(f"sqlite:///{tmp_path}/mlflow.db", "run")
    tracker.client = server  # type: ignore[assignment]
    return MetricsBuffer(lambda: tracker, tmp_path / "unsent.jsonl", retry_s)


def test_every_value_arrives_in_order(tmp_path):
    server = Server()
    buffer = buffer_to(server, tmp_path)
    for step in range(2000):
        buffer.metrics({"loss": step / 2}, step)
    assert buffer.close() == 0
    assert server.values == [("loss", step / 2, step) for step in range(2000)]
    assert not (tmp_path / "unsent.jsonl").exists()


def test_training_does_not_wait_for_a_slow_server(tmp_path):
    server = Server()
    server.may_answer.clear()
    buffer = buffer_to(server, tmp_path)
    for step in range(100):
        buffer.metrics({"loss": 1.0}, step)
    assert server.asked.wait(60) and not server.values
    server.may_answer.set()
    assert buffer.close() == 0 and len(server.values) == 100


@pytest.mark.parametrize("before", [None, "sqlite:///mine.db"])
def test_mlflow_is_pointed_at_a_store_for_a_while_alone(tmp_path, monkeypatch, before):
    if before is None:
        monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    else:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", before)
    with mlflow_at(f"sqlite:///{tmp_path}/mlflow.db"):
        assert mlflow.get_tracking_uri() == os.environ["MLFLOW_TRACKING_URI"] == f"sqlite:///{tmp_path}/mlflow.db"
    assert os.environ.get("MLFLOW_TRACKING_URI") == before
    assert mlflow.is_tracking_uri_set() == (before is not None)


def test_a_server_that_comes_back_gets_what_it_missed(tmp_path):
    server = Server(up=False)
    buffer = buffer_to(server, tmp_path)
    buffer.metrics({"a": 1.0, "b": 2.0}, 1)
    assert server.asked.wait(5)
    server.up = True
    buffer.metrics({"a": 3.0}, 2)
    assert buffer.close() == 0
    assert server.values == [("a", 1.0, 1), ("b", 2.0, 1), ("a", 3.0, 2)]


def test_a_value_that_the_server_refuses_holds_up_no_other(tmp_path):
    server = Server()
    buffer = buffer_to(server, tmp_path, retry_s=60)
    server.may_answer.clear()
    buffer.metrics({"a": 1.0, "\N{SNOWMAN}": 2.0, "b": 3.0}, 1)
    buffer.table([{"text": "x"}], "../outside.json")
    buffer.metrics({"a": 4.0}, 2)
    server.may_answer.set()
    assert buffer.close() == 0
    assert server.values == [("a", 1.0, 1), ("b", 3.0, 1), ("a", 4.0, 2)]


def test_a_server_that_is_not_there_at_first_gets_all_in_the_end(tmp_path):
    (tmp_path / "unsent.jsonl").write_text('["left", 1.0, 5, 1]\n')
    server, failures, tried = Server(), [OSError("refused")], threading.Event()
    tracker = Tracker(f"sqlite:///{tmp_path}/mlflow.db", "run")
    tracker.client = server  # type: ignore[assignment]
    server.may_answer.clear()

    def connect() -> Tracker:
        tried.set()
        if failures:
            raise failures.pop()
        return tracker

    buffer = MetricsBuffer(connect, tmp_path / "unsent.jsonl", 0.05)
    buffer.metrics({"a": 1.0}, 2)
    assert tried.wait(60)
    assert (tmp_path / "unsent.jsonl").is_file()  # until it is sent: this process may end at any time
    server.may_answer.set()
    assert buffer.close() == 0 and not (tmp_path / "unsent.jsonl").exists()
    assert server.values == [("left", 1.0, 1), ("a", 1.0, 2)]


def test_what_cannot_be_sent_waits_in_a_file_for_the_next_run(tmp_path):
    down = buffer_to(Server(up=False), tmp_path)
    down.metrics({"a": 1.5}, 1)
    down.metrics({"a": float("nan")}, 2)
    assert down.spool() == 2 and (tmp_path / "unsent.jsonl").is_file()  # as at a checkpoint
    down.metrics({"a": 2.5}, 3)
    assert down.close(timeout_s=0.2) == 3
    server = Server()
    again = buffer_to(server, tmp_path)
    assert again.close() == 0
    assert [(key, step) for key, _, step in server.values] == [("a", 1), ("a", 2), ("a", 3)]
    assert server.values[0][1] == 1.5 and not (tmp_path / "unsent.jsonl").exists()


@pytest.mark.parametrize("up", [True, False])
def test_closing_ends_the_thread(tmp_path, up):
    buffer = buffer_to(Server(up), tmp_path, retry_s=60)
    buffer.metrics({"a": 1.0}, 1)
    buffer.close(timeout_s=0.5)
    buffer.thread.join(20)
    assert not buffer.thread.is_alive()


def test_runs_that_begin_at_once_make_one_store(tmp_path):
    code = (
        "import sys\nfrom pipelines.tracking import check_tracking\nfrom yan_core.config import RunConfig\n"
        "config = RunConfig(name='a', runs_dir=sys.argv[1])\nprint('ready', flush=True)\nsys.stdin.readline()\n"
        "check_tracking(config)\n"
    )
    environment = {k: v for k, v in os.environ.items() if k != "MLFLOW_TRACKING_URI"}
    command = [sys.executable, "-c", code, str(tmp_path / "runs")]
    processes = [
        subprocess.Popen(command, env=environment, text=True, stdin=-1, stdout=-1, stderr=-1)  # -1: subprocess.PIPE
        for _ in range(3)
    ]
    for process in processes:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
    errors = [process.communicate(timeout=100)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0], errors


AWAY = "http://127.0.0.1:9"  # the port that discards: nobody listens


def test_a_run_that_mlflow_knows_goes_on_without_it_and_a_new_one_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    config = RunConfig(runs_dir=str(tmp_path), tracking=TrackingConfig(uri=AWAY))
    tracker = begin_tracking(config, "abc")
    assert (tracker.uri, tracker.run_id) == (AWAY, "abc")
    end_tracking(tracker, "FINISHED")
    shown = capsys.readouterr().out
    assert f"MLflow at {AWAY} does not answer" in shown and "there the run is not marked FINISHED" in shown
    with pytest.raises(TrackingError, match=f"MLflow at {AWAY} does not answer"):
        begin_tracking(config, None)


def test_a_password_of_the_store_is_not_shown(tmp_path, monkeypatch, capsys):
    """Neither as we name the store, nor in the reason that MLflow's client gives."""
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    uri = AWAY.replace("//", "//mlflow:{}@")
    config = RunConfig(runs_dir=str(tmp_path), tracking=TrackingConfig(uri=uri.format("s3cret")))
    with pytest.raises(TrackingError) as told:
        begin_tracking(config, None)
    begin_tracking(config, "abc")
    shown = capsys.readouterr().out
    for text in (str(told.value), shown):
        assert text.count(uri.format("***")) == 2 and "s3cret" not in text


def test_what_is_recorded_of_a_run_has_no_password(tmp_path, monkeypatch):
    recorded: dict[str, Any] = {}
    config = RunConfig(runs_dir=str(tmp_path), tracking=TrackingConfig(uri="postgresql://m:s3cret@h/m"))
    monkeypatch.setattr(publish, "_record_data", lambda *_: None)
    tracker = SimpleNamespace(
        params=lambda values: recorded.update(values),
        tag=lambda *_: None,
        text=lambda text, _: recorded.update(text=text),
        system_metrics=lambda: None,
    )
    record_start(config, cast(Any, None), cast(Any, tracker))
    assert recorded["tracking.uri"] == "postgresql://m:***@h/m" and "s3cret" not in str(recorded)


def test_what_a_run_leaves_in_its_folder_has_no_password(tmp_path, monkeypatch):
    """The folder is often a share that many read."""
    config = RunConfig(name="r", runs_dir=str(tmp_path), tracking=TrackingConfig(uri="postgresql://m:s3cret@h/m"))
    stands_for = {
        "ray_session": lambda *_: contextlib.nullcontext(),
        "prepare_step": lambda *_: SimpleNamespace(manifest={"rows": {"validation": 10**6}}),
        "begin_tracking": lambda *_: SimpleNamespace(run_id="abc"),
        "check_tracking": lambda *_: None,
        "record_start": lambda *_: None,
        "end_tracking": lambda *_: None,
        "train_steps": Mock(side_effect=InterruptedError),
    }
    for name, stand_in in stands_for.items():
        monkeypatch.setattr(run, name, stand_in)
    with pytest.raises(InterruptedError):
        run.run(config)
    left = [file.read_text() for file in (tmp_path / "r").rglob("*") if file.is_file()]
    assert any("postgresql://m:***@h/m" in text for text in left) and not any("s3cret" in text for text in left)


def test_what_a_comparison_reports_has_no_password():
    uri = "postgresql://m:s3cret@h/m"
    config = RunConfig(tracking=TrackingConfig(uri=uri))
    tokenizer = Tokenizer.train(["in the hall"], TokenizerConfig(vocab_size=300))
    entries = {"yan": {"quality": [{"metric": "exact_match"}]}}
    rows = [{"answers": ["hall"]}]
    report = report_of(config, rows, tokenizer, torch.device("cpu"), entries, ["--tracking.uri", uri])
    assert report["arguments"][1] == "postgresql://m:***@h/m" and "s3cret" not in str(report)


def test_what_an_earlier_training_could_not_send_is_sent_though_none_follows(tmp_path):
    server = Server()
    tracker = Tracker(f"sqlite:///{tmp_path}/mlflow.db", "run")
    tracker.client = server  # type: ignore[assignment]
    send_unsent(tracker, tmp_path)
    file = tmp_path / UNSENT.format("run")
    file.write_text('["left", 1.0, 5, 1]\n')
    send_unsent(tracker, tmp_path)
    assert server.values == [("left", 1.0, 1)] and not file.exists()


def test_what_a_training_with_other_settings_left_goes_to_its_own_run(tmp_path):
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    config = RunConfig(runs_dir=str(tmp_path), tracking=TrackingConfig(uri=uri))
    before, now = (Tracker.start(config, None) for _ in range(2))
    (tmp_path / UNSENT.format(before.run_id)).write_text('["left", 1.0, 5, 1]\n')
    send_unsent(now, tmp_path)
    found = [[m.value for m in now.client.get_metric_history(of.run_id, "left")] for of in (before, now)]
    assert found == [[1.0], []] and not list(tmp_path.glob(UNSENT.format("*")))


def test_a_run_that_is_gone_from_mlflow_begins_anew(tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    config = RunConfig(runs_dir=str(tmp_path))
    tracker = begin_tracking(config, "0" * 32)
    assert tracker.run_id != "0" * 32
    assert begin_tracking(config, tracker.run_id).run_id == tracker.run_id


@pytest.mark.parametrize("error", [OSError("refused"), mlflow.MlflowException("no answer")])
def test_a_store_that_is_away_is_asked_again_until_it_answers(error):
    failures = [error, error]

    def do():
        if failures:
            raise failures.pop()
        return "done"

    assert patiently(do, for_s=60, pause_s=0) == "done" and not failures


def test_a_store_that_refuses_is_asked_once():
    asked = []

    def do():
        asked.append(1)
        raise mlflow.MlflowException("no such run", RESOURCE_DOES_NOT_EXIST)

    with pytest.raises(mlflow.MlflowException, match="no such run"):
        patiently(do, for_s=60, pause_s=0)
    assert len(asked) == 1
    with pytest.raises(OSError):
        patiently(lambda: os.stat("/nowhere"), for_s=0, pause_s=0)

"""`yan submit`, `yan jobs` and `yan stop`: what they refuse, what they send, and a job on a real head."""

import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import ray
import yaml
from ray.job_submission import JobStatus

from pipelines import jobs
from pipelines.arguments import UsageError, parse_config
from pipelines.cli import main
from pipelines.jobs import STOP_WAIT_S
from tests.clusters.conftest import free_port
from tests.pipelines.conftest import ON_A_HEAD, yan
from yan_core.config import RunConfig, from_dict
from yan_core.files import code_commit, code_fingerprint

ROOT = Path(__file__).parents[2]
SHIPPED = sorted((ROOT / "pipelines/configs").rglob("*.yaml"))


@pytest.fixture
def nobody_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    def asked(address: str | None) -> None:
        raise AssertionError("a cluster was asked")

    monkeypatch.setattr(jobs, "connect", asked)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--optim.lr", "3"], "optim"),
        (["--stages.flow.maxsteps", "3"], "Did you mean stages.flow.max_steps"),
        (["--scaling.num_workers", "9"], "scaling.num_workers=9 is more than the lanes"),
        (["--config", "nowhere.yaml"], "no file 'nowhere.yaml'"),
        ([], "runs_dir=runs: a job needs absolute paths"),
        (["--runs_dir", "/runs", "--init_from", "runs/world/model"], "init_from=runs/world/model"),
        (["--runs_dir", "/runs", "--env", "YAN_NO_SUCH"], "--env YAN_NO_SUCH"),
        (["--runs_dir", "/runs", "--data.task", "question_answerin"], "data.task: unknown name 'question_answerin'"),
        (
            [
                "--runs_dir",
                "/runs",
                *(f"--stages.{stage}.max_steps=0" for stage in ("autoencoder", "flow", "finetune")),
            ],
            "every stage has max_steps=0: nothing to train",
        ),
        (["--runs_dir", "/runs", "--tracking.uri", "sqlite:///mlflow.db"], "tracking.uri=sqlite:///mlflow.db"),
        (["--runs_dir", "/runs", "--tracking.uri", "mlfow://u:word@h"], "tracking.uri=mlfow://u:***@h: a job needs"),
        (["--runs_dir", ""], "runs_dir='': a job needs absolute paths"),
        (["--runs_dir", "s3://bucket/runs"], "runs_dir=s3://bucket/runs: a job needs absolute paths of folders"),
        (["--runs_dir", "/runs", "--init_from", "s3://bucket/model"], "init_from=s3://bucket/model"),
        (["--runs_dir", "/runs", "--tokenizer.path", "gs://bucket/model"], "tokenizer.path=gs://bucket/model"),
        (["--runs_dir", "/runs", "--scaling.storage", "s4://bucket"], "scaling.storage=s4://bucket: a job needs"),
        (["--runs_dir", "/runs", "--evaluation.bertscore_model", "http://x"], "evaluation.bertscore_model=http://x"),
        (["--runs_dir", "/runs", "--evaluation.perplexity_model", "gpt2"], "evaluation.perplexity_model=gpt2"),
    ],
)
def test_mistake_is_found_before_a_cluster_is_asked(nobody_is_asked, capsys, arguments: list[str], message: str):
    given = [] if "--config" in arguments else ["--config", str(ROOT / "pipelines/configs/world.yaml")]
    assert main(["submit", "--address", "http://127.0.0.1:1", *given, *arguments]) in (1, 2)
    assert message in capsys.readouterr().err


def test_upload_that_is_too_large_is_refused(tmp_path: Path):
    with pytest.raises(UsageError, match=r"would upload [\d.]+ MB, more than 0.01; the largest files are \w+/"):
        with jobs.packed(RunConfig(), 10_000):
            pass


@pytest.mark.parametrize("storage", ["", "/shared/checkpoints", "s3://bucket/a", "gs://bucket/a", "file:///shared/a"])
@pytest.mark.parametrize("uri", ["", "sqlite:////runs/mlflow.db", "https://m.example.com", "postgresql+psycopg2://h/m"])
def test_places_that_all_nodes_reach_are_let_through(storage: str, uri: str):
    jobs.check_job(
        from_dict(RunConfig, {"runs_dir": "/runs", "scaling": {"storage": storage}, "tracking": {"uri": uri}})
    )


def test_data_set_of_relative_files_is_refused():
    settings = {
        "runs_dir": "/runs",
        "data": {
            "dataset": "own",
            "datasets": {"own": {"format": "jsonl", "train": "t.jsonl", "validation": "v.jsonl"}},
        },
    }
    with pytest.raises(UsageError, match="data.datasets.own.train="):
        jobs.check_job(from_dict(RunConfig, settings))
    settings["data"]["root"] = "s3://bucket/data"
    jobs.check_job(from_dict(RunConfig, settings))


@pytest.mark.parametrize("file", SHIPPED, ids=lambda file: file.stem)
def test_config_that_is_sent_is_the_one_that_was_given(file: Path, tmp_path: Path):
    if "variants" in file.parts:
        pytest.skip("a part of a config, for yan compare")
    config = parse_config("submit", ["--config", str(file)])
    with jobs.packed(config, 20_000_000) as (folder, size):
        assert parse_config("run", ["--config", str(folder / jobs.CONFIG)]) == config
        assert 100_000 < size < 2_000_000
        assert {path.name for path in folder.iterdir()} == {"yan_core", "pipelines", "serve", "job.yaml"}
        assert not [path for path in folder.rglob("*") if "__pycache__" in path.parts]


def test_environment_is_what_was_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://mlflow:5000")
    monkeypatch.setenv("HF_TOKEN", "secret")
    variables = jobs.environment(["HF_TOKEN", "A=b=c"])
    assert variables.pop("YAN_COMMIT")
    assert variables == {
        "MLFLOW_TRACKING_URI": "http://mlflow:5000",
        "HF_TOKEN": "secret",
        "A": "b=c",
        "RAY_JOB_STOP_WAIT_TIME_S": str(STOP_WAIT_S),
    }


@pytest.mark.parametrize(
    ("uri", "passed"),
    [
        ("http://127.0.0.1:5000", False),
        ("http://localhost:5000", False),
        ("http://[::1]:5000", False),
        ("sqlite:////runs/mlflow.db", False),
        ("mlruns", False),
        ("https://mlflow.example.com", True),
        ("postgresql://mlflow:word@db.example.com/mlflow", True),
    ],
)
def test_a_tracking_store_of_this_machine_is_passed_on_only_if_asked(uri, passed, monkeypatch, capsys):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    assert ("MLFLOW_TRACKING_URI" in jobs.environment([])) == passed
    told = capsys.readouterr().err
    assert ("not passed on (--env MLFLOW_TRACKING_URI does)" in told) != passed
    assert ("can read its password" in told) == ("word@" in uri) and "word@" not in told
    assert jobs.environment(["MLFLOW_TRACKING_URI"])["MLFLOW_TRACKING_URI"] == uri


@pytest.mark.parametrize(
    ("log", "link"),
    [
        ("x\nMLflow run: abc at http://mlflow:5000/\ny", "http://mlflow:5000/#/runs/abc"),
        ("MLflow run: abc at sqlite:////runs/mlflow.db\n", "abc at sqlite:////runs/mlflow.db"),
        ("nothing", ""),
    ],
)
def test_mlflow_run_is_read_off_the_log(log: str, link: str):
    assert jobs.mlflow_link(log) == link


def test_nobody_at_the_address_is_one_line(capsys, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "")  # left as it was by monkeypatch
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert main(["jobs", "--address", f"http://127.0.0.1:{free_port()}"]) == 1
    assert re.fullmatch(r"yan jobs: no Ray answers at http://127.0.0.1:\d+: .*\n", capsys.readouterr().err)
    monkeypatch.delenv("RAY_API_SERVER_ADDRESS")
    assert main(["jobs"]) == 2
    assert "--address is missing" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("address", "status", "message"),
    [
        ("127.0.0.1:{}", 1, r"no Ray answers at http://127.0.0.1:\d+: "),
        (
            "ray://127.0.0.1:{}",
            2,
            r"--address ray://127.0.0.1:\d+: must be http:// or https://, such as http://HOST:8265",
        ),
    ],
)
def test_address_that_is_not_that_of_a_dashboard_is_said_at_once(address, status, message, capsys, monkeypatch):
    """Ray would ask its own protocol for a minute, and end in a traceback."""
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "")  # left as it was by monkeypatch
    assert main(["jobs", "--address", address.format(free_port())]) == status
    assert re.search(message, capsys.readouterr().err)


def test_cluster_of_another_ray_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "")
    monkeypatch.setattr(jobs, "JobSubmissionClient", lambda: SimpleNamespace(_server_ray_version="2.9.0"))
    with pytest.raises(jobs.JobError, match=f"at http://head:8265 runs Ray 2.9.0, this machine {ray.__version__}"):
        jobs.connect("http://head:8265")


DRIVER = """
import sys
import ray
from pipelines.run import run
from yan_core.config import RunConfig, from_dict
import yaml
ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False,
         object_store_memory=200 * 2**20, runtime_env={"py_modules": [sys.argv[2]]})
run(from_dict(RunConfig, yaml.safe_load(open(sys.argv[1]))), publish=False)
"""


def test_a_log_whose_connection_breaks_is_printed_once_and_to_its_end(capsys, monkeypatch):
    class Client:
        tries = 0

        def get_address(self) -> str:
            return "http://127.0.0.1:1"

        async def tail_job_logs(self, job: str):
            self.tries += 1
            for text in ("one\n", "two\n"):
                yield text
            raise RuntimeError("the connection is lost")

        def get_job_info(self, job: str) -> SimpleNamespace:
            return SimpleNamespace(status=JobStatus.SUCCEEDED if self.tries == 2 else JobStatus.RUNNING)

        def get_job_logs(self, job: str) -> str:
            return "one\ntwo\nthree\n"

    monkeypatch.setattr(jobs.time, "sleep", lambda seconds: None)
    assert jobs.follow(Client(), "job").status is JobStatus.SUCCEEDED
    assert capsys.readouterr().out == "one\ntwo\nthree\n"


@pytest.mark.ray
def test_workers_with_another_copy_of_the_code_stop_the_run_at_once(tiny_settings: dict, tmp_path: Path):
    copy = tmp_path / "other/yan_core"
    shutil.copytree(ROOT / "yan_core", copy, ignore=shutil.ignore_patterns("__pycache__"))
    with (copy / "solver.py").open("a") as file:
        file.write("# Edited since.\n")
    world = {"format": "world", "num_train": 400, "num_validation": 40}
    data = {**tiny_settings["data"], "datasets": {"small": world}}
    scaling = {"num_workers": 2, "max_failures": -1}
    settings = {**tiny_settings, "data": data, "runs_dir": str(tmp_path / "runs"), "scaling": scaling}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(settings))
    done = subprocess.run(
        [sys.executable, "-c", DRIVER, str(tmp_path / "config.yaml"), str(copy)],
        cwd=tmp_path,  # else its folder would come before the copy
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    here = rf"[^(]*commit {code_commit()}, sources {code_fingerprint()}, in {ROOT}/yan_core"
    assert re.search(r"TrainingFailed: training failed: worker [01] runs another copy of the code \([^)]*\)", last), (
        last
    )
    assert re.search(rf"than the driver \({here}\): ship one copy, by --working-dir or in the image", last), last
    assert not list((tmp_path / "runs/tiny").rglob("checkpoint.json"))


# --- on a real head ---------------------------------------------------------------------------------------------------


class TestOnAHead:
    pytestmark = ON_A_HEAD

    @pytest.fixture
    def config(self, tiny_settings: dict, tmp_path: Path) -> Path:
        world = {"format": "world", "num_train": 400, "num_validation": 40}
        scaling = {"num_workers": 1, "max_failures": 0}
        data = {**tiny_settings["data"], "datasets": {"small": world}}
        settings = {**tiny_settings, "data": data, "runs_dir": str(tmp_path / "runs"), "scaling": scaling}
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(settings))
        return tmp_path / "config.yaml"

    def test_job_runs_is_followed_and_listed(self, head, config: Path):
        address, variables = head
        words = ["submit", "--address", address, "--command", "train", "--config", str(config)]
        done = yan(words, variables)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        assert re.search(r"^upload: \d+ files, [01]\.\d\d MB; environment: YAN_COMMIT", done.stdout, flags=re.M)
        assert "training: done in" in done.stdout
        assert re.search(r"^job \S+: SUCCEEDED; MLflow run: \w{32} at sqlite:", done.stdout, flags=re.M)
        assert (config.parent / "runs/tiny/stages/finetune").is_dir()
        listed = yan(["jobs", "--address", address], variables).stdout.splitlines()
        assert re.match(r"JOB +STATUS +RUN +STARTED +TIME +COMMIT", listed[0])
        assert re.match(r"raysubmit_\S+ +SUCCEEDED +tiny +2", listed[1])

    def test_code_of_a_job_that_fails_is_ours(self, head, config: Path):
        address, variables = head
        absent = {"format": "jsonl", "train": "/nowhere/t.jsonl", "validation": "/nowhere/v.jsonl"}
        settings = yaml.safe_load(config.read_text())
        settings["data"]["datasets"]["small"] = absent
        config.write_text(yaml.safe_dump(settings))
        done = yan(["submit", "--address", address, "--command", "prepare", "--config", str(config)], variables)
        assert done.returncode == 1, done.stdout[-3000:]
        assert "no file at /nowhere/t.jsonl" in done.stdout
        assert re.search(r"^job \S+: FAILED$", done.stdout, flags=re.M)

    def test_job_that_is_stopped_saves_a_checkpoint(self, head, config: Path):
        address, variables = head
        words = ["submit", "--address", address, "--config", str(config), "--stages.finetune.max_steps", "100000"]
        started = yan([*words, "--command", "train", "--no-wait", "--name", "long"], variables)
        (job,) = re.findall(r"^job: (\S+);", started.stdout, flags=re.M)
        folder = config.parent / "runs/long"
        deadline = time.monotonic() + 300
        while not (folder / "stages/flow").is_dir():
            assert time.monotonic() < deadline
            time.sleep(1)
        time.sleep(5)
        stopped = yan(["stop", job, "--address", address], variables)
        assert stopped.stdout == f"{job}: STOPPED\n"
        assert list((folder / "checkpoints/training").glob("checkpoint_*/checkpoint.json"))

    def test_caller_without_the_token_is_told_so(self, head):
        address, variables = head
        without = {**variables, "RAY_AUTH_MODE": "disabled"}
        done = yan(["jobs", "--address", address], without)
        assert done.returncode == 1
        assert "wants a token: set RAY_AUTH_MODE=token" in done.stderr

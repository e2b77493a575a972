"""Ray's jobs API for runs: what is wrong is found here, what is needed is uploaded, and the job's end is ours."""

from __future__ import annotations

import argparse
import asyncio
import datetime
import logging
import os
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import aiohttp  # comes with Ray's jobs client
import ray
import ray.exceptions
import requests.exceptions
import yaml
from ray.job_submission import JobDetails, JobStatus, JobSubmissionClient

import yan_core
from pipelines.arguments import UsageError, parse_config
from pipelines.folders import where_to_look
from pipelines.listing import locate
from pipelines.prepare import corpora_of
from pipelines.progress import aligned
from pipelines.sources import find_dataset
from pipelines.state import check_stages
from yan_core.config import RunConfig, to_dict
from yan_core.files import PACKAGES, code_commit, code_fingerprint, without_password
from yan_core.tasks import get_task

TRACKING = "MLFLOW_TRACKING_URI"
CONFIG = "job.yaml"
"""The run's resolved config, in what is uploaded."""
STOP_WAIT_S = 60
"""Seconds between a job's SIGTERM and its SIGKILL: a checkpoint is saved in between. Ray's own are three."""


class JobError(RuntimeError):
    """The cluster does not do what was asked; the message is the whole story."""


# --- before anything is sent ------------------------------------------------------------------------------------------


def check_job(config: RunConfig, trains: bool = True) -> None:
    """Refuse what would fail on the cluster: no such task, nothing to train, and paths that mean another place on
    another node, as a job's own folder goes when the job ends.

    Raises:
        UsageError: Naming each such path.
        ValueError: If there is no such task, or nothing is trained.
    """
    get_task(config.data.task)
    if trains:
        check_stages(config)
    folders = {
        "runs_dir": config.runs_dir or "''",
        "init_from": config.init_from,
        "tokenizer.path": config.tokenizer.path,
        "evaluation.bertscore_model": config.evaluation.bertscore_model,
        "evaluation.perplexity_model": config.evaluation.perplexity_model,
    }
    wrong = [f"{key}={path}" for key, path in folders.items() if path and path[0] != "/"]
    if wrong:
        raise UsageError(f"{', '.join(wrong)}: a job needs absolute paths of folders that all nodes share, no URLs")
    places = {"scaling.storage": config.scaling.storage}
    for name in (config.data.dataset, *corpora_of(config.data)):
        dataset = find_dataset(config.data, name)
        if dataset.format in ("parquet", "jsonl", "csv", "text"):
            for part in ("train", "validation"):
                if where := getattr(dataset, part):
                    places[f"data.datasets.{name}.{part}"] = locate(config.data, where)
    wrong = [f"{key}={place}" for key, place in places.items() if place and not _is_reached(place, CLOUDS)]
    if wrong:
        raise UsageError(
            f"{', '.join(wrong)}: a job needs absolute paths that all nodes share, or URLs of {', '.join(CLOUDS)}; "
            "data sets' paths start from data.root"
        )
    store = config.tracking.uri
    if store and not _is_reached(store.removeprefix("sqlite:///"), STORES):
        raise UsageError(
            f"tracking.uri={without_password(store)}: a job needs sqlite:/// with an absolute path, or a URL of "
            f"{', '.join(STORES)}"
        )


CLOUDS = ("s3", "gs", "gcs", "hdfs", "abfs", "abfss", "file")
"""Where data and checkpoints may lie, by the schemes of their URLs."""
STORES = ("http", "https", "postgresql", "mysql", "mssql", "databricks")
"""What MLflow is reached by; a database's may name its driver too."""


def _is_reached(place: str, schemes: Sequence[str]) -> bool:
    scheme, is_url, _ = place.partition("://")
    return scheme.partition("+")[0] in schemes if is_url else place.startswith("/")


@contextmanager
def packed(config: RunConfig, max_bytes: int) -> Iterator[tuple[Path, int]]:
    """A folder with the code that runs here and the run's config, and its size in bytes, while the block runs.

    Raises:
        UsageError: If it is larger than `max_bytes`; names the largest files.
    """
    with tempfile.TemporaryDirectory(prefix="yan-job-") as scratch:
        folder = Path(scratch)
        for name in PACKAGES:
            source = Path(yan_core.__file__).parents[1] / name
            shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("__pycache__", "results", ".*"))
        (folder / CONFIG).write_text(yaml.safe_dump(to_dict(config), sort_keys=False), encoding="utf-8")
        sizes = {file.relative_to(folder).as_posix(): file.stat().st_size for file in _files(folder)}
        total = sum(sizes.values())
        if total > max_bytes:
            largest = ", ".join(sorted(sizes, key=lambda name: -sizes[name])[:3])
            raise UsageError(
                f"--max-upload-mb: the job would upload {total / 1e6:.1f} MB, more than {max_bytes / 1e6:g}; the "
                f"largest files are {largest}"
            )
        yield folder, total


def _files(folder: Path) -> list[Path]:
    return [path for path in sorted(folder.rglob("*")) if path.is_file()]


def environment(given: Sequence[str]) -> dict[str, str]:
    """Environment of a job: what is named, and MLFLOW_TRACKING_URI unless it leads nowhere from another machine.

    Anybody with the cluster's token can read it.

    Args:
        given: `NAME=VALUE`, or `NAME` for a variable of this process.

    Raises:
        UsageError: If a named variable is not set.
    """
    variables = {"YAN_COMMIT": code_commit(), "RAY_JOB_STOP_WAIT_TIME_S": str(STOP_WAIT_S)}
    if uri := os.environ.get(TRACKING):
        if _is_of_this_machine(uri):
            print(f"{TRACKING} is of this machine and not passed on (--env {TRACKING} does)", file=sys.stderr)
        else:
            variables[TRACKING] = uri
            if without_password(uri) != uri:
                print(f"{TRACKING} goes along: whoever has the cluster's token can read its password", file=sys.stderr)
    for item in given:
        name, equals, value = item.partition("=")
        if not equals and name not in os.environ:
            raise UsageError(f"--env {name}: there is no such variable here; give it as {name}=VALUE")
        variables[name] = value if equals else os.environ[name]
    return variables


def _is_of_this_machine(uri: str) -> bool:
    """Whether a tracking store is a file, or at an address of loopback."""
    parts = urlsplit(uri)
    return parts.scheme in ("", "file", "sqlite") or parts.hostname in ("localhost", "127.0.0.1", "::1")


# --- the cluster ------------------------------------------------------------------------------------------------------


def connect(address: str | None) -> JobSubmissionClient:
    """A client of the jobs API.

    Args:
        address: Of the head's dashboard; None: RAY_API_SERVER_ADDRESS, else the cluster of RAY_ADDRESS.

    Raises:
        JobError: If nobody answers, or another version of Ray.
        UsageError: If no address is known, or it is none of a dashboard.
    """
    logging.getLogger("ray.dashboard.modules.job.sdk").setLevel(logging.ERROR)
    logging.getLogger("ray.dashboard.modules.dashboard_sdk").setLevel(logging.ERROR)
    if named := address or os.environ.get("RAY_API_SERVER_ADDRESS"):
        os.environ["RAY_API_SERVER_ADDRESS"] = address = _of_dashboard(named)
    elif not os.environ.get("RAY_ADDRESS"):
        raise UsageError("--address is missing: http://HOST:8265 of the cluster's head, or set RAY_API_SERVER_ADDRESS")
    shown = address or os.environ.get("RAY_ADDRESS")
    with plain_errors(shown):
        client = JobSubmissionClient()
    if (found := client._server_ray_version) != ray.__version__:  # asked by its constructor
        raise JobError(f"the cluster at {shown} runs Ray {found}, this machine {ray.__version__}: use one version")
    return client


def _of_dashboard(address: str) -> str:
    """An address with its scheme: without one Ray would ask its own protocol, and wait a minute for an answer."""
    scheme, is_url, _ = address.partition("://")
    if not is_url and address != "auto":
        return f"http://{address}"
    if is_url and scheme not in ("http", "https"):
        raise UsageError(f"--address {address}: must be http:// or https://, such as http://HOST:8265 of the head")
    return address


@contextmanager
def plain_errors(address: str | None) -> Iterator[None]:
    """Say what went wrong with a cluster in one line."""
    try:
        yield
    except (ConnectionError, requests.exceptions.RequestException, ray.exceptions.RpcError) as error:
        raise JobError(f"no Ray answers at {address}: is the address that of the head's dashboard (port 8265)?") from (
            error
        )
    except ray.exceptions.AuthenticationError as error:
        raise JobError(
            f"the cluster at {address} wants a token: set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN_PATH to its file"
        ) from error
    except RuntimeError as error:
        raise JobError(str(error).strip().splitlines()[-1][:500]) from error


def submit(
    client: JobSubmissionClient, command: str, config: RunConfig, variables: dict[str, str], max_bytes: int
) -> str:
    """Upload code and config and start the job; returns its id."""
    with packed(config, max_bytes) as (folder, size):
        print(f"upload: {len(_files(folder))} files, {size / 1e6:.2f} MB; environment: {', '.join(variables)}")
        with plain_errors(client.get_address()):
            return client.submit_job(
                entrypoint=f"python -m pipelines {command} --config {CONFIG}",
                runtime_env={"working_dir": str(folder), "env_vars": variables},
                metadata={"run": config.name, "commit": code_commit(), "code": code_fingerprint()},
            )


def follow(client: JobSubmissionClient, job: str) -> JobDetails:
    """Print a job's log until it ends, over as many connections as it takes."""
    log, tries, broken = _Log(), 0, False
    while True:
        before = log.shown
        try:
            asyncio.run(log.print_while_it_grows(client, job))
            broken = False
        except (aiohttp.ClientError, RuntimeError, OSError):
            tries, broken = tries + 1, True
        tries = 0 if log.shown > before else tries
        with plain_errors(client.get_address()):
            try:
                details = client.get_job_info(job)
            except (ConnectionError, requests.exceptions.RequestException):
                if tries >= 30:
                    raise
                time.sleep(2)
                continue
        if details.status.is_terminal():
            if broken:  # what the connection did not bring
                with plain_errors(client.get_address()):
                    log.print_rest(client.get_job_logs(job))
            return details
        time.sleep(1)


class _Log:
    """A job's log as it is printed, each character once."""

    shown = 0

    async def print_while_it_grows(self, client: JobSubmissionClient, job: str) -> None:
        """Print from a new connection what is not printed yet."""
        seen = 0
        async for text in client.tail_job_logs(job):
            print(text[max(0, self.shown - seen) :], end="", flush=True)
            seen += len(text)
            self.shown = max(self.shown, seen)

    def print_rest(self, whole: str) -> None:
        """Print what is not printed yet of the whole log."""
        print(whole[self.shown :], end="", flush=True)
        self.shown = max(self.shown, len(whole))


def exit_code(details: JobDetails) -> int:
    """The code that this process leaves with: the job's."""
    if details.status == JobStatus.SUCCEEDED:
        return 0
    if details.status == JobStatus.STOPPED:
        return 143
    return details.driver_exit_code or 1


def mlflow_link(log: str) -> str:
    """Address of the MLflow run that a log names, for a browser where there is one; empty: it names none."""
    found = re.findall(r"^MLflow run: (\w+) at (\S+)$", log, flags=re.M)
    if not found:
        return ""
    run, uri = found[-1]
    return where_to_look(uri, run) if uri.startswith("http") else f"{run} at {uri}"


# --- the commands -----------------------------------------------------------------------------------------------------


def submit_main(args: list[str]) -> int:
    """`yan submit`."""
    parser = argparse.ArgumentParser(
        prog="yan submit",
        usage="yan submit --address http://HOST:8265 --config FILE [--section.key value ...]",
        description="Run on a cluster what `yan run` would here, and follow it.",
        allow_abbrev=False,
    )
    parser.add_argument("--address", help="the head's dashboard; default: RAY_API_SERVER_ADDRESS, RAY_ADDRESS")
    parser.add_argument("--command", choices=["run", "train", "prepare"], default="run", help="what to run")
    parser.add_argument("--env", action="append", default=[], metavar="NAME[=VALUE]", help="pass a variable; repeat it")
    parser.add_argument("--max-upload-mb", type=float, default=20.0, help="refuse to upload more")
    parser.add_argument("--no-wait", action="store_true", help="leave when the job is started")
    chosen, rest = parser.parse_known_args(args)
    config = parse_config("submit", rest)
    check_job(config, trains=chosen.command != "prepare")
    variables = environment(chosen.env)
    client = connect(chosen.address)
    job = submit(client, chosen.command, config, variables, int(chosen.max_upload_mb * 1e6))
    print(f"job: {job}; yan stop {job} stops it, Ctrl-C leaves it running", flush=True)
    if chosen.no_wait:
        return 0
    try:
        details = follow(client, job)
    except KeyboardInterrupt:
        print(f"\nyan submit: {job} goes on without us; yan stop {job} stops it", file=sys.stderr)
        return 130
    with plain_errors(client.get_address()):
        link = mlflow_link(client.get_job_logs(job))
    print(f"job {job}: {details.status.value}{f'; MLflow run: {link}' if link else ''}")
    if details.status == JobStatus.FAILED and details.message:
        print(f"yan submit: {details.message.strip().splitlines()[-1][:500]}", file=sys.stderr)
    return exit_code(details)


def jobs_main(args: list[str]) -> int:
    """`yan jobs`."""
    parser = argparse.ArgumentParser(prog="yan jobs", description="The jobs of a cluster, the newest first.")
    parser.add_argument("--address", help="the head's dashboard; default: RAY_API_SERVER_ADDRESS, RAY_ADDRESS")
    client = connect(parser.parse_args(args).address)
    with plain_errors(client.get_address()):
        jobs = [job for job in client.list_jobs() if job.submission_id]
    print("\n".join(table(jobs)))
    return 0


def table(jobs: Sequence[JobDetails]) -> list[str]:
    """Lines that show jobs, the newest first."""
    rows: list[tuple[str, ...]] = [("JOB", "STATUS", "RUN", "STARTED", "TIME", "COMMIT")]
    for job in sorted(jobs, key=lambda job: -(job.start_time or 0)):
        metadata: dict[str, Any] = job.metadata or {}
        rows.append(
            (
                str(job.submission_id),
                job.status.value,
                metadata.get("run", "-"),
                moment(job.start_time),
                span(job.start_time, job.end_time),
                metadata.get("commit", "-"),
            )
        )
    return aligned(rows)


def moment(at_ms: int | None) -> str:
    """A time of the clock, for a table."""
    return datetime.datetime.fromtimestamp(at_ms / 1000).strftime("%Y-%m-%d %H:%M") if at_ms else "-"


def span(start_ms: int | None, end_ms: int | None) -> str:
    """A length of time, up to now for what has no end, for a table."""
    if not start_ms:
        return "-"
    seconds = int((end_ms or time.time() * 1000) - start_ms) // 1000
    return f"{seconds // 3600}:{seconds // 60 % 60:02}:{seconds % 60:02}"


def stop_main(args: list[str]) -> int:
    """`yan stop`."""
    parser = argparse.ArgumentParser(
        prog="yan stop",
        description="Have a job save a checkpoint and end. The same `yan submit` goes on from there.",
    )
    parser.add_argument("job", help="as `yan jobs` lists it")
    parser.add_argument("--address", help="the head's dashboard; default: RAY_API_SERVER_ADDRESS, RAY_ADDRESS")
    chosen = parser.parse_args(args)
    client = connect(chosen.address)
    with plain_errors(client.get_address()):
        if not client.stop_job(chosen.job):
            print(f"{chosen.job} had ended already: {client.get_job_status(chosen.job).value}")
            return 0
        deadline = time.monotonic() + 2 * STOP_WAIT_S
        while not (status := client.get_job_status(chosen.job)).is_terminal():
            if time.monotonic() > deadline:
                raise JobError(f"{chosen.job} was told to stop {2 * STOP_WAIT_S} s ago and is still {status.value}")
            time.sleep(0.5)
    print(f"{chosen.job}: {status.value}")
    return 0

"""The main job end to end on the built-in world: raw text to an answer over HTTP, then a summary. `make quickstart`."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pipelines.arguments import parse_config
from pipelines.evaluation import Quality
from pipelines.folders import where_to_look
from pipelines.prepare import open_prepared
from pipelines.progress import say
from pipelines.run import RunResult, run

CONFIG = Path(__file__).parent / "configs" / "world.yaml"
SHORT = {"autoencoder": 60, "flow": 20, "finetune": 60}
"""Steps of `--short`: every part runs, the answers are not good."""


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def post(url: str, body: dict[str, Any], timeout_s: float = 30.0) -> dict[str, Any]:
    """POST JSON and read JSON."""
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=timeout_s) as response:
        return json.load(response)


@contextmanager
def served(model: Path, timeout_s: float = 180.0) -> Iterator[str]:
    """`yan serve` in a process of its own until the block ends; gives its address once a generation has worked.

    Raises:
        RuntimeError: If it does not get ready; carries what it printed last.
    """
    port = _free_port()
    command = [sys.executable, "-m", "pipelines", "serve", "--model", str(model), "--port", str(port)]
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
        try:
            url, deadline = f"http://127.0.0.1:{port}", time.monotonic() + timeout_s
            while not _ready(url):
                if process.poll() is not None or time.monotonic() > deadline:
                    output.seek(0)
                    raise RuntimeError(f"the server did not get ready:\n{output.read()[-2000:]}")
                time.sleep(0.2)
            yield url
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _ready(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/readyz", timeout=5) as response:
            return response.status == 200
    except (urllib.error.URLError, OSError):
        return False


def _question(result: RunResult) -> dict[str, Any]:
    rows = open_prepared(result.model.parent / "prepared").validation(200)
    return next((row for row in rows if row["kind"] == "where"), rows[0])


def _quality_table(quality: Sequence[Quality]) -> list[str]:
    kinds = sorted(quality[0].by_kind, key=lambda k: (k != "where", k))
    lines = ["  steps  ms   " + "".join(f"{k:>10}" for k in [*kinds, "all"])]
    for q in quality:
        values = "".join(f"{v:>10.3f}" for v in [*(q.by_kind[k] for k in kinds), q.value])
        lines.append(f"  {q.num_steps:>5} {q.latency_ms_batch_1:>4.1f}  {values}")
    return lines


def main(args: list[str]) -> int:
    """Run, serve, ask, sum up.

    Args:
        args: `--short` for a run of seconds, `--fresh` to forget an earlier run, then overrides as for `yan run`.
    """
    if "--help" in args or "-h" in args:
        say("usage: yan quickstart [--short] [--fresh] [--section.key value ...]\n")
        say("  --short   a few steps of everything: shows that it runs, the answers are not good")
        say("  --fresh   forget what an earlier quickstart left")
        return 0
    started = time.perf_counter()
    overrides = [a for a in args if a not in ("--short", "--fresh")]
    if "--short" in args:
        steps = [part for stage, n in SHORT.items() for part in (f"--stages.{stage}.max_steps", str(n))]
        overrides = ["--name", "world_short", "--evaluation.max_rows", "100", *steps, *overrides]
    config = parse_config("quickstart", ["--config", str(CONFIG), *overrides])
    folder = Path(config.runs_dir) / config.name
    say(f"YAN quickstart: built-in world -> {folder}, {config.scaling.max_workers} training workers")
    result = run(config, fresh="--fresh" in args)

    say("serve: starting Ray Serve")
    row = _question(result)
    with served(result.model) as url:
        answers = [post(f"{url}/v1/generate", {"source": row["source"], "seed": seed}) for seed in range(20)]
    answer = answers[0]
    waits = sorted(a["latency_ms"] for a in answers)
    say("serve: stopped")

    seconds = ", ".join(f"{k} {v:.0f} s" for k, v in result.seconds.items()) or "nothing had to be done again"
    say("")
    say("=" * 100)
    say(f"Asked over HTTP : {row['source']}")
    say(f"Answered        : {answer['text']}   (right: {row['target']})")
    say(
        f"                  {answer['nfe']} forward passes for {len(answer['tokens'])} tokens, in the server "
        f"{waits[0]:.1f} ms at best, {waits[len(waits) // 2]:.1f} ms median of {len(waits)}"
    )
    say(f"Quality         : {result.quality[0].metric} on held-out stories by kind of question, no oracle length")
    for line in _quality_table(result.quality):
        say(line)
    few = "   (a few steps alone, as --short: no good answers yet)" * ("--short" in args)
    say(f"Trained         : {seconds}; {time.perf_counter() - started:.0f} s in all{few}")
    say(f"Model           : {result.model}   registered as {result.registered}")
    say(f"Serve it        : .venv/bin/yan serve --model {result.model}")
    look = where_to_look(result.tracking_uri, result.run_id)
    say(f"Look at the run : {'' if look.startswith('http') else '.venv/bin/'}{look}")
    say("=" * 100)
    return 0

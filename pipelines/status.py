"""`yan status`: a cluster's nodes, jobs and services, and the latest runs of MLflow, in one screen."""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

import requests
from ray.job_submission import JobSubmissionClient

from pipelines import jobs
from pipelines.folders import store_here
from pipelines.progress import aligned
from pipelines.tracking import RunSummary, TrackingError, latest_runs
from yan_core.files import without_password

HERE = "http://127.0.0.1:8265"
"""The dashboard of a head on this machine, or at the end of `ray dashboard` or `kubectl port-forward`."""
NODES = "/nodes?view=summary"
WAITING = "/api/v0/{}?filter_keys=state&filter_predicates=%3D&filter_values={}"
SERVE = "/api/serve/applications/"
QUEUES = "sum by (application) (last_over_time(ray_yan_queue_size[1m]))"
"""In Prometheus: sources that wait in the replicas of each application."""
SHOWN = 8
"""Lines of a table; the rest is counted."""
TIMEOUT_S = 20


def main(args: list[str]) -> int:
    """`yan status`."""
    parser = argparse.ArgumentParser(
        prog="yan status", description="A cluster's nodes, jobs and services, and the latest MLflow runs."
    )
    parser.add_argument("--address", help=f"the head's dashboard; default: RAY_API_SERVER_ADDRESS, RAY_ADDRESS, {HERE}")
    parser.add_argument("--tracking-uri", help="MLflow; default: MLFLOW_TRACKING_URI, runs/mlflow.db")
    parser.add_argument("--prometheus", help="Prometheus, which knows what waits; default: RAY_PROMETHEUS_HOST")
    chosen = parser.parse_args(args)
    named = chosen.address or os.environ.get("RAY_API_SERVER_ADDRESS") or os.environ.get("RAY_ADDRESS")
    client = jobs.connect(chosen.address if named else HERE)
    print(f"cluster {client.get_address()}, Ray {client._server_ray_version}")
    waiting = {
        "placement groups": asked(client, WAITING.format("placement_groups", "PENDING")),
        "actors": asked(client, WAITING.format("actors", "PENDING_CREATION")),
    }
    print("\n".join([*cluster_lines(asked(client, NODES)), *waiting_lines(waiting)]))
    with jobs.plain_errors(client.get_address()):
        found = [job for job in client.list_jobs() if job.submission_id]
    for title, lines in {
        "jobs": cut(jobs.table(found)) if found else ["none"],
        "services": [*serve_lines(asked(client, SERVE)), *queue_lines(chosen.prometheus)],
        "runs": run_lines(chosen.tracking_uri),
    }.items():
        print("\n".join(["", title, *lines]))
    return 0


def asked(client: JobSubmissionClient, path: str) -> dict[str, Any] | str:
    """What the dashboard answers, or why it does not."""
    page = path.partition("?")[0]
    with jobs.plain_errors(client.get_address()):
        try:
            answer = client._do_request("GET", path, timeout=TIMEOUT_S)  # with the token that it knows
        except requests.exceptions.Timeout:
            return f"{page} does not answer within {TIMEOUT_S} s"
    if answer.status_code != 200:
        return f"{page} answers {answer.status_code}: {answer.text.strip()[:200]}"
    try:
        return answer.json()
    except requests.exceptions.JSONDecodeError:
        return f"{page} answers no JSON"


# --- what is shown ----------------------------------------------------------------------------------------------------


def cluster_lines(answer: Mapping[str, Any] | str) -> list[str]:
    """Nodes that live, the head first, and their sum."""
    if isinstance(answer, str):
        return [answer]
    data = answer["data"]
    nodes = [node for node in data["summary"] if node["raylet"].get("state") == "ALIVE"]
    dead = len(data["summary"]) - len(nodes)
    nodes.sort(key=lambda node: (not node["raylet"].get("isHeadNode"), str(node.get("ip"))))
    in_use = {node: used(text) for node, text in data.get("nodeLogicalResources", {}).items()}
    rows: list[tuple[str, ...]] = [("NODE", "CPU", "GPU", "GPU BUSY", "MEMORY", "OBJECT STORE")]
    sums = dict.fromkeys(["CPU", "GPU", "memory", "of memory", "store", "of store"], 0.0)
    sums_used = {"CPU": 0.0, "GPU": 0.0}
    for node in nodes:
        raylet = node["raylet"]
        has = raylet.get("resourcesTotal", {})
        uses = in_use.get(raylet["nodeId"])
        memory = node.get("mem") or (0, 0, 0, 0)
        store = raylet.get("objectStoreUsedMemory", 0)
        of_store = store + raylet.get("objectStoreAvailableMemory", 0)
        busy = [gpu["utilizationGpu"] for gpu in node.get("gpus") or [] if gpu.get("utilizationGpu") is not None]
        rows.append(
            (
                f"{raylet.get('nodeManagerAddress', '?')}{' (head)' if raylet.get('isHeadNode') else ''}",
                *(_share(None if uses is None else uses.get(kind, 0.0), has.get(kind, 0.0)) for kind in sums_used),
                f"{sum(busy) / len(busy):.0f}%" if busy else "-",
                _gigabytes(memory[3], memory[0]),
                _gigabytes(store, of_store),
            )
        )
        for kind in sums_used:
            sums[kind] += has.get(kind, 0.0)
            sums_used[kind] += (uses or {}).get(kind, 0.0)
        for kind, value in zip(list(sums)[2:], (memory[3], memory[0], store, of_store), strict=True):
            sums[kind] += value
    shown = cut(aligned(rows))
    total = (
        f"{len(nodes)} node{'s' * (len(nodes) != 1)}{f', {dead} dead' if dead else ''}: "
        f"CPUs {_share(sums_used['CPU'], sums['CPU'])}, GPUs {_share(sums_used['GPU'], sums['GPU'])}, "
        f"memory {_gigabytes(sums['memory'], sums['of memory'])}, "
        f"object store {_gigabytes(sums['store'], sums['of store'])}"
    )
    return [*shown, total]


def used(text: str) -> dict[str, float]:
    """What is taken of a node, from the dashboard's lines; a placement group takes all that it reserves."""
    found: dict[str, float] = {}
    for line in text.splitlines():
        if taken := re.match(r"([\d.]+)/[\d.]+ (\S+)(?: \(([\d.]+) used of ([\d.]+) reserved)?", line):
            found[taken[2]] = float(taken[1]) - float(taken[3] or 0) + float(taken[4] or 0)
    return found


def waiting_lines(answers: Mapping[str, Mapping[str, Any] | str]) -> list[str]:
    """What waits for resources."""
    counts = {what: _counted(answer) for what, answer in answers.items()}
    if not any(counts.values()):
        return []
    return ["waiting for resources: " + ", ".join(f"{what} {count}" for what, count in counts.items() if count)]


def _counted(answer: Mapping[str, Any] | str) -> int:
    return 0 if isinstance(answer, str) else len(answer["data"]["result"]["result"])


def serve_lines(answer: Mapping[str, Any] | str) -> list[str]:
    """Applications of Ray Serve with their deployments."""
    if isinstance(answer, str):
        return [answer]
    if not answer.get("applications"):
        return ["no application is deployed" if answer.get("controller_info") else "Ray Serve does not run"]
    rows: list[tuple[str, ...]] = [("APPLICATION", "STATUS", "ROUTE", "DEPLOYMENT", "STATUS", "REPLICAS")]
    notes = []
    for name, app in answer["applications"].items():
        first = (name, app["status"], app.get("route_prefix") or "-")
        for part in app["deployments"].values():
            replicas = part.get("replicas", [])
            running = sum(replica["state"] == "RUNNING" for replica in replicas)
            others = [replica["state"].lower() for replica in replicas if replica["state"] != "RUNNING"]
            wanted = part.get("target_num_replicas", "?")
            told = ", ".join([f"{running}/{wanted}", *(f"{others.count(kind)} {kind}" for kind in sorted(set(others)))])
            rows.append((*first, part["name"], part["status"], told))
        if not app["deployments"]:
            rows.append((*first, "-", "-", "-"))
        messages = {app.get("message", ""), *(part.get("message", "") for part in app["deployments"].values())}
        notes += [f"{name}: {_last_line(message)}" for message in sorted(messages - {""})]
    proxies = [proxy["status"] for proxy in answer.get("proxies", {}).values()]
    listen = ", ".join(f"{proxies.count(status)} {status}" for status in sorted(set(proxies)))
    return [*cut(aligned(rows)), *notes, *([f"proxies: {listen}"] if listen else [])]


def queue_lines(prometheus: str | None) -> list[str]:
    """What waits in the replicas, as Prometheus has it: a replica knows only its own."""
    address = prometheus or os.environ.get("RAY_PROMETHEUS_HOST")
    if not address:
        return ["waiting requests: name a Prometheus by --prometheus or RAY_PROMETHEUS_HOST"]
    shown = without_password(address)
    try:
        answer = requests.get(f"{address.rstrip('/')}/api/v1/query", {"query": QUEUES}, timeout=TIMEOUT_S)
        answer.raise_for_status()
        series = answer.json()["data"]["result"]
        queues = {one["metric"].get("application", "?"): float(one["value"][1]) for one in series}
    except requests.exceptions.ConnectionError:
        return [f"nobody answers at {shown}, where Prometheus should"]
    except (requests.exceptions.RequestException, KeyError, TypeError, ValueError) as error:
        return [f"Prometheus at {shown} does not answer: {without_password(_last_line(str(error)))}"]
    told = ", ".join(f"{name} {size:g}" for name, size in sorted(queues.items())) or "none is known"
    return [f"waiting requests: {told} (Prometheus at {shown})"]


def run_lines(uri: str | None) -> list[str]:
    """The latest runs of MLflow."""
    uri = uri or os.environ.get("MLFLOW_TRACKING_URI") or store_here()
    if not uri:
        return ["no MLflow is named by --tracking-uri or MLFLOW_TRACKING_URI, and there is no runs/mlflow.db"]
    try:
        runs = latest_runs(uri, SHOWN)
    except TrackingError as error:
        return [str(error)]
    if not runs:
        return [f"none at {without_password(uri)}"]
    return [f"at {without_password(uri)}", *aligned(run_rows(runs))]


def run_rows(runs: Sequence[RunSummary]) -> list[tuple[str, ...]]:
    """Cells of a table of runs."""
    rows: list[tuple[str, ...]] = [("RUN", "STATUS", "STARTED", "TIME", "EXPERIMENT", "ID")]
    for run in runs:
        times = jobs.moment(run.start_ms), jobs.span(run.start_ms, run.end_ms)
        rows.append((run.name, run.status, *times, run.experiment, run.run_id))
    return rows


def cut(lines: Sequence[str]) -> list[str]:
    """A table's head and its first lines."""
    more = len(lines) - 1 - SHOWN
    return [*lines[: SHOWN + 1], *([f"... and {more} more"] if more > 0 else [])]


def _share(taken: float | None, of: float) -> str:
    return f"{'?' if taken is None else format(taken, 'g')}/{of:g}"


def _gigabytes(taken: float, of: float) -> str:
    return f"{taken / 1e9:.1f}/{of / 1e9:.1f} GB"


def _last_line(text: str) -> str:
    return text.strip().splitlines()[-1].strip()[:200]

"""Prometheus and Grafana."""

import copy
import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.clusters.checks import CLUSTERS, dashboard, metrics_of, prometheus, provisioning, query, written

MONITORING = CLUSTERS / "monitoring"
DASHBOARD = json.loads((MONITORING / "grafana/dashboards/yan.json").read_text())
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
RULES = yaml.safe_load((MONITORING / "rules.yml").read_text())["groups"][0]["rules"]


@pytest.mark.parametrize(
    ("expression", "message"),
    [
        ("sum(ray_node_cpu_count", "unclosed"),
        ("ray_serve_requests_per_fortnight", "Ray has no metric"),
        ("sum by (instance) (ray_node_cpu_cont) or vector(0)", "Ray has no metric ray_node_cpu_cont"),
    ],
)
def test_checker_finds_wrong_queries(expression: str, message: str):
    (error,) = query(expression)
    assert message in error


def test_labels_are_not_taken_for_metrics():
    expression = "sum by (ray_train_run_name) (rate(ray_train_report_total_blocked_time_s{ray_train_run_name='a'}[5m]))"
    assert metrics_of(expression) == {"ray_train_report_total_blocked_time_s"}


@pytest.mark.parametrize(
    ("keys", "value", "message"),
    [
        (["titel"], "YAN", "no field 'titel'"),
        (["panels", 1, "targets", 0, "expression"], "up", "no field 'expression'"),
        (["panels", 1, "targets", 0, "expr"], "ray_nothing", "no metric ray_nothing"),
    ],
)
def test_checker_finds_wrong_fields_of_a_dashboard(keys: list[Any], value: Any, message: str):
    changed = copy.deepcopy(DASHBOARD)
    place: Any = changed
    for key in keys[:-1]:
        place = place[key]
    place[keys[-1]] = value
    assert any(message in error for error in dashboard(written(changed, ".json")))


def test_checker_finds_wrong_fields_of_provisioning():
    file = MONITORING / "grafana/provisioning/datasources/prometheus.yaml"
    changed = yaml.safe_load(file.read_text())
    changed["datasources"][0]["adress"] = "here"
    assert provisioning(written(changed)) == ["datasources: unknown adress"]


def test_checker_finds_wrong_alerts_and_configs():
    rules = yaml.safe_load((MONITORING / "rules.yml").read_text())
    rules["groups"][0]["rules"][0]["expr"] = "sum(ray_nothing)"
    assert "no metric ray_nothing" in prometheus(written(rules))[0]
    config = yaml.safe_load((MONITORING / "prometheus.yml").read_text())
    config["scrape_config"] = config.pop("scrape_configs")
    assert "scrape_config" in prometheus(written(config))[0]


HEALTHY = 'ray_serve_deployment_replica_healthy{application="yan", replica="%s"}'
REQUESTS = 'ray_serve_num_http_requests_total{application="yan"}'
ERRORS = 'ray_serve_num_http_error_requests_total{application="yan", error_code="%s"}'
SLOW = 'ray_serve_deployment_processing_latency_ms_bucket{application="yan", le="%s"}'
QUEUE = 'ray_yan_queue_size{application="yan", replica="%s"}'
GPU = 'ray_node_gpus_utilization{instance="%s", GpuIndex="%s"}'
PENDING = 'autoscaler_pending_nodes{instance="head:44217", NodeType="%s"}'


def takes(under_a_second: int) -> dict[str, str]:
    """A histogram of a hundred answers a minute, of which so many take less than a second."""
    counts = {"500": under_a_second, "1000": under_a_second, "2000": 100, "+Inf": 100}
    return {SLOW % le: f"0+{count}x100" for le, count in counts.items()}


CASES = [
    ("NoHealthyReplica", {HEALTHY % "a": "1x100", HEALTHY % "b": "1x100"}, False),
    ("NoHealthyReplica", {HEALTHY % "a": "1x10 0x90", HEALTHY % "b": "1x100"}, False),
    ("NoHealthyReplica", {HEALTHY % "a": "1x85 0x15", HEALTHY % "b": "1x85 0x15"}, True),
    ("NoHealthyReplica", {HEALTHY % "a": "1x70", HEALTHY % "b": "1x70"}, True),  # gone with their nodes: none is 0
    ("NoHealthyReplica", {}, False),  # nothing was served here
    ("ServiceFails", {REQUESTS: "0+600x100", ERRORS % 500: "0+7x100"}, True),
    ("ServiceFails", {REQUESTS: "0+600x100", ERRORS % 500: "0+5x100"}, False),
    ("ServiceFails", {REQUESTS: "0+600x100", ERRORS % 500: "0+4x100", ERRORS % 503: "0+3x100"}, True),
    ("ServiceFails", {REQUESTS: "0+600x100", ERRORS % 404: "0+60x100"}, False),  # of those who ask
    ("ServiceSlow", takes(94), True),
    ("ServiceSlow", takes(96), False),
    ("RequestsQueue", {QUEUE % "a": "251x100", QUEUE % "b": "250x100"}, True),
    ("RequestsQueue", {QUEUE % "a": "250x100", QUEUE % "b": "250x100"}, False),
    ("NodeOutOfMemory", {"ray_node_mem_used": "96x100", "ray_node_mem_total": "100x100"}, True),
    ("NodeOutOfMemory", {"ray_node_mem_used": "95x100", "ray_node_mem_total": "100x100"}, False),
    ("DiskFull", {"ray_node_disk_free": "9x100", "ray_node_disk_usage": "91x100"}, True),
    ("DiskFull", {"ray_node_disk_free": "11x100", "ray_node_disk_usage": "89x100"}, False),
    ("GpuIdle", {GPU % ("n1", 0): "4x100"}, True),
    ("GpuIdle", {GPU % ("n1", 0): "50x40 4x60"}, False),
    ("GpuIdle", {GPU % ("n1", 0): "50x25 4x70"}, True),
    ("GpuIdle", {GPU % ("n1", 0): "5x100"}, False),
    ("GpuIdle", {GPU % ("n1", 0): "4x100", **{GPU % (f"n{i}", 0): "90x100" for i in range(2, 9)}}, True),
    ("GpuIdle", {GPU % ("n1", 0): "4x100", GPU % ("n1", 1): "4x100", GPU % ("n2", 0): "5x100"}, True),
    ("GpuIdle", {GPU % ("n1", 0): "4x100", GPU % ("n1", 1): "90x100"}, False),  # such a node cannot be given back
    ("GpuIdle", {}, False),  # a cluster of CPUs
    ("NodesDoNotCome", {PENDING % "gpu": "0x59 1x41", PENDING % "cpu": "0x100"}, True),
    ("NodesDoNotCome", {PENDING % "gpu": "0x61 1x39"}, False),  # for less than half an hour
    ("NodesDoNotCome", {PENDING % "gpu": "1x75 0x1 1x24"}, False),  # they came, and others are waited for
    ("NodesDoNotCome", {PENDING % "gpu": "1x40 0x60"}, False),
    ("NodesDoNotCome", {PENDING % "gpu": "0x100"}, False),
    ("NodesDoNotCome", {}, False),  # a head without autoscaler
]
"""Alert, what is measured, and whether it fires."""


@pytest.mark.parametrize(("alert", "series", "fires"), CASES)
def test_alerts_fire_when_they_should_and_not_before(alert: str, series: dict[str, str], fires: bool, tmp_path: Path):
    """After ninety minutes of these values, one a minute, by Prometheus' own tool."""
    tool = shutil.which("promtool")
    if tool is None:
        pytest.skip("promtool is not installed: apt-get install prometheus")
    (rule,) = (rule for rule in RULES if rule["alert"] == alert)
    named = {"instance": "n1", "NodeType": "gpu"}
    labels = {name: value for name, value in named.items() if f"$labels.{name}" in rule["annotations"]["summary"]}
    values = [
        {"series": name if "{" in name else f'{name}{{instance="n1"}}', "values": numbers}
        for name, numbers in series.items()
    ]
    summary = rule["annotations"]["summary"]
    for name, value in labels.items():
        summary = summary.replace(f"{{{{ $labels.{name} }}}}", value)
    expected = {"exp_labels": rule["labels"] | labels, "exp_annotations": {"summary": summary}}
    asked = {"alertname": alert, "eval_time": "90m", "exp_alerts": [expected] if fires else []}
    test = {"interval": "1m", "input_series": values, "alert_rule_test": [asked]}
    file = tmp_path / "test.yml"
    file.write_text(yaml.safe_dump({"rule_files": [str(MONITORING / "rules.yml")], "tests": [test]}))
    done = subprocess.run([tool, "test", "rules", str(file)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_alert_is_seen_to_fire():
    assert {rule["alert"] for rule in RULES} == {alert for alert, _, fires in CASES if fires}


def test_panels_are_told_apart_and_do_not_overlap():
    ids = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(ids) == len(set(ids))
    taken: set[tuple[int, int]] = set()
    for panel in DASHBOARD["panels"]:
        at = panel["gridPos"]
        cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert not cells & taken and at["x"] + at["w"] <= 24
        taken |= cells


def test_dashboard_asks_the_data_source_that_is_provisioned():
    (source,) = yaml.safe_load((MONITORING / "grafana/provisioning/datasources/prometheus.yaml").read_text())[
        "datasources"
    ]
    assert {target["datasource"]["uid"] for panel in PANELS for target in panel["targets"]} == {source["uid"]}


def test_dashboard_has_panels_of_training_and_of_serving():
    read = {name for panel in PANELS for target in panel["targets"] for name in metrics_of(target["expr"])}
    assert any(name.startswith("ray_train_") for name in read)
    assert any(name.startswith("ray_data_") for name in read)
    assert any(name.startswith("ray_serve_") for name in read)


def test_grafana_looks_for_dashboards_where_they_are_mounted():
    volumes = yaml.safe_load((MONITORING / "compose.yaml").read_text())["services"]["grafana"]["volumes"]
    mounts = dict(volume.split(":")[:2][::-1] for volume in volumes)
    (provider,) = yaml.safe_load((MONITORING / "grafana/provisioning/dashboards/yan.yaml").read_text())["providers"]
    assert (MONITORING / mounts[provider["options"]["path"]] / "yan.json").is_file()
    assert (MONITORING / mounts["/etc/grafana/provisioning"] / "datasources").is_dir()


def test_prometheus_reads_rules_that_are_there():
    for name in ("prometheus.yml", "prometheus_kubernetes.yml"):
        config = yaml.safe_load((MONITORING / name).read_text())
        assert all((MONITORING / file).is_file() for file in config["rule_files"])

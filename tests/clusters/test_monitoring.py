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


@pytest.mark.parametrize(
    ("replicas", "fires"),
    [
        ({"a": "1x30", "b": "1x30"}, False),
        ({"a": "1x10 0x20", "b": "1x30"}, False),
        ({"a": "1x10 0x20", "b": "1x10 0x20"}, True),
        ({"a": "1x10", "b": "1x10"}, True),  # gone with their nodes: there is nothing left to be 0
        ({}, False),  # nothing was served here
    ],
)
def test_alert_when_no_replica_is_healthy(replicas: dict[str, str], fires: bool, tmp_path: Path):
    tool = shutil.which("promtool")
    if tool is None:
        pytest.skip("promtool is not installed: apt-get install prometheus")
    metric = "ray_serve_deployment_replica_healthy"
    series = [
        {"series": f'{metric}{{application="yan", replica="{name}"}}', "values": values}
        for name, values in replicas.items()
    ]
    expected = {"exp_labels": {"severity": "page"}, "exp_annotations": {"summary": "No replica is healthy"}}
    asked = {"alertname": "NoHealthyReplica", "eval_time": "25m", "exp_alerts": [expected] if fires else []}
    test = {"interval": "1m", "input_series": series, "alert_rule_test": [asked]}
    file = tmp_path / "test.yml"
    file.write_text(yaml.safe_dump({"rule_files": [str(MONITORING / "rules.yml")], "tests": [test]}))
    done = subprocess.run([tool, "test", "rules", str(file)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr


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

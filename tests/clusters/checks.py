"""A checker for each kind of file in clusters/, by the schema of the program that reads it; each gives its errors."""

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import lru_cache
from importlib import resources
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import promql_parser
import pytest
import yaml

ROOT = Path(__file__).parents[2]
CLUSTERS = ROOT / "clusters"
KUBERNETES = "1.34"
"""The version whose schemas the core kinds are held against."""


def documents(path: Path) -> list[dict[str, Any]]:
    """The documents of a YAML file."""
    return [document for document in yaml.safe_load_all(path.read_text()) if document is not None]


def written(document: Any, suffix: str = ".yaml") -> Path:
    """A changed document as a file, for tests of the checkers."""
    with tempfile.NamedTemporaryFile("w", suffix=suffix, delete=False) as file:
        file.write(json.dumps(document))
    return Path(file.name)


# --- ray up -----------------------------------------------------------------------------------------------------------


def launcher(path: Path) -> list[str]:
    """Ray's cluster schema and its own preparation; node_config by the cloud's description of its API."""
    from ray.autoscaler._private.util import prepare_config, validate_config

    try:
        config = prepare_config(yaml.safe_load(path.read_text()))
        validate_config(config)
    except (jsonschema.ValidationError, ValueError, RuntimeError) as error:
        return [str(error).splitlines()[0]]
    check = {"aws": _ec2, "gcp": _compute_engine, "local": lambda _: []}[config["provider"]["type"]]
    return [
        f"{name}: {error}"
        for name, node in config["available_node_types"].items()
        for error in check(node["node_config"])
    ]


def _ec2(node: dict[str, Any]) -> list[str]:
    """What botocore says of the arguments of RunInstances; it asks no server."""
    import botocore.session
    from botocore.validate import ParamValidator

    shape = botocore.session.Session().get_service_model("ec2").operation_model("RunInstances").input_shape
    arguments = {**node, "MinCount": 1, "MaxCount": 1}
    # Ray's own name for the one or more subnets that it chooses among.
    arguments["SubnetId"] = arguments.pop("SubnetIds", [""])[0]
    report = ParamValidator().validate(arguments, shape)
    return [report.generate_report()] if report.has_errors() else []


def _compute_engine(node: dict[str, Any]) -> list[str]:
    """Google's discovery document of Compute Engine, as its client ships it; unknown fields are refused."""
    import googleapiclient

    file = Path(googleapiclient.__file__).parent / "discovery_cache/documents/compute.v1.json"
    schemas = json.loads(file.read_text())["schemas"]
    return list(_discovery_errors(node, schemas["Instance"], schemas, "node_config"))


def _discovery_errors(value: Any, schema: dict[str, Any], schemas: dict[str, Any], where: str) -> Iterator[str]:
    schema = schemas[schema["$ref"]] if "$ref" in schema else schema
    types = {"object": dict, "array": list, "string": str, "boolean": bool, "integer": int, "number": (int, float)}
    # 64-bit numbers are strings in Google's JSON, and either is taken.
    number = schema.get("format") in ("int64", "uint64") and isinstance(value, int)
    if not number and not isinstance(value, types[schema["type"]]):
        yield f"{where} must be {schema['type']}, got {value!r}"
    elif "enum" in schema and value not in schema["enum"]:
        yield f"{where} must be one of {schema['enum']}, got {value!r}"
    elif isinstance(value, list):
        for i, item in enumerate(value):
            yield from _discovery_errors(item, schema["items"], schemas, f"{where}[{i}]")
    elif isinstance(value, dict) and "properties" in schema:
        for name, item in value.items():
            if name not in schema["properties"]:
                yield f"{where} has no field {name!r}"
            else:
                yield from _discovery_errors(item, schema["properties"][name], schemas, f"{where}.{name}")


# --- Kubernetes -------------------------------------------------------------------------------------------------------


def kubernetes(path: Path) -> list[str]:
    """KubeRay's kinds by its CRDs, all others by Kubernetes' own schemas."""
    return [f"{d['kind']}: {error}" for d in documents(path) for error in kubernetes_errors(d)]


def kubernetes_errors(document: dict[str, Any]) -> list[str]:
    """Errors of one object."""
    if document["apiVersion"].startswith("ray.io/"):
        return _kuberay_errors(document)
    try:
        kubernetes_validate.validate(document, KUBERNETES, strict=True)
    except kubernetes_validate.ValidationError as error:
        return [f"{'.'.join(map(str, error.path))}: {error.message}"]
    return []


def _kuberay_errors(document: dict[str, Any]) -> list[str]:
    folder = Path(os.environ.get("KUBERAY_SCHEMAS") or ROOT.parent / "shared" / "schemas" / "kuberay")
    if not folder.is_dir():
        pytest.skip("KubeRay's CRDs are not here: set KUBERAY_SCHEMAS to a folder with its ray.io_*.yaml")
    definition = yaml.load((folder / f"ray.io_{document['kind'].lower()}s.yaml").read_text(), yaml.CSafeLoader)
    version = document["apiVersion"].removeprefix("ray.io/")
    (schema,) = (v["schema"]["openAPIV3Schema"] for v in definition["spec"]["versions"] if v["name"] == version)
    _close(schema)
    # What the API server adds by itself.
    schema["properties"]["metadata"] = {"type": "object"}
    errors = jsonschema.Draft7Validator(schema).iter_errors(document)
    return [f"{'.'.join(map(str, error.absolute_path))}: {error.message}" for error in errors]


def _close(schema: Any) -> None:
    """Refuse fields that a CRD does not name, which the API server would drop; understand its int-or-string."""
    if isinstance(schema, list):
        for item in schema:
            _close(item)
    if not isinstance(schema, dict):
        return
    if schema.get("x-kubernetes-int-or-string"):
        schema.pop("anyOf", None)
        schema["type"] = ["integer", "string"]
    if "properties" in schema and not schema.get("x-kubernetes-preserve-unknown-fields"):
        schema.setdefault("additionalProperties", False)
    for value in schema.values():
        _close(value)


# --- Ray Serve --------------------------------------------------------------------------------------------------------


def serve_config(path: Path) -> list[str]:
    """What `serve deploy` checks; and fields that it would drop without a word."""
    return serve_errors(yaml.safe_load(path.read_text()))


def serve_errors(config: dict[str, Any]) -> list[str]:
    """Errors of a Serve config."""
    from pydantic import ValidationError
    from ray.serve.config import AutoscalingConfig
    from ray.serve.schema import ServeDeploySchema

    from serve.schemas import AppArgs

    dropped: list[str] = []
    try:
        parsed = ServeDeploySchema.model_validate(config)
        for application in parsed.applications:
            AppArgs.model_validate(application.args)
            for deployment in application.deployments:
                if isinstance(scaling := deployment.autoscaling_config, dict):  # Serve reads it when it deploys
                    dropped += _dropped(scaling, AutoscalingConfig.model_validate(scaling), "autoscaling_config")
    except ValidationError as error:
        return [f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()]
    return [*dropped, *_dropped(config, parsed, "config")]


def _dropped(given: Any, parsed: Any, where: str) -> Iterator[str]:
    """Fields of the file that the parsed models do not have."""
    from pydantic import BaseModel

    if isinstance(given, list):
        for i, (item, model) in enumerate(zip(given, parsed, strict=True)):
            yield from _dropped(item, model, f"{where}[{i}]")
    elif isinstance(given, dict) and isinstance(parsed, BaseModel):
        for name, value in given.items():
            if name not in type(parsed).model_fields:
                yield f"{where} has no field {name!r}"
            else:
                yield from _dropped(value, getattr(parsed, name), f"{where}.{name}")


# --- containers -------------------------------------------------------------------------------------------------------


def dockerfile(path: Path) -> list[str]:
    """hadolint, all of its rules."""
    tool = Path(sys.executable).with_name("hadolint")
    done = subprocess.run(
        [str(tool), "--no-color", "-"], input=path.read_text(), capture_output=True, text=True, timeout=60
    )
    return done.stdout.splitlines() + done.stderr.splitlines()


def compose(path: Path) -> list[str]:
    """The Compose Specification's JSON schema, as check-jsonschema ships it."""
    file = resources.files("check_jsonschema") / "builtin_schemas" / "vendor" / "compose-spec.json"
    errors = jsonschema.Draft202012Validator(json.loads(file.read_text())).iter_errors(yaml.safe_load(path.read_text()))
    return [f"{'.'.join(map(str, error.absolute_path))}: {error.message}" for error in errors]


def pgloader(path: Path) -> list[str]:
    """Its rewriting of tables and columns against MLflow's; test_migration.py runs the whole."""
    from mlflow.store.db.base_sql_model import Base
    from mlflow.store.model_registry.dbmodels import models as registry
    from mlflow.store.tracking.dbmodels import models as tracking

    assert registry and tracking  # their import fills Base
    tables = {name: set(table.columns.keys()) for name, table in Base.metadata.tables.items()}
    updates = re.findall(r"update (\w+) set (\w+) = replace\((\w+)", path.read_text())
    if len(updates) != path.read_text().count("$$") // 2:
        return ["a statement is not of the form `update TABLE set COLUMN = replace(COLUMN, ...`"]
    wrong = [
        (table, column) for table, *columns in updates for column in columns if column not in tables.get(table, ())
    ]
    return [f"MLflow has no column {table}.{column}" for table, column in wrong]


# --- monitoring -------------------------------------------------------------------------------------------------------


def prometheus(path: Path) -> list[str]:
    """Each alert's query; and promtool, which is Prometheus' own parser."""
    groups = yaml.safe_load(path.read_text()).get("groups")
    for error in (error for group in groups or [] for rule in group["rules"] for error in query(rule["expr"])):
        return [error]
    tool = shutil.which("promtool")
    if tool is None:
        pytest.skip("promtool is not installed: apt-get install prometheus")
    kind = "config" if groups is None else "rules"
    done = subprocess.run([tool, "check", kind, str(path)], capture_output=True, text=True, timeout=60)
    return [] if done.returncode == 0 else [done.stdout + done.stderr]


def query(expression: str) -> list[str]:
    """A PromQL parser; and metrics that Ray does not have."""
    try:
        promql_parser.parse(expression)
    except ValueError as error:
        return [f"{expression}: {error}"]
    return [f"{expression}: Ray has no metric {name}" for name in metrics_of(expression) if name not in _ray_metrics()]


def metrics_of(expression: str) -> set[str]:
    """Names of the metrics that an expression reads; not those of labels."""
    without_labels = re.sub(r"\b(?:by|on|without)\s*\([^)]*\)|\{[^}]*\}", "", expression)
    return set(re.findall(r"\b(?:ray|autoscaler)_\w+", without_labels))


@lru_cache(maxsize=1)
def _ray_metrics() -> set[str]:
    """Names under which the installed Ray exports metrics: those that its sources name, and its own dashboards read."""
    import ray

    home = Path(ray.__file__).parent
    own = {
        name
        for file in (home / "dashboard/modules/metrics/dashboards").glob("*.py")
        for name in metrics_of(_text(file))
    }
    folders = ("serve", "train/v2", "data/_internal", "dashboard/modules/reporter")
    for file in (file for folder in folders for file in (home / folder).rglob("*.py")):
        for name in re.findall(r'"((?:serve|train|data|node)_\w+)"', _text(file)):
            own.update(f"ray_{name}{end}" for end in ("", "_total", "_bucket", "_sum", "_count"))
    for name in re.findall(r'"(yan_\w+)"', _text(ROOT / "serve/metrics.py")):  # see serve/exporter.py
        own.update(f"ray_{name}{end}" for end in ("", "_sum_total", "_count_total"))
    return own


def _text(file: Path) -> str:
    return file.read_text(encoding="utf-8")


def dashboard(path: Path) -> list[str]:
    """Grafana's own SDK reads it and writes the same again; each query is sound and reads Ray's metrics."""
    from grafana_foundation_sdk.cog import encoder, plugins
    from grafana_foundation_sdk.models.dashboard import Dashboard

    plugins.register_default_plugins()
    given = json.loads(path.read_text())
    kept = json.loads(encoder.JSONEncoder().encode(Dashboard.from_json(given)))
    queries = [target["expr"] for panel in given["panels"] for target in panel.get("targets", [])]
    return [*_lost(given, kept, "dashboard"), *(error for expression in queries for error in query(expression))]


def _lost(given: Any, kept: Any, where: str) -> Iterator[str]:
    if isinstance(given, dict) and isinstance(kept, dict):
        for name, value in given.items():
            if name not in kept:
                yield f"{where} has no field {name!r}"
            else:
                yield from _lost(value, kept[name], f"{where}.{name}")
    elif isinstance(given, list) and isinstance(kept, list) and len(given) == len(kept):
        for i, (value, same) in enumerate(zip(given, kept, strict=True)):
            yield from _lost(value, same, f"{where}[{i}]")
    elif given != kept:
        yield f"{where} is read as {kept!r}, not {given!r}"


def provisioning(path: Path) -> list[str]:
    """Grafana's provisioning files have no published schema: the fields of its documentation, by name."""
    # https://grafana.com/docs/grafana/latest/administration/provisioning
    known = {
        "datasources": {"name", "type", "access", "uid", "url", "isDefault", "editable", "jsonData", "secureJsonData"},
        "providers": {"name", "orgId", "folder", "type", "disableDeletion", "allowUiUpdates", "options"},
    }
    config = yaml.safe_load(path.read_text())
    errors = [f"unknown {name}" for name in config if name not in ("apiVersion", *known)]
    for kind, fields in known.items():
        for entry in config.get(kind, []):
            errors += [f"{kind}: unknown {name}" for name in entry if name not in fields]
    return errors


CHECKS: list[tuple[str, Callable[[Path], list[str]]]] = [
    ("launcher/*.yaml", launcher),
    ("kubernetes/*.yaml", kubernetes),
    ("serve/*.yaml", serve_config),
    ("docker/Dockerfile", dockerfile),
    ("mlflow/kubernetes.yaml", kubernetes),
    ("*/compose.yaml", compose),
    ("mlflow/*.load", pgloader),
    ("monitoring/prometheus*.yml", prometheus),
    ("monitoring/rules.yml", prometheus),
    ("monitoring/grafana/dashboards/*.json", dashboard),
    ("monitoring/grafana/provisioning/*/*.yaml", provisioning),
]
"""Files below clusters/, and how they are checked."""

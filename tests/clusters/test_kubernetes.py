"""Manifests for Kubernetes."""

import copy
import ipaddress
import re
import shlex
import tomllib
from collections.abc import Iterator
from typing import Any

import pytest
import yaml
from ray.autoscaler._private.constants import AUTOSCALER_METRIC_PORT

from pipelines.arguments import parse_config
from tests.clusters.checks import CLUSTERS, ROOT, documents, kubernetes_errors

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
MANIFESTS = [*sorted((CLUSTERS / "kubernetes").glob("*.yaml")), CLUSTERS / "mlflow/kubernetes.yaml"]
OBJECTS = [(f"{d['kind']}/{d['metadata']['name']}", d) for path in MANIFESTS for d in documents(path)]
RAY = {"RayCluster": "ray_cluster", "RayJob": "ray_job", "RayService": "ray_service"}


def find(kind: str) -> list[dict[str, Any]]:
    return [d for _, d in OBJECTS if d["kind"] == kind]


def cluster_of(document: dict[str, Any]) -> dict[str, Any]:
    spec = document["spec"]
    return spec.get("rayClusterSpec") or spec.get("rayClusterConfig") or spec


CLUSTER_SPECS = [(kind, cluster_of(find(kind)[0])) for kind in RAY]


def groups(spec: dict[str, Any]) -> list[dict[str, Any]]:
    return [spec["headGroupSpec"], *spec["workerGroupSpecs"]]


def pods() -> Iterator[tuple[str, dict[str, Any]]]:
    """Every pod template, with a name for messages."""

    def walk(value: Any, where: str) -> Iterator[tuple[str, dict[str, Any]]]:
        if isinstance(value, dict):
            if "containers" in value.get("spec", {}):
                yield where, value
            for name, item in value.items():
                yield from walk(item, f"{where}.{name}")
        elif isinstance(value, list):
            for i, item in enumerate(value):
                yield from walk(item, f"{where}[{i}]")

    for name, document in OBJECTS:
        yield from walk(document, name)


PODS = list(pods())
CONTAINERS = [
    (f"{where}.{container['name']}", container)
    for where, pod in PODS
    for container in [*pod["spec"].get("initContainers", []), *pod["spec"]["containers"]]
]


@pytest.mark.parametrize(
    ("kind", "keys", "value", "message"),
    [
        ("RayCluster", ["spec", "enableInTreeAutoscalin"], True, "enableInTreeAutoscalin"),
        ("RayCluster", ["spec", "autoscalerOptions", "version"], "v3", "'v3' is not one of"),
        ("RayCluster", ["spec", "headGroupSpec", "template", "spec", "containers"], "none", "is not of type 'array'"),
        ("RayJob", ["spec", "entrypoints"], "python", "entrypoints"),
        ("RayService", ["spec", "serveConfigV2"], {"applications": []}, "is not of type 'string'"),
        ("NetworkPolicy", ["spec", "podSelectors"], {}, "podSelectors"),
        ("PodDisruptionBudget", ["spec", "minAvailable"], [], "minAvailable"),
        ("Deployment", ["spec", "replicas"], "two", "replicas"),
        ("ResourceQuota", ["specs"], {}, "specs"),
    ],
)
def test_checkers_find_wrong_fields(kind: str, keys: list[str], value: Any, message: str):
    document = copy.deepcopy(find(kind)[0])
    place: Any = document
    for key in keys[:-1]:
        place = place[key]
    place[keys[-1]] = value
    assert any(message in error for error in kubernetes_errors(document))


@pytest.mark.parametrize(("name", "container"), CONTAINERS, ids=[name for name, _ in CONTAINERS])
def test_container_cannot_be_root_nor_write_to_its_image_and_has_limits(name: str, container: dict[str, Any]):
    security = container["securityContext"]
    assert security["runAsNonRoot"] and security["runAsUser"] > 0
    assert security["readOnlyRootFilesystem"] and not security["allowPrivilegeEscalation"]
    assert security["capabilities"] == {"drop": ["ALL"]}
    for resource in ("cpu", "memory", "ephemeral-storage"):
        assert resource in container["resources"]["limits"] and resource in container["resources"]["requests"]


@pytest.mark.parametrize(("name", "pod"), PODS, ids=[name for name, _ in PODS])
def test_pod_has_a_profile_and_bounded_scratch_space(name: str, pod: dict[str, Any]):
    assert pod["spec"]["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    scratch = [volume["emptyDir"] for volume in pod["spec"]["volumes"] if "emptyDir" in volume]
    assert all("sizeLimit" in volume for volume in scratch)


@pytest.mark.parametrize(("kind", "spec"), CLUSTER_SPECS, ids=RAY)
def test_every_ray_pod_has_its_own_probes(kind: str, spec: dict[str, Any]):
    # KubeRay's own would call wget, which the image does not have.
    for group in groups(spec):
        (container,) = group["template"]["spec"]["containers"]
        assert {"startupProbe", "livenessProbe", "readinessProbe"} <= set(container)


@pytest.mark.parametrize(("kind", "spec"), CLUSTER_SPECS, ids=RAY)
def test_cluster_has_the_pinned_ray_and_images_of_this_version(kind: str, spec: dict[str, Any]):
    (pinned,) = re.findall(r"ray\[data,train\]==([\d.]+)", str(PROJECT["optional-dependencies"]["pipelines"]))
    assert spec["rayVersion"] == pinned
    for group in groups(spec):
        (container,) = group["template"]["spec"]["containers"]
        gpu = "nvidia.com/gpu" in container["resources"]["limits"]
        assert container["image"].endswith(f":{PROJECT['version']}-{'cuda' if gpu else 'cpu'}")


@pytest.mark.parametrize(("kind", "spec"), CLUSTER_SPECS, ids=RAY)
def test_cluster_scales_by_autoscaler_v2_between_limits_and_wants_a_token(kind: str, spec: dict[str, Any]):
    assert spec["enableInTreeAutoscaling"] and spec["autoscalerOptions"]["version"] == "v2"
    assert spec["authOptions"] == {"mode": "token", "secretName": "yan-ray-token"}
    assert all(0 <= g["minReplicas"] <= g["replicas"] <= g["maxReplicas"] <= 8 for g in spec["workerGroupSpecs"])
    assert all(group["template"]["spec"]["restartPolicy"] == "Never" for group in groups(spec))
    head = spec["headGroupSpec"]
    assert head["rayStartParams"]["num-cpus"] == "0"
    assert "nvidia.com/gpu" not in head["template"]["spec"]["containers"][0]["resources"]["limits"]


@pytest.mark.parametrize(("kind", "spec"), CLUSTER_SPECS, ids=RAY)
def test_object_store_fits_into_shared_memory_and_that_into_the_limit(kind: str, spec: dict[str, Any]):
    for group in groups(spec):
        pod = group["template"]["spec"]
        (shm,) = (v["emptyDir"] for v in pod["volumes"] if v.get("emptyDir", {}).get("medium") == "Memory")
        limit = pod["containers"][0]["resources"]["limits"]["memory"]
        gib = [int(size.removesuffix("Gi")) for size in (shm["sizeLimit"], limit)]
        assert int(group["rayStartParams"]["object-store-memory"]) < gib[0] * 2**30 and gib[0] * 2 < gib[1]
        assert group["rayStartParams"]["object-spilling-directory"] == "/spill"
        assert "/spill" in [mount["mountPath"] for mount in pod["containers"][0]["volumeMounts"]]


@pytest.mark.parametrize(("kind", "spec"), CLUSTER_SPECS, ids=RAY)
def test_ray_start_knows_every_parameter(kind: str, spec: dict[str, Any]):
    from ray.scripts.scripts import start

    known = {flag.removeprefix("--") for option in start.params for flag in option.opts}
    assert {name for group in groups(spec) for name in group["rayStartParams"]} <= known


def test_secrets_are_named_not_held():
    assert find("Secret") == []
    for name, container in CONTAINERS:
        for variable in container.get("env", []):
            if re.search("(PASSWORD|TOKEN|SECRET|_KEY)(?!.*_FILE$)", variable["name"]):  # a file's name is none
                assert "secretKeyRef" in variable["valueFrom"], f"{name}: {variable['name']}"


def matches(selector: dict[str, Any], labels: dict[str, str]) -> bool:
    wanted = selector.get("matchLabels", {}).items() <= labels.items()
    return wanted and all(labels.get(e["key"]) in e["values"] for e in selector.get("matchExpressions", []))


LABELS = [(where, pod["metadata"].get("labels", {})) for where, pod in PODS]


@pytest.mark.parametrize("budget", find("PodDisruptionBudget"), ids=lambda b: b["metadata"]["name"])
def test_budget_counts_pods_that_are_there(budget: dict[str, Any]):
    found = [where for where, labels in LABELS if matches(budget["spec"]["selector"], labels)]
    assert found
    if any(where.startswith("Ray") for where in found):  # no scale subresource: only a number that stays is allowed
        assert isinstance(budget["spec"]["minAvailable"], int)


def test_nothing_gets_in_or_out_but_what_a_policy_names():
    (deny,) = (p for p in find("NetworkPolicy") if p["metadata"]["name"] == "deny-all")
    assert deny["spec"] == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}
    for where, labels in LABELS:
        allowed = [p for p in find("NetworkPolicy") if p is not deny and matches(p["spec"]["podSelector"], labels)]
        assert allowed, f"no policy lets {where} talk to anybody"


def test_network_policies_never_reach_the_metadata_service():
    rules = [rule for policy in find("NetworkPolicy") for rule in policy["spec"].get("egress", [])]
    blocks = [(to["ipBlock"], rule["ports"]) for rule in rules for to in rule["to"] if "ipBlock" in to]
    assert len(blocks) == 4
    metadata = ipaddress.ip_address("169.254.169.254")
    for block, ports in blocks:
        if metadata in ipaddress.ip_network(block["cidr"]):
            assert any(metadata in ipaddress.ip_network(part) for part in block["except"])
        else:  # a cache of names on the node itself
            assert {port["port"] for port in ports} == {53}


def test_services_find_pods():
    for service in find("Service"):
        selector = {"matchLabels": service["spec"]["selector"]}
        assert [where for where, labels in LABELS if matches(selector, labels)], service["metadata"]["name"]


def test_job_runs_a_command_that_the_cli_takes():
    (job,) = find("RayJob")
    words = shlex.split(job["spec"]["entrypoint"])
    assert words[:4] == ["python", "-m", "pipelines", "run"]  # `train` would leave no model for the service
    arguments = [word.replace("/opt/yan", str(ROOT)) for word in words[4:]]
    scaling = parse_config("run", arguments).scaling
    gpu, cpu = cluster_of(job)["workerGroupSpecs"]
    assert scaling.use_gpu and scaling.max_workers <= gpu["maxReplicas"]
    assert scaling.cpus_per_worker < int(gpu["template"]["spec"]["containers"][0]["resources"]["limits"]["cpu"])
    assert cpu["maxReplicas"] > 0, "something has to prepare the data"


def test_service_serves_what_serve_deploy_would():
    (service,) = find("RayService")
    assert yaml.safe_load(service["spec"]["serveConfigV2"]) == documents(CLUSTERS / "serve/gpu.yaml")[0]
    (gpu,) = cluster_of(service)["workerGroupSpecs"]
    scaling = yaml.safe_load(service["spec"]["serveConfigV2"])["applications"][0]["deployments"][0]
    assert scaling["autoscaling_config"]["max_replicas"] == gpu["maxReplicas"]


def test_quota_has_room_for_the_largest_cluster_and_an_upgrade_of_the_service():
    hard = find("ResourceQuota")[0]["spec"]["hard"]
    gpus = {
        kind: sum(g["maxReplicas"] for g in spec["workerGroupSpecs"] if g["groupName"] == "gpu")
        for kind, spec in CLUSTER_SPECS
    }
    assert 2 * gpus["RayService"] <= int(hard["requests.nvidia.com/gpu"])
    assert gpus["RayCluster"] <= int(hard["requests.nvidia.com/gpu"])


def test_pods_that_ask_the_api_server_nothing_have_no_account_token():
    (account,) = find("ServiceAccount")
    assert account["automountServiceAccountToken"] is False
    for where, pod in PODS:
        if "headGroupSpec" not in where:  # its autoscaler does
            assert pod["spec"]["serviceAccountName"] == account["metadata"]["name"], where
            assert pod["spec"]["automountServiceAccountToken"] is False, where


def test_the_service_knows_who_may_ask():
    """It listens on every address, and a server that does so without keys refuses to start."""
    (service,) = find("RayService")
    config = yaml.safe_load(service["spec"]["serveConfigV2"])
    assert config["http_options"]["host"] == "0.0.0.0"
    ours = [container for where, container in CONTAINERS if "RayService" in where or "ray_service" in where]
    mounted = {"name": "api-keys", "mountPath": "/etc/yan", "readOnly": True}
    assert ours and all(mounted in container["volumeMounts"] for container in ours)
    for container in ours:
        assert {"name": "YAN_API_KEYS_FILE", "value": "/etc/yan/api_keys"} in container["env"]
    pods = [pod["spec"] for where, pod in PODS if "RayService" in where or "ray_service" in where]
    held = {"name": "api-keys", "secret": {"secretName": "yan-api-keys"}}
    assert pods and all(held in pod["volumes"] for pod in pods)


def test_only_a_pod_that_asks_for_a_gpu_may_go_to_nodes_that_have_one():
    """Pods without would fill the dearest nodes, and no GPU worker could start there."""
    with_gpu = 0
    for where, pod in PODS:
        asks = any("nvidia.com/gpu" in c["resources"]["requests"] for c in pod["spec"]["containers"])
        taints = [toleration.get("key") for toleration in pod["spec"].get("tolerations", [])]
        assert None not in taints, f"{where} tolerates every taint"
        assert ("nvidia.com/gpu" in taints) == asks, where
        with_gpu += asks
    assert with_gpu == len(RAY)


def test_no_two_ray_objects_have_one_name():
    """The Services of their heads are called by it, and lead to the one that was made last."""
    names = [document["metadata"]["name"] for kind in RAY for document in find(kind)]
    assert len(set(names)) == len(names) == 3


def test_kuberay_makes_a_service_for_requests():
    """It does so where the head has a port named `serve`, whoever answers there."""
    (service,) = find("RayService")
    for group in groups(cluster_of(service)):
        (container,) = group["template"]["spec"]["containers"]
        assert {"name": "serve", "containerPort": 8000} in container["ports"]


def test_prometheus_finds_and_reaches_each_port_that_has_figures():
    config = yaml.safe_load((CLUSTERS / "monitoring/prometheus_kubernetes.yml").read_text())
    found = [source for scrape in config["scrape_configs"] for source in scrape["dns_sd_configs"]]
    asked = {name: source["port"] for source in found for name in source["names"]}
    services = {f"{d['metadata']['name']}.{d['metadata']['namespace']}.svc.cluster.local": d for d in find("Service")}
    (policy,) = (d for d in find("NetworkPolicy") if d["metadata"]["name"] == "ray")
    monitoring = {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "monitoring"}}}
    (let_in,) = (rule["ports"] for rule in policy["spec"]["ingress"] if monitoring in rule["from"])
    assert set(asked.values()) == {port["port"] for port in let_in} == {8080, AUTOSCALER_METRIC_PORT}
    heads = [cluster["headGroupSpec"]["template"]["metadata"]["labels"].items() for _, cluster in CLUSTER_SPECS]
    for name, port in asked.items():
        spec = services[name]["spec"]
        assert [p["port"] for p in spec["ports"]] == [port]
        assert all(spec["selector"].items() <= labels for labels in heads), name

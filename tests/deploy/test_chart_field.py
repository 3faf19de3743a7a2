# SPDX-License-Identifier: Apache-2.0
"""What the chart makes for other projects of Kubernetes: endpoint pickers, autoscalers, monitors, priorities, spread.

All is off by default. That each object is good by its definition is tested for all values files in test_chart_render.
"""

from __future__ import annotations

import pytest

from deploy.dashboards.series import SERIES
from tests.deploy.charts import CHART, component_of, of_kind, only, pod_templates, refusal, render, selects
from tests.deploy.promql import problems
from tokenpool.config import load_pool_file
from tokenpool.serve.access.auth import is_picker_path

pytestmark = pytest.mark.deploy

SCALED = CHART / "ci" / "scaled-values.yaml"
OFF = ("InferencePool", "ScaledObject", "HorizontalPodAutoscaler", "PriorityClass", "PodMonitor", "HTTPRoute")


@pytest.fixture
def scaled(rendered):
    return rendered(SCALED)


@pytest.mark.parametrize("mode", ["standalone", "raycluster"])
def test_all_of_it_is_off_by_default(helm, mode):
    manifests = render("--set", f"mode={mode}")
    assert not [m for kind in OFF for m in of_kind(manifests, kind)]
    for _, template in pod_templates(manifests):
        assert not {"priorityClassName", "topologySpreadConstraints"} & template["spec"].keys()
    for deployment in of_kind(manifests, "Deployment"):
        assert deployment["spec"]["replicas"] == 1 and deployment["spec"]["strategy"] == {"type": "Recreate"}


def test_each_model_is_led_to_the_pool_of_its_picker(scaled):
    """Requests whose header names the model go to its pool, all others to that of all models."""
    pools = {m["metadata"]["annotations"]["tokenpool/picker-metrics-path"]: m for m in of_kind(scaled, "InferencePool")}
    assert pools.keys() == {"/metrics/picker", "/metrics/picker/Org/Code.7B"}
    rules = only(scaled, "HTTPRoute")["spec"]["rules"]
    led = {
        match["headers"][0]["value"] if "headers" in match else "": rule["backendRefs"][0]["name"]
        for rule in rules
        for match in rule["matches"]
    }
    assert led == {
        "Org/Code.7B": pools["/metrics/picker/Org/Code.7B"]["metadata"]["name"],
        "": pools["/metrics/picker"]["metadata"]["name"],
    }
    refs = [pools[path]["spec"]["endpointPickerRef"] for path in sorted(pools)]
    assert [(ref["name"], ref["port"]["number"], ref["failureMode"]) for ref in refs] == [
        ("any-picker", 9002, "FailOpen"),
        ("code-picker", 9100, "FailClose"),
    ]


def test_a_picker_may_read_what_it_is_told_to(scaled, tmp_path, monkeypatch):
    """The paths are those that the server opens, and the pool file opens them."""
    (config_map,) = (m for m in of_kind(scaled, "ConfigMap") if "pool.yaml" in m["data"])
    for key in ("API", "VIEW", "ADMIN"):
        monkeypatch.setenv(f"TOKENPOOL_{key}_KEY_0", f"{key}-0123456789abcdef")
    (tmp_path / "pool.yaml").write_text(config_map["data"]["pool.yaml"])
    assert load_pool_file(tmp_path / "pool.yaml").open_picker_metrics
    for pool in of_kind(scaled, "InferencePool"):
        assert is_picker_path(pool["metadata"]["annotations"]["tokenpool/picker-metrics-path"])


def test_names_of_models_do_not_meet_as_names_of_objects(helm):
    """`a.b`, `a/b` and `A-B` are three models."""
    words = ["inferencePool.enabled=true", "inferencePool.picker.service=p"]
    for i, name in enumerate(("a.b", "a/b", "A-B", "x" * 200)):
        words += [f"inferencePool.models[{i}].name={name}", f"inferencePool.models[{i}].picker.service=p"]
    names = [m["metadata"]["name"] for m in of_kind(render("--set", ",".join(words)), "InferencePool")]
    assert len(set(names)) == 5 and max(map(len, names)) <= 100


@pytest.mark.parametrize("by", ["keda", "hpa"])
def test_the_number_of_pods_is_the_scalers(helm, by):
    """The Deployment names none, which Helm would set back at each upgrade, and its pods go one by one."""
    words = f"autoscaling.by={by},autoscaling.keda.prometheus=http://p:9090,autoscaling.maxReplicas=7"
    manifests = render("--set", words)
    deployment = only(manifests, "Deployment")
    assert "replicas" not in deployment["spec"]
    assert deployment["spec"]["strategy"] == {
        "type": "RollingUpdate",
        "rollingUpdate": {"maxSurge": 0, "maxUnavailable": 1},
    }
    scaler = only(manifests, "ScaledObject" if by == "keda" else "HorizontalPodAutoscaler")["spec"]
    assert scaler["scaleTargetRef"]["name"] == deployment["metadata"]["name"]
    assert 7 in (scaler.get("maxReplicaCount"), scaler.get("maxReplicas"))


def test_queries_name_what_is_exported(scaled):
    """Each can be read, and names series and labels that exist."""
    triggers = only(scaled, "ScaledObject")["spec"]["triggers"]
    queries = [trigger["metadata"]["query"] for trigger in triggers]
    assert len(queries) == 2
    for query in queries:
        assert problems(query, SERIES, ("namespace", "pod")) == []
        assert 'namespace="ns",pod=~"rel-tokenpool-.+"' in query
    assert [float(trigger["metadata"]["threshold"]) for trigger in triggers] == [8, pytest.approx(0.1)]


def test_a_wrong_query_would_be_found():
    assert problems("sum(tokenpool:pending{pod='a'})", SERIES, ("pod",))


def test_the_hpa_aims_at_the_same(helm):
    """Late tokens in thousandths, as Kubernetes writes a share."""
    metrics = only(render("--set-json", 'autoscaling={"by": "hpa", "attainment": 0.95}'), "HorizontalPodAutoscaler")
    targets = [metric["pods"]["target"]["averageValue"] for metric in metrics["spec"]["metrics"]]
    assert targets == ["8", "50m"]


def test_models_come_and_go_without_a_new_pod(helm):
    """Only what the server does not follow makes one; the memory is that of as many models as a value says."""

    def pod(*words: str) -> object:
        return only(render("--set", "memory.models=5", *words), "Deployment")["spec"]["template"]

    more = ("--set", "pool.models[0].name=chat,pool.models[0].model=x,pool.models[1].name=b,pool.models[1].model=y")
    assert pod() == pod(*more)
    assert pod() != pod("--set", "pool.frontends=2")
    assert pod() != pod("--set", "pool.load_timeout=5m")
    assert pod("--set", "memory.models=0") != pod(*more, "--set", "memory.models=0"), "by their number"


def test_pods_with_a_device_are_spread_among_their_like(rendered):
    """By a selector that matches them and no other pods of the release."""
    for path, component in ((SCALED, "server"), (CHART / "ci" / "ray-cpu-values.yaml", "host")):
        templates = [template for _, template in pod_templates(rendered(path))]
        (spread,) = (t for t in templates if "topologySpreadConstraints" in t["spec"])
        assert component_of(spread) == component
        for constraint in spread["spec"]["topologySpreadConstraints"]:
            labels = constraint["labelSelector"]["matchLabels"]
            assert [component_of(t) for t in templates if selects(labels, t["metadata"]["labels"])] == [component]


def test_pods_have_the_priority_class_that_is_made(scaled):
    made = only(scaled, "PriorityClass")
    assert (made["value"], made["preemptionPolicy"], made["globalDefault"]) == (5000, "Never", False)
    assert {t["spec"]["priorityClassName"] for _, t in pod_templates(scaled)} == {made["metadata"]["name"]}


def test_each_host_of_a_ray_cluster_can_be_scraped(rendered):
    """The monitor finds the pods with hosts and no others, at the port that Ray is told."""
    manifests = rendered(CHART / "ci" / "ray-cpu-values.yaml")
    (monitor,) = (m for m in of_kind(manifests, "PodMonitor") if m["metadata"]["name"].endswith("-hosts"))
    wanted = monitor["spec"]["selector"]["matchLabels"]
    found = [t for _, t in pod_templates(manifests) if selects(wanted, t["metadata"]["labels"])]
    assert [component_of(t) for t in found] == ["host"]
    (port,) = found[0]["spec"]["containers"][0]["ports"]
    hosts = next(g for g in only(manifests, "RayCluster")["spec"]["workerGroupSpecs"] if g["groupName"] == "hosts")
    assert hosts["rayStartParams"]["metrics-export-port"] == str(port["containerPort"])


@pytest.mark.parametrize(
    "values, says",
    [
        ("inferencePool.enabled=true", "inferencePool.picker has no service"),
        ("inferencePool.enabled=true,inferencePool.picker.service=p,mode=raycluster", "inferencePool.enabled needs"),
        ("inferencePool.models[0].name=a", "picker"),
        ("autoscaling.by=keda", "autoscaling.keda.prometheus"),
        ("autoscaling.by=hpa,mode=raycluster", "autoscaling.by needs mode standalone"),
        ("autoscaling.by=hpa,autoscaling.minReplicas=0", "minReplicas"),
        ("autoscaling.by=hpa,autoscaling.minReplicas=5", "more than autoscaling.maxReplicas"),
        ("autoscaling.by=hpa,autoscaling.attainment=1", "attainment"),
        ("replicas=0", "replicas"),
        ("monitoring.hostMonitor.enabled=true", "hostMonitor is for mode raycluster"),
        ("priorityClass.value=2000000000", "value"),
        ("topologySpread[0].maxSkew=1", "topologyKey"),
    ],
)  # fmt: skip
def test_helm_refuses(helm, values, says):
    """What cannot work is refused with the value's name."""
    assert says in refusal("--set", values)

# SPDX-License-Identifier: Apache-2.0
"""The chart's worker groups with engine hosts: fixed, of several kinds, and such that come and go.

Ray's own readers say what they make of a rendered RayCluster: what KubeRay's operator does with it is not run here.
"""

from __future__ import annotations

from typing import Any

import pytest
import yaml

from tests.deploy.charts import CHART, Manifest, component_of, of_kind, only, pool_file, refusal, render
from tokenpool.cluster_config import HostRange
from tokenpool.config import PoolConfig
from tokenpool.host_kinds import selectors

pytestmark = [pytest.mark.deploy, pytest.mark.usefixtures("helm")]

RANGE = "pool.cluster.hosts.min=0,pool.cluster.hosts.max=3"
TOKEN_FOLDER = "/var/run/secrets/kubernetes.io/serviceaccount"


def rendered_with(values: str) -> Manifest:
    """The RayCluster of these values."""
    return only(render("--set", f"mode=raycluster,{values}"), "RayCluster")["spec"]


def host_groups(cluster: Manifest) -> list[Manifest]:
    return [group for group in cluster["workerGroupSpecs"] if component_of(group["template"]) == "host"]


def cluster_section(manifests: list[Manifest]) -> dict[str, Any]:
    section: dict[str, Any] = yaml.safe_load(pool_file(manifests))["cluster"]
    return section


@pytest.fixture
def scaled(rendered) -> list[Manifest]:
    return rendered(CHART / "ci" / "ray-scaled-values.yaml")


def node_types(cluster: Manifest) -> dict[str, Any]:
    """What Ray's autoscaler reads out of a RayCluster, by the name of the group."""
    reader = pytest.importorskip("ray.autoscaler._private.kuberay.autoscaling_config")
    config = pytest.importorskip("ray.autoscaler.v2.instance_manager.config")
    read = reader._derive_autoscaling_config_from_ray_cr(cluster | {"metadata": {"name": "c", "namespace": "ns"}})
    found: dict[str, Any] = config.AutoscalingConfig(read, skip_content_hash=True).get_node_type_configs()
    return found


def test_rays_autoscaler_reads_the_groups_as_they_are_meant(scaled):
    """Bounds, CPUs and labels of each group; what answers HTTP is never taken away."""
    found = node_types(only(scaled, "RayCluster"))
    amx, spot, frontend = found["amx"], found["spot"], found["frontend"]
    assert (amx.min_worker_nodes, amx.max_worker_nodes, amx.labels) == (0, 2, {"cpu": "amx"})
    assert (spot.min_worker_nodes, spot.max_worker_nodes, spot.labels) == (0, 6, {"cpu": "any"})
    assert (frontend.min_worker_nodes, frontend.max_worker_nodes, frontend.resources["CPU"]) == (1, 1, 0)
    section = cluster_section(scaled)
    assert section["hosts"] == {"min": 0, "max": 6}
    assert amx.resources["CPU"] == spot.resources["CPU"] == section["num_cpus_per_host"]


def test_rays_autoscaler_brings_the_pod_that_a_model_asks_for(scaled):
    """What a pending host of each model's kind asks Ray for is answered by the group with its labels."""
    scheduler = pytest.importorskip("ray.autoscaler.v2.scheduler")
    protocol = pytest.importorskip("ray.core.generated.autoscaler_pb2")
    common = pytest.importorskip("ray.core.generated.common_pb2")
    types = node_types(only(scaled, "RayCluster"))

    def asked(labels: list[str]) -> dict[str, int]:
        request = protocol.ResourceRequest(resources_bundle={"CPU": 4.0})
        for selector in selectors(labels):
            constraints = [
                common.LabelSelectorConstraint(
                    label_key=key,
                    operator=common.LABEL_OPERATOR_NOT_IN if value.startswith("!") else common.LABEL_OPERATOR_IN,
                    label_values=value.removeprefix("!").removeprefix("in(").removesuffix(")").split(", "),
                )
                for key, value in selector.items()
            ]
            request.label_selectors.append(common.LabelSelector(label_constraints=constraints))
        reply = scheduler.ResourceDemandScheduler().schedule(
            scheduler.SchedulingRequest(
                disable_launch_config_check=True,
                node_type_configs=types,
                max_num_nodes=8,
                resource_requests=[protocol.ResourceRequestByCount(request=request, count=1)],
            )
        )
        return {launch.instance_type: launch.count for launch in reply.to_launch if launch.instance_type in types}

    def brought(*labels: str) -> set[str]:
        return asked(list(labels)).keys() - {"frontend", "headgroup"}

    assert brought("cpu=amx") == {"amx"}
    assert brought("!cpu=amx") == {"spot"}
    assert brought("cpu=epyc", "cpu=any") == {"spot"}
    assert brought("cpu=epyc") == set()


def test_the_pool_and_its_pods_have_the_same_bounds():
    """Without groups: KubeRay keeps the least pods, and how many there are is the autoscaler's to say."""
    manifests = render("--set", "mode=raycluster,pool.cluster.hosts.min=1,pool.cluster.hosts.max=5")
    (group,) = host_groups(only(manifests, "RayCluster")["spec"])
    assert (group["groupName"], group["minReplicas"], group["maxReplicas"]) == ("hosts", 1, 5)
    assert "replicas" not in group and "labels" not in group
    assert PoolConfig.from_dict(yaml.safe_load(pool_file(manifests))).cluster.hosts == HostRange(1, 5)


@pytest.mark.parametrize(
    ("values", "count"),
    [("cpu.request=4", 2), ("ray.hosts.replicas=3", 3), ("pool.cluster.hosts=4", 4), ("pool.cluster.hosts=auto", 2)],
)
def test_a_number_of_hosts_is_the_number_of_pods_and_needs_no_autoscaler(values, count):
    cluster = rendered_with(values)
    (group,) = host_groups(cluster)
    assert [group["replicas"], group["minReplicas"], group["maxReplicas"]] == [count] * 3
    assert not {"enableInTreeAutoscaling", "autoscalerOptions"} & cluster.keys()
    assert TOKEN_FOLDER not in str(cluster) and "serviceAccountToken" not in str(cluster)


def test_groups_of_a_fixed_cluster_are_counted_and_labelled():
    group = "ray.hosts.groups[{0}].name={1},ray.hosts.groups[{0}].replicas={2},ray.hosts.groups[{0}].labels.gpu={1}"
    values = f"mode=raycluster,{group.format(0, 'h100', 1)},{group.format(1, 'a100', 2)}"
    manifests = render("--set", values)
    found = {g["groupName"]: g for g in host_groups(only(manifests, "RayCluster")["spec"])}
    assert {name: (g["replicas"], g["labels"]) for name, g in found.items()} == {
        "h100": (1, {"gpu": "h100"}),
        "a100": (2, {"gpu": "a100"}),
    }
    assert cluster_section(manifests)["hosts"] == 3


def test_each_group_has_its_nodes_beside_those_of_all_pods(scaled):
    spec = {g["groupName"]: g["template"]["spec"] for g in only(scaled, "RayCluster")["spec"]["workerGroupSpecs"]}
    assert spec["amx"]["nodeSelector"] == {"pool": "models", "cpu": "sapphire-rapids"}
    assert spec["spot"]["nodeSelector"] == spec["frontend"]["nodeSelector"] == {"pool": "models"}
    assert [t["key"] for t in spec["spot"]["tolerations"]] == ["models", "spot"]
    assert [t["key"] for t in spec["amx"]["tolerations"]] == ["models"]


def test_the_service_accounts_token_is_the_autoscalers_alone(scaled):
    """KubeRay gives the account rights on pods; the code of models runs in other pods, and Ray's in the same one."""
    cluster = only(scaled, "RayCluster")["spec"]
    options = cluster["autoscalerOptions"]
    (mount,) = (m for m in options["volumeMounts"] if m["mountPath"] == TOKEN_FOLDER)
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    for group in groups:
        spec = group["template"]["spec"]
        assert spec["automountServiceAccountToken"] is False
        for container in spec["containers"]:
            assert mount["name"] not in [m["name"] for m in container["volumeMounts"]]
    (volume,) = (v for v in groups[0]["template"]["spec"]["volumes"] if v["name"] == mount["name"])
    assert [next(iter(source)) for source in volume["projected"]["sources"]] == [
        "serviceAccountToken",
        "configMap",
        "downwardAPI",
    ]
    assert options["securityContext"] == groups[0]["template"]["spec"]["containers"][0]["securityContext"]
    account = groups[0]["template"]["spec"]["serviceAccountName"]
    assert account == only(scaled, "ServiceAccount")["metadata"]["name"] != "default"


def test_nobody_restarts_what_the_autoscaler_replaces(scaled):
    """KubeRay refuses another restart policy than Never beside this autoscaler, and sets it."""
    cluster = only(scaled, "RayCluster")["spec"]
    assert cluster["autoscalerOptions"]["version"] == "v2"
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        assert "restartPolicy" not in group["template"]["spec"]
    assert not of_kind(scaled, "ScaledObject") and not of_kind(scaled, "HorizontalPodAutoscaler")


GROUP = "ray.hosts.groups[0].name=h100,ray.hosts.groups[0].labels.gpu=h100"
MODEL = "pool.models[0].name=a,pool.models[0].model=org/a,pool.models[0].hosts[0]"


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ("pool.cluster.hosts.min=5,pool.cluster.hosts.max=2", "pool.cluster.hosts is {min: 5, max: 2}: min is more"),
        (f"{RANGE},ray.hosts.replicas=4", "ray.hosts.replicas is 4, but pool.cluster.hosts is {min: 0, max: 3}"),
        (f"{RANGE},ray.hosts.replicas=2", "leave the first one empty"),
        ("pool.cluster.hosts=4,ray.hosts.replicas=2", "pool.cluster.hosts is 4, but ray.hosts has 2 pods"),
        (f"pool.cluster.hosts=4,{GROUP},ray.hosts.groups[0].replicas=2", "but ray.hosts has 2 pods"),
        ("pool.cluster.num_cpus_per_host=2", "pool.cluster.num_cpus_per_host is 2, cpu.request is 4"),
        (GROUP, "ray.hosts.groups: h100 needs replicas"),
        (f"{GROUP},ray.hosts.groups[0].max=2", "h100 has a max, which needs pool.cluster.hosts as {min: N, max: M}"),
        (f"{RANGE},{GROUP},ray.hosts.groups[0].replicas=2", "h100 has replicas, but pool.cluster.hosts is {min: 0"),
        (f"{RANGE},{GROUP},ray.hosts.groups[0].max=2", "have 2 pods at most"),
        (f"{GROUP},ray.hosts.groups[0].replicas=2,ray.hosts.replicas=2", "ray.hosts.replicas is not there with"),
        ("ray.hosts.groups[0].name=frontend,ray.hosts.groups[0].replicas=1", '"frontend" is the name of another group'),
        (f"{RANGE},{MODEL}=gpu=h100", "pool.models: a wants hosts gpu=h100, which no group"),
        (f"{RANGE},{GROUP},{MODEL}=!gpu=h100", "which no group"),
        (f"{RANGE},serviceAccount.create=false", "set serviceAccount.create or serviceAccount.name"),
        (f"{RANGE},networkPolicy.egress.restrict=true", "name it in networkPolicy.egress.to"),
        (f"{RANGE},ray.autoscaler.idleSeconds=0", "idleSeconds"),
        (f"{RANGE},ray.autoscaler.upscaling=Fast", "upscaling"),
    ],
)  # fmt: skip
def test_helm_refuses(helm, values, says):
    """What cannot work together is refused with the names of the values."""
    assert says in refusal("--set", f"mode=raycluster,{values}")


@pytest.mark.parametrize("model", ["gpu=h100", "!gpu=a100"])
def test_models_may_want_what_a_group_has(helm, model):
    assert host_groups(rendered_with(f"{RANGE},{GROUP},{MODEL}={model}"))

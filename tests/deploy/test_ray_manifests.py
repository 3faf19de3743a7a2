# SPDX-License-Identifier: Apache-2.0
"""The RayCluster and RayJob manifests: good objects that agree with the pool file, the image and the chart."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
import yaml

from tests.deploy.charts import quantity, selects
from tokenpool import __version__
from tokenpool.config import load_pool_file

pytestmark = pytest.mark.deploy

FOLDER = Path(__file__).parents[2] / "deploy" / "ray"
FILES = ("raycluster.yaml", "rayjob.yaml")
KEYS = ("POOL_API_KEY", "POOL_VIEW_KEY", "POOL_ADMIN_KEY")
SERVE = "tokenpool serve /etc/tokenpool/pool.yaml --cluster auto"


@pytest.fixture(autouse=True)
def keys(monkeypatch):
    """What the Secret of the manifests holds."""
    for name in KEYS:
        monkeypatch.setenv(name, f"{name}-0123456789")


def objects(name):
    return [m for m in yaml.safe_load_all((FOLDER / name).read_text()) if m]


def groups(name):
    """(group, container, pod spec) of the head and each worker group."""
    spec = objects(name)[0]["spec"]
    cluster = spec.get("rayClusterSpec", spec)
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        pod = group["template"]["spec"]
        (container,) = pod["containers"]
        yield group, container, pod


@pytest.mark.parametrize("version", ("1.25", "1.37"))
@pytest.mark.parametrize("name", FILES)
def test_every_object_is_valid(name, version):
    """Kubernetes' strict schemas and closed ones of KubeRay's resources accept every object."""
    pytest.importorskip("kubernetes_validate", reason="MANIFESTS ARE NOT VALIDATED: install the extra `deploy`")
    from tests.deploy.custom_resources import check

    for manifest in objects(name):
        check(manifest, version)


@pytest.mark.parametrize("name", FILES)
def test_hosts_are_what_the_pool_file_expects(name):
    """As many pods as hosts, each with the CPUs of one; the head and the frontend run none."""
    pool = load_pool_file(FOLDER / "pool.yaml")
    told = {
        g.get("groupName", "head"): (g.get("replicas", 1), g["rayStartParams"]["num-cpus"]) for g, *_ in groups(name)
    }
    assert told.pop("hosts") == (pool.cluster.hosts, str(int(pool.cluster.num_cpus_per_host)))
    assert {cpus for _, cpus in told.values()} == {"0"}


@pytest.mark.parametrize("name", FILES)
def test_memory_and_time_hold_the_pool_file(name):
    """A host's limit holds both budgets and the processes; the grace period outlasts the drain."""
    pool = load_pool_file(FOLDER / "pool.yaml")
    for group, container, pod in groups(name):
        limit = quantity(container["resources"]["limits"]["memory"])
        assert limit == quantity(container["resources"]["requests"]["memory"])
        assert pod["terminationGracePeriodSeconds"] >= pool.shutdown_timeout_s + 20
        if group.get("groupName") == "hosts":
            assert limit >= 1.25 * (pool.host_memory + pool.device_memory) + (8 << 30)


@pytest.mark.parametrize("name", FILES)
def test_pods_are_locked_down_and_use_the_image(name):
    """Every container: the image's version, not root, read-only root, no capabilities."""
    for _, container, pod in groups(name):
        assert container["image"] == f"tokenpool:{__version__}-cpu"
        assert pod["securityContext"]["runAsNonRoot"] and pod["securityContext"]["runAsUser"] == 10001
        assert pod["automountServiceAccountToken"] is False
        security = container["securityContext"]
        assert security["readOnlyRootFilesystem"] and not security["allowPrivilegeEscalation"]
        assert security["capabilities"] == {"drop": ["ALL"]}
        assert {m["name"] for m in container["volumeMounts"]} == {v["name"] for v in pod["volumes"]}


def test_the_frontend_of_the_cluster_serves_and_is_found():
    """It runs the documented command after joining, and the Service and probes mean its port."""
    found = [
        (group["template"]["metadata"]["labels"], container)
        for group, container, _ in groups("raycluster.yaml")
        if group.get("groupName") == "frontend"
    ]
    ((labels, container),) = found
    assert container["args"][0].endswith(f" && exec {SERVE}")
    service = objects("raycluster.yaml")[1]["spec"]
    assert selects(service["selector"], labels)
    assert container["ports"] == [{"name": service["ports"][0]["targetPort"], "containerPort": 8000}]
    assert {container[f"{kind}Probe"]["httpGet"]["port"] for kind in ("startup", "readiness", "liveness")} == {"http"}
    assert load_pool_file(FOLDER / "pool.yaml").port == 8000


def test_the_job_serves_on_the_head_and_is_found():
    """The entrypoint is the documented command; the Service selects the head, where a job's driver runs."""
    job, service, _ = objects("rayjob.yaml")
    assert job["spec"]["entrypoint"] == SERVE
    (head, container, _), *workers = groups("rayjob.yaml")
    assert selects(service["spec"]["selector"], head["template"]["metadata"]["labels"])
    assert {"name": "http", "containerPort": 8000} in container["ports"]
    for group, _, _ in workers:
        assert not selects(service["spec"]["selector"], group["template"].get("metadata", {}).get("labels", {}))


@pytest.mark.parametrize("name", FILES)
def test_clients_need_a_key_and_hosts_have_none(name):
    """The pool file's keys come from one Secret, which the pod that answers HTTP alone has."""
    pool = load_pool_file(FOLDER / "pool.yaml")
    assert [f"{key}-0123456789" for key in KEYS] == [*pool.api_key, *pool.view_key, *pool.admin_key]
    serves = {"raycluster.yaml": "frontend", "rayjob.yaml": "head"}[name]
    for group, container, _ in groups(name):
        secrets = [source["secretRef"]["name"] for source in container.get("envFrom", ())]
        assert secrets == (["tokenpool-keys"] if group.get("groupName", "head") == serves else [])
        assert not any("valueFrom" in variable for variable in container["env"])


@pytest.mark.parametrize("name", FILES)
def test_nobody_else_reaches_rays_ports(name):
    """A NetworkPolicy selects every pod and opens no port but HTTP to whoever comes."""
    *_, policy = objects(name)
    assert policy["kind"] == "NetworkPolicy" and policy["spec"]["policyTypes"] == ["Ingress"]
    selector = policy["spec"]["podSelector"]["matchLabels"]
    for group, _, _ in groups(name):  # the operator gives all pods of a cluster its name
        labels = group["template"].get("metadata", {}).get("labels", {}) | {"ray.io/cluster": "tokenpool"}
        assert selects(selector, labels)
    own, http = policy["spec"]["ingress"]
    assert http == {"ports": [{"port": 8000, "protocol": "TCP"}]}
    assert "ports" not in own and {"podSelector": {"matchLabels": selector}} in own["from"]


def test_the_commands_are_those_of_the_chart():
    """Head, hosts and frontend start as the chart's pods do."""
    chart = (FOLDER.parent / "chart" / "templates" / "raycluster.yaml").read_text()
    for _, container, _ in groups("raycluster.yaml"):
        (script,) = container["args"]
        assert script in chart


def test_the_start_scripts_do_what_they_say(tmp_path):
    """Head and hosts become Ray; the frontend joins without staying in the foreground, then becomes tokenpool."""
    for name in ("ray", "tokenpool"):
        program = tmp_path / name
        program.write_text(f'#!/bin/bash\necho "{name} $* pid=$$" >> {tmp_path}/calls\n')
        program.chmod(0o755)
    start = "ray start --address=head:6379 --block --num-cpus=4"
    env = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "KUBERAY_GEN_RAY_START_CMD": start}
    calls = {}
    for group, container, _ in groups("raycluster.yaml"):
        script = container["args"][0].replace("ulimit -n 65536", "true")  # not everybody may raise it
        done = subprocess.Popen([*container["command"], script], env=env)
        assert done.wait(30) == 0
        log = tmp_path / "calls"
        calls[group.get("groupName", "head")] = log.read_text().replace(f"pid={done.pid}", "pid=1").splitlines()
        log.unlink()
    assert calls["head"] == calls["hosts"] == [f"{start} pid=1"]
    join, serve = calls["frontend"]
    assert join.startswith("ray start --address=head:6379 --num-cpus=4 pid=") and not join.endswith("pid=1")
    assert serve == f"{SERVE} pid=1"

# SPDX-License-Identifier: Apache-2.0
"""What the Helm chart renders, by a real helm: good objects, that agree with each other and with the code."""

from __future__ import annotations

import itertools
import json
import math
import re

import pytest
import yaml

from tests.deploy.charts import (
    CHART,
    POOL_FILE,
    RELEASE,
    component_of,
    of_kind,
    only,
    pod_templates,
    pool_file,
    quantity,
    refusal,
    render,
    selects,
)
from tokenpool.config import PoolConfig, load_pool_file
from tokenpool.serve.access.auth import OPEN_PATHS
from tokenpool.units import parse_bytes, parse_seconds

pytestmark = pytest.mark.deploy

KUBERNETES = ("1.25", "1.37")
"""The oldest that Chart.yaml allows and the newest that the schemas know."""


def full(rendered):
    return rendered(CHART / "ci" / "cpu-full-values.yaml")


def containers(manifests):
    """(component, pod spec, container) of everything that runs, the test pod included."""
    for component, template in pod_templates(manifests):
        yield from ((component, template["spec"], c) for c in template["spec"]["containers"])
    test_pod = only(manifests, "Pod")
    yield from (("test", test_pod["spec"], c) for c in test_pod["spec"]["containers"])


def load(manifests, tmp_path, monkeypatch) -> PoolConfig:
    """The rendered pool file, read by our own loader with the environment that the server's pod sets."""
    for _, _, container in containers(manifests):
        for variable in container.get("env", ()):
            monkeypatch.setenv(variable["name"], variable.get("value", f"secret-{variable['name']}"))
    path = tmp_path / "pool.yaml"
    path.write_text(pool_file(manifests))
    return load_pool_file(path)


@pytest.mark.parametrize("version", KUBERNETES)
def test_every_object_is_valid(manifests, version):
    """Kubernetes' strict schemas, and closed ones of the custom resources, accept every object."""
    pytest.importorskip("kubernetes_validate", reason="OBJECTS ARE NOT VALIDATED: install the extra `deploy`")
    from tests.deploy.custom_resources import check

    for manifest in manifests:
        check(manifest, version)


def test_the_validation_can_fail(manifests):
    """A misspelt or mistyped field is an error, also inside a custom resource's pod template."""
    pytest.importorskip("kubernetes_validate", reason="OBJECTS ARE NOT VALIDATED: install the extra `deploy`")
    import jsonschema

    from tests.deploy.custom_resources import check

    for manifest in manifests:
        broken = json.loads(json.dumps(manifest))
        cluster = broken.get("spec", {}).get("headGroupSpec")
        (cluster["template"]["spec"] if cluster else broken)["hostNetwrok"] = True
        with pytest.raises(jsonschema.ValidationError):
            check(broken, KUBERNETES[-1])


def test_names_are_unique_and_carry_the_release(manifests):
    """No object overwrites another; two releases in one namespace do not meet."""
    names = [(m["kind"], m["metadata"]["name"]) for m in manifests]
    assert len(set(names)) == len(names)
    assert all(name.startswith(f"{RELEASE}-") for _, name in names)
    assert all(name.endswith("-ns") for kind, name in names if kind == "PriorityClass"), "it has no namespace"


def test_selectors_find_the_pods_that_answer_http(manifests):
    """Service, Deployment, budget and monitors select the server pods and no others."""
    labels = [template["metadata"]["labels"] for _, template in pod_templates(manifests)]
    labels.append(only(manifests, "Pod")["metadata"]["labels"])
    servers = [pod for pod in labels if pod["app.kubernetes.io/component"] == "server"]
    assert len(servers) == 1
    selectors = [only(manifests, "Service")["spec"]["selector"]]
    for kind in ("Deployment", "PodDisruptionBudget", "PodMonitor", "InferencePool"):
        found = [m for m in of_kind(manifests, kind) if not m["metadata"]["name"].endswith("-hosts")]
        selectors += [m["spec"]["selector"]["matchLabels"] for m in found]
    for selector in selectors:
        assert [pod for pod in labels if selects(selector, pod)] == servers
    for policy in of_kind(manifests, "NetworkPolicy"):
        assert all(selects(policy["spec"]["podSelector"]["matchLabels"], pod) for pod in labels)
    for monitor in of_kind(manifests, "ServiceMonitor"):
        service = only(manifests, "Service")["metadata"]["labels"]
        assert selects(monitor["spec"]["selector"]["matchLabels"], service)


def test_ports_agree_from_the_pool_file_to_the_monitor(manifests, tmp_path, monkeypatch):
    """The port that the server listens on is the one that Service, probes, routes, monitors and policy mean."""
    port = load(manifests, tmp_path, monkeypatch).port
    (server,) = (c for component, _, c in containers(manifests) if component == "server")
    declared = {p["name"]: p["containerPort"] for p in server["ports"]}
    assert declared == {"http": port}
    (service_port,) = only(manifests, "Service")["spec"]["ports"]
    assert (service_port["name"], service_port["targetPort"]) == ("http", "http")
    for kind, endpoints in (("ServiceMonitor", "endpoints"), ("PodMonitor", "podMetricsEndpoints")):
        for monitor in of_kind(manifests, kind):
            name = "metrics" if monitor["metadata"]["name"].endswith("-hosts") else "http"
            assert [(e["port"], e["path"]) for e in monitor["spec"][endpoints]] == [(name, "/metrics")]
    pools = {m["metadata"]["name"] for m in of_kind(manifests, "InferencePool")}
    for (backend,) in (r["backendRefs"] for m in of_kind(manifests, "HTTPRoute") for r in m["spec"]["rules"]):
        assert backend["name"] in pools if pools else backend["port"] == service_port["port"]
    for inference_pool in of_kind(manifests, "InferencePool"):
        assert inference_pool["spec"]["targetPorts"] == [{"number": port}]
    for ingress in of_kind(manifests, "Ingress"):
        backend = ingress["spec"]["rules"][0]["http"]["paths"][0]["backend"]["service"]
        assert backend == {"name": only(manifests, "Service")["metadata"]["name"], "port": {"name": "http"}}
    policy = only(manifests, "NetworkPolicy")["spec"]
    told = [
        p["containerPort"] for _, _, c in containers(manifests) for p in c.get("ports", ()) if p["name"] == "metrics"
    ]
    expected = [{"port": number, "protocol": "TCP"} for number in (port, *told)]
    assert [rule["ports"] for rule in policy["ingress"] if "ports" in rule] == [expected]


def test_probes_ask_open_routes(manifests):
    """Startup and liveness ask /live, readiness /ready, on the declared port; all answer without a key."""
    (server,) = (c for component, _, c in containers(manifests) if component == "server")
    probes = {kind: server[f"{kind}Probe"]["httpGet"] for kind in ("startup", "liveness", "readiness")}
    assert probes == {
        "startup": {"path": "/live", "port": "http"},
        "liveness": {"path": "/live", "port": "http"},
        "readiness": {"path": "/ready", "port": "http"},
    }
    assert {probe["path"] for probe in probes.values()} <= OPEN_PATHS


def test_a_rollout_can_wait_for_the_models(helm):
    """With `probes.untilLoaded` a new pod is started when no model is on its way."""
    (server,) = (
        c for component, _, c in containers(render("--set", "probes.untilLoaded=true")) if component == "server"
    )
    assert server["startupProbe"]["httpGet"]["path"] == "/ready?all=1"
    assert server["readinessProbe"]["httpGet"]["path"] == "/ready"


def test_the_pool_file_is_read_by_our_own_loader(manifests, tmp_path, monkeypatch):
    """It holds every model, and keys as references only; in a cluster one host per worker pod."""
    config = load(manifests, tmp_path, monkeypatch)
    assert [m["name"] for m in yaml.safe_load(pool_file(manifests))["models"]] == [m.name for m in config.models]
    text = pool_file(manifests)
    assert set(re.findall(r"\$\{(TOKENPOOL_\w+)\}", text)) == {
        key.removeprefix("secret-") for key in (*config.api_key, *config.view_key, *config.admin_key)
    }
    for cluster in of_kind(manifests, "RayCluster"):
        hosts = [g for g in cluster["spec"]["workerGroupSpecs"] if component_of(g["template"]) == "host"]
        if config.cluster.host_range is None:
            assert config.cluster.hosts == sum(group["replicas"] for group in hosts)
        for group in hosts:
            assert config.cluster.num_cpus_per_host == float(group["rayStartParams"]["num-cpus"])


def test_large_numbers_survive_the_template(rendered, tmp_path, monkeypatch):
    """1048576 does not become 1.048576e+06 on its way through Helm."""
    manifests = full(rendered)
    config = load(manifests, tmp_path, monkeypatch)
    assert config.host_memory == 3 << 30
    assert "--max-model-len" in config.models[0].args
    assert config.models[0].args[config.models[0].args.index("--max-model-len") + 1] == "1048576"


def test_the_grace_period_outlasts_the_drain(manifests, tmp_path, monkeypatch):
    """Delay, drain limit and the 15 s in which host and open responses end fit before SIGKILL."""
    config = load(manifests, tmp_path, monkeypatch)
    for _, template in pod_templates(manifests):
        grace = template["spec"]["terminationGracePeriodSeconds"]
        delay = max(
            float(c["lifecycle"]["preStop"]["exec"]["command"][1]) if "lifecycle" in c else 0
            for c in template["spec"]["containers"]
        )
        assert grace >= delay + config.shutdown_timeout_s + 15


def test_memory_limits_hold_the_budgets(manifests, tmp_path, monkeypatch):
    """A pod with an engine host may use its budgets, with a quarter more, and some GiB for the processes."""
    config = load(manifests, tmp_path, monkeypatch)
    for component, spec, container in containers(manifests):
        memory = {kind: container["resources"][kind]["memory"] for kind in ("requests", "limits")}
        if component == "test":
            continue
        assert memory["requests"] == memory["limits"]
        runs_host = component == "host" or not of_kind(manifests, "RayCluster")
        shm = next(v["emptyDir"] for v in spec["volumes"] if v["name"] == "shm")
        assert shm["medium"] == "Memory"
        if runs_host:
            on_cpu = "nvidia.com/gpu" not in container["resources"]["limits"]
            budget = config.host_memory + (config.device_memory if on_cpu else 0)
            expected = 1.25 * budget + (6 << 30) + len(config.models) * (512 << 20) + (1 << 30)
            if memory["limits"] != "120Gi":  # memory.override of one values file
                assert quantity(memory["limits"]) == pytest.approx(expected, abs=2 << 20)
            assert quantity(shm["sizeLimit"]) < quantity(memory["limits"])


@pytest.mark.parametrize("size", ["3221225472", "24GiB", "1.5TiB", "16MB", "512 KiB", "100b", "7gi"])
def test_sizes_are_read_as_the_pool_file_reads_them(helm, size):
    """The chart's arithmetic on sizes agrees with ours, to the MiB."""
    flag = "--set" if size.isdigit() else "--set-string"
    words = ("--set", "device=cuda,memory.base=1GiB,memory.perModel=1KiB,memory.headroom=1")
    (_, template), *_ = pod_templates(render(*words, flag, f"pool.host_memory={size}"))
    limit = quantity(template["spec"]["containers"][0]["resources"]["limits"]["memory"])
    assert limit == pytest.approx(parse_bytes(int(size) if size.isdigit() else size) + (2 << 30) + 1024, abs=1 << 20)


@pytest.mark.parametrize("mode", ["standalone", "raycluster"])
def test_several_frontends_have_memory_each(helm, mode, tmp_path, monkeypatch):
    """They are in the pool file, and their pod's memory grows by theirs; one alone is in memory.base."""
    words = ("--set", f"device=cuda,mode={mode},memory.perFrontend=3GiB")
    sizes = []
    for count in (1, 4):
        manifests = render(*words, "--set", f"pool.frontends={count}")
        pods = {component: template["spec"]["containers"][0] for component, template in pod_templates(manifests)}
        sizes.append({pod: quantity(container["resources"]["limits"]["memory"]) for pod, container in pods.items()})
        assert load(manifests, tmp_path, monkeypatch).frontends == count
    grown = {pod: size - sizes[0][pod] for pod, size in sizes[1].items()}
    assert grown == dict.fromkeys(grown, 0) | {"server": 4 * (3 << 30)}


@pytest.mark.parametrize("time", ["90", "90s", "1.5m", "400ms", "0.5h", "250us"])
def test_times_are_read_as_the_pool_file_reads_them(helm, time):
    """The chart's arithmetic on times agrees with ours, to the second."""
    flag = "--set" if time.isdigit() else "--set-string"
    manifests = render(flag, f"pool.shutdown_timeout={time}", "--set", "drain.delaySeconds=0,drain.extraSeconds=15")
    ((_, template),) = pod_templates(manifests)
    grace = template["spec"]["terminationGracePeriodSeconds"]
    assert grace == 15 + math.ceil(parse_seconds(int(time) if time.isdigit() else time))


def test_a_gpu_is_asked_for_by_engine_hosts_only(manifests):
    """Device cuda means one GPU per engine host, device cpu none; Ray is told the same."""
    on_gpu = "-cuda" in only(manifests, "Pod")["spec"]["containers"][0]["image"]
    for component, _, container in containers(manifests):
        runs_host = component == "host" or (component == "server" and not of_kind(manifests, "RayCluster"))
        expected = 1 if on_gpu and runs_host else None
        assert container["resources"]["limits"].get("nvidia.com/gpu") == expected
    for cluster in of_kind(manifests, "RayCluster"):
        groups = [cluster["spec"]["headGroupSpec"], *cluster["spec"]["workerGroupSpecs"]]
        told = {component_of(g["template"]): g["rayStartParams"]["num-gpus"] for g in groups}
        assert told == {"head": "0", "host": "1" if on_gpu else "0", "server": "0"}


def test_nothing_runs_as_root_or_writes_to_its_image(manifests):
    """Every container: not root, no new privileges, no capabilities, read-only root, no token of the API."""
    for _, spec, container in containers(manifests):
        assert spec["securityContext"]["runAsNonRoot"] is True
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert spec["automountServiceAccountToken"] is False
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }


def test_every_folder_that_is_written_lies_on_a_volume(manifests):
    """HOME, caches and temporary files are below a mount that is not read-only."""
    for component, spec, container in containers(manifests):
        if component == "test":
            continue
        volumes = {volume["name"] for volume in spec["volumes"] if "projected" not in volume}  # the autoscaler's own
        assert {mount["name"] for mount in container["volumeMounts"]} == volumes
        writable = [m["mountPath"] for m in container["volumeMounts"] if not m.get("readOnly")]
        env = {variable["name"]: variable.get("value", "") for variable in container["env"]}
        folders = {name: value for name, value in env.items() if value.startswith("/")}
        assert folders.keys() >= {"HOME", "TMPDIR", "HF_HOME", "VLLM_CACHE_ROOT", "TRITON_CACHE_DIR"}
        for name, folder in folders.items():
            assert any(folder == path or folder.startswith(f"{path}/") for path in writable), name


def test_no_secret_is_in_the_release(manifests):
    """Keys come from Secrets that the chart only refers to."""
    assert not of_kind(manifests, "Secret")
    for _, _, container in containers(manifests):
        keys = [v for v in container.get("env", ()) if re.search("KEY|TOKEN", v["name"])]
        assert all("secretKeyRef" in v["valueFrom"] for v in keys)


def test_the_server_is_started_as_the_readme_says(manifests):
    """`tokenpool serve` on the mounted pool file, in a cluster with --cluster auto after joining it."""
    (server,) = (c for component, _, c in containers(manifests) if component == "server")
    (mount,) = (m for m in server["volumeMounts"] if m["name"] == "pool")
    assert POOL_FILE == f"{mount['mountPath']}/pool.yaml"
    if not of_kind(manifests, "RayCluster"):
        assert [*server["command"], *server["args"]] == ["tokenpool", "serve", POOL_FILE]
        return
    (script,) = server["args"]
    join, _, serve = script.partition(" && exec ")
    assert serve == f"tokenpool serve {POOL_FILE} --cluster auto"
    assert "${KUBERAY_GEN_RAY_START_CMD/ --block/}" in join
    assert only(manifests, "RayCluster")["metadata"]["annotations"]["ray.io/overwrite-container-cmd"] == "true"


def test_the_network_policy_closes_what_is_not_http(manifests):
    """Every port is open to the release's own pods, the HTTP port to clients, and nothing else to anybody."""
    policy = only(manifests, "NetworkPolicy")["spec"]
    own, *others = policy["ingress"]
    assert own == {"from": [{"podSelector": policy["podSelector"]}]}
    for rule in others:
        assert "ports" in rule or rule["from"][0]["namespaceSelector"]["matchLabels"]


def test_a_scrape_brings_the_first_key(rendered):
    """/metrics asks for a key when one is set, so the monitors bring it."""
    manifests = full(rendered)
    expected = {"type": "Bearer", "credentials": {"name": "pool-keys", "key": "api-1"}}
    assert only(manifests, "ServiceMonitor")["spec"]["endpoints"][0]["authorization"] == expected
    assert only(manifests, "PodMonitor")["spec"]["podMetricsEndpoints"][0]["authorization"] == expected


def test_dashboards_and_alerts_are_the_committed_files(rendered):
    """The ConfigMap and the PrometheusRule hold what `make dashboards` wrote."""
    manifests = full(rendered)
    (dashboards,) = (m["data"] for m in of_kind(manifests, "ConfigMap") if "pool.yaml" not in m["data"])
    files = sorted((CHART / "files" / "dashboards").glob("*.json"))
    assert {f"tokenpool-{f.name}": json.loads(f.read_text()) for f in files} == {
        name: json.loads(text) for name, text in dashboards.items()
    }
    alerts = yaml.safe_load((CHART / "files" / "alerts.yaml").read_text())
    assert only(manifests, "PrometheusRule")["spec"] == alerts


def test_a_changed_pool_file_makes_new_pods(helm):
    """The pods' annotation follows the pool file."""
    sums = set()
    for timeout in ("60s", "61s"):
        manifests = render("--set", f"pool.shutdown_timeout={timeout}")
        sums |= {t["metadata"]["annotations"]["checksum/pool"] for _, t in pod_templates(manifests)}
    assert len(sums) == 2


@pytest.mark.parametrize(
    "values, says",
    [
        ("pool.devcie_memory=1GiB", "devcie_memory"),
        ("pool.device_memory=auto", "device_memory"),
        ("pool.models[0].nmae=x", "nmae"),
        ("replicas=x", "replicas"),
        ("pool.host_memory=7g", "host_memory"),
        ("device=gpu", "device"),
        ("gpu.count=2", "gpu.count"),
        ("keys.api[0].secert=x", "secert"),
        ("probes.startup.periodSeconds=0", "periodSeconds"),
        ("pool.tenants[0].name=a,pool.tenants[0].keys[0]=plain", "keys"),
        ("keys.allowOpen=true,ingress.enabled=true", "ingress.host"),
        ("keys.allowOpen=true,httpRoute.enabled=true", "httpRoute.parentRefs"),
        ("ingress.enabled=true,ingress.host=x", "ingress.enabled would let everybody"),
        ("httpRoute.enabled=true", "httpRoute.enabled would let everybody"),
        ("service.type=LoadBalancer", "service.type would let everybody"),
        ("service.type=NodePort,pool.tenants[0].name=default", "service.type would let everybody"),
        ("ingress.paths[0]=v1", "ingress.paths"),
        ("pool.frontends=0", "frontends"),
    ],
)
def test_helm_refuses(helm, values, says):
    """Typos, values out of range and plain keys stop the installation, and the message names the value."""
    assert says in refusal("--set", values)


@pytest.mark.parametrize(
    "values",
    [
        "keys.api[0].secret=s,keys.api[0].key=k",
        "keys.allowOpen=true",
        f"pool.tenants[0].name=a,pool.tenants[0].keys=sha256:{'0' * 64}",
    ],
)
def test_a_port_with_keys_may_be_opened(helm, values):
    """With client keys, tenants, or an open port that was asked for, a Service of any type is rendered."""
    assert only(render("--set", f"service.type=LoadBalancer,{values}"), "Service")["spec"]["type"] == "LoadBalancer"


def test_secrets_are_where_they_are_needed(manifests):
    """The server has all; an engine host in a pod of its own has the hub's token alone, and the head nothing."""
    for component, _, container in containers(manifests):
        secret = {v["name"] for v in container.get("env", ()) if "valueFrom" in v}
        if component == "server":
            assert set(re.findall(r"\$\{(\w+)\}", pool_file(manifests))) <= secret
        else:
            assert secret <= {"host": {"HF_TOKEN"}, "head": set(), "test": {"TOKENPOOL_API_KEY"}}[component]


def test_only_the_paths_that_are_named_are_published(rendered):
    """An Ingress and an HTTPRoute lead to these beginnings and no others; by default to all."""
    manifests = full(rendered)
    (rule,) = only(manifests, "Ingress")["spec"]["rules"]
    assert ["/v1/chat", "/v1/models"] == [path["path"] for path in rule["http"]["paths"]]
    (rule,) = only(manifests, "HTTPRoute")["spec"]["rules"]
    assert ["/v1/chat", "/v1/models"] == [match["path"]["value"] for match in rule["matches"]]


def test_redirects_of_media_are_off_unless_a_value_says_otherwise(manifests):
    """Each container that runs tokenpool has the variable once."""
    for component, _, container in containers(manifests):
        found = [v["value"] for v in container.get("env", ()) if v["name"] == "VLLM_MEDIA_URL_ALLOW_REDIRECTS"]
        says_otherwise = "HF_HUB_OFFLINE" in str(container.get("env"))  # the file with all values
        assert component == "test" or found == ["1" if says_otherwise else "0"]


@pytest.mark.parametrize("mode, device", [*itertools.product(("standalone", "raycluster"), ("cpu", "cuda"))])
def test_every_mode_goes_with_every_device(helm, mode, device):
    """Each combination renders one set of server pods."""
    manifests = render("--set", f"mode={mode},device={device}")
    assert [component for component, _ in pod_templates(manifests)].count("server") == 1

# SPDX-License-Identifier: Apache-2.0
"""What the chart would start, started here: the container's command, arguments, environment and pool file."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest
import yaml

from tests.deploy.charts import Manifest, only, pod_templates, pool_file, quantity, render
from tests.helpers.server import TINY_ARGS, PoolServerProcess

pytestmark = pytest.mark.deploy

START_LIMIT_S = 400.0
SECRETS = {("keys", "api"): "chart-api-key-0123", ("keys", "admin"): "chart-admin-key-0123"}


class ChartServer(PoolServerProcess):
    """Runs the server container of rendered manifests, with each mount as a folder below `root`."""

    def __init__(self, values: dict, root: Path) -> None:
        super().__init__(values["pool"])
        self.root = root
        self.api_key, self.admin_key = SECRETS["keys", "api"], SECRETS["keys", "admin"]
        path = root / "values.yaml"
        path.write_text(yaml.safe_dump({**values, "port": self.port}))
        self.manifests = render("-f", str(path))
        ((_, template),) = pod_templates(self.manifests)
        self.spec = template["spec"]
        (self.container,) = self.spec["containers"]
        self.mounts = {m["mountPath"]: root / m["name"] for m in self.container["volumeMounts"]}
        for folder in self.mounts.values():
            folder.mkdir()
        warm = Path(os.environ.get("VLLM_CACHE_ROOT", "~/.cache/vllm")).expanduser()
        if warm.exists():  # as a cacheVolume with a claim: what vLLM has learnt about models costs 10 s each to learn
            (self.mounts["/cache"] / "vllm").symlink_to(warm)
        (self.mounts["/etc/tokenpool"] / "pool.yaml").write_text(pool_file(self.manifests))

    def inside(self, text: str) -> str:
        """A path of the container, here."""
        for path, folder in self.mounts.items():
            if text == path or text.startswith(f"{path}/"):
                return str(folder) + text.removeprefix(path)
        return text

    def environment(self, container: Manifest) -> dict[str, str]:
        """What the container sees: its own variables, Secrets resolved, and the PATH."""
        values = {"PATH": os.environ["PATH"]}
        for variable in container.get("env", ()):
            if "value" in variable:
                values[variable["name"]] = self.inside(variable["value"])
            else:
                ref = variable["valueFrom"]["secretKeyRef"]
                values[variable["name"]] = SECRETS[ref["name"], ref["key"]]
        return values

    def __enter__(self) -> ChartServer:
        (program,) = self.container["command"]
        script = Path(sys.executable).with_name(program)
        with self._log_file.open("wb") as log:
            self.process = subprocess.Popen(
                [str(script), *map(self.inside, self.container["args"])], cwd=self.root,
                env=self.environment(self.container), stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
            )  # fmt: skip
        try:
            self.wait_until_ready(START_LIMIT_S)
        except BaseException:
            self.kill()
            raise
        return self


@pytest.fixture(scope="module")
def server(helm, tiny_models, tmp_path_factory) -> Iterator[ChartServer]:
    """Two tiny models behind keys, as an installation with the chart would serve them."""
    models = [{"name": n, "model": str(tiny_models.path(n)), "args": TINY_ARGS} for n in ("llama", "qwen2")]
    values = {
        "pool": {"models": models, "device_memory": "96MiB", "host_memory": "64MiB", "page_size": "1MiB"},
        "keys": {"api": [{"secret": "keys", "key": "api"}], "admin": [{"secret": "keys", "key": "admin"}]},
        "env": [{"name": "HF_HUB_OFFLINE", "value": "1"}, {"name": "VLLM_LOGGING_LEVEL", "value": "ERROR"}],
        "cpu": {"request": 1},
        "monitoring": {"serviceMonitor": {"enabled": True}},
    }
    with ChartServer(values, tmp_path_factory.mktemp("pod")) as running:
        yield running


def test_the_probes_of_the_chart_answer(server):
    """Every probe's route answers 200 without a key, on the declared port."""
    ports = {port["name"]: port["containerPort"] for port in server.container["ports"]}
    for kind in ("startup", "readiness", "liveness"):
        probe = server.container[f"{kind}Probe"]["httpGet"]
        assert httpx.get(f"http://127.0.0.1:{ports[probe['port']]}{probe['path']}").status_code == 200


def run_helm_test(server: ChartServer, key: str) -> subprocess.CompletedProcess[str]:
    (container,) = only(server.manifests, "Pod")["spec"]["containers"]
    (_, url, *_models) = args = list(container["args"])
    assert url == f"http://{only(server.manifests, 'Service')['metadata']['name']}:80"
    args[1] = server.base_url
    env = server.environment(container) | {"TOKENPOOL_API_KEY": key}
    words = [sys.executable, *container["command"][1:], *args]
    return subprocess.run(words, env=env, capture_output=True, text=True, timeout=120)


def test_helm_test_passes_and_can_fail(server):
    """The script of the test pod gets tokens from each model; a wrong key fails it."""
    done = run_helm_test(server, server.api_key)
    assert done.returncode == 0, done.stderr
    assert [line.partition(":")[0] for line in done.stdout.splitlines()] == ["llama", "qwen2"]
    refused = run_helm_test(server, "wrong")
    assert refused.returncode == 1 and "401" in refused.stderr


def test_a_scrape_works_as_the_monitor_says(server):
    """/metrics answers with the key that the ServiceMonitor brings, and only with it."""
    (endpoint,) = only(server.manifests, "ServiceMonitor")["spec"]["endpoints"]
    credentials = endpoint["authorization"]["credentials"]
    url = f"{server.base_url}{endpoint['path']}"
    assert httpx.get(url).status_code == 401
    headers = {"Authorization": f"Bearer {SECRETS[credentials['name'], credentials['key']]}"}
    answer = httpx.get(url, headers=headers)
    assert answer.status_code == 200 and "tokenpool:ledger_ok 1.0" in answer.text


def test_the_memory_limit_is_enough(server):
    """Frontend and host together stay below the container's limit, with tiny models by GiB."""
    processes = [psutil.Process(pid) for pid in (server.process.pid, server.host_pid)]
    used = sum(process.memory_info().rss for process in processes)
    assert 0 < used < quantity(server.container["resources"]["limits"]["memory"])


def test_it_drains_within_its_grace(server):
    """SIGTERM ends it cleanly; sockets and metrics files lay below the pod's /tmp and are gone."""
    tmp = server.mounts["/tmp"]
    assert {path.name.partition("-")[0] for path in tmp.iterdir()} >= {"tokenpool"}
    assert server.spec["terminationGracePeriodSeconds"] > server.pool.get("shutdown_timeout_s", 60)
    assert server.stop() == 0
    assert [path.name for path in tmp.iterdir() if path.name.startswith("tokenpool-")] == []
    shutil.rmtree(tmp)

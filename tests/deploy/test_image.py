# SPDX-License-Identifier: Apache-2.0
"""The image that deploy/build_image.sh built, run as the pod of the rendered chart by podman, without Kubernetes.

User 10001, a read-only root, no capabilities, memory limit, mounted pool file, Secrets and volumes are those of the
chart. The network is the machine's, probes are asked by the test, and claims are folders of the machine.
"""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from tests.deploy.charts import only, pod_templates, quantity, render
from tests.helpers.server import TINY_ARGS, free_port, poll

pytestmark = pytest.mark.deploy

IMAGE = os.environ.get("TOKENPOOL_TEST_IMAGE", "")
MOST_BYTES = int(3.7e9)
"""torch has 0.75 GB of it, the base with a compiler 0.65, vLLM 0.5, Ray 0.24."""
SECRETS = {"api": "chart-api-key-0123", "admin": "chart-admin-key-0123"}
START_LIMIT_S = 400.0
if not IMAGE or shutil.which("podman") is None:
    reason = "THE IMAGE IS NOT TESTED: `make test-image` builds one, and needs podman, buildah, runc and debootstrap"
    pytest.skip(reason, allow_module_level=True)


def run_podman(*words: str, limit_s: float = 120.0) -> subprocess.CompletedProcess[str]:
    """Run podman; the caller judges its exit status."""
    env = os.environ | {"CONTAINERS_CONF": str(Path(__file__).with_name("containers.conf"))}
    return subprocess.run(["podman", *words], env=env, capture_output=True, text=True, timeout=limit_s)


def podman(*words: str, limit_s: float = 120.0) -> str:
    """What podman prints; raises with what it says when it fails."""
    done = run_podman(*words, limit_s=limit_s)
    assert done.returncode == 0, f"podman {' '.join(words)}: {done.stderr}"
    return done.stdout


class Pod:
    """The chart's pod, as podman runs it."""

    def __init__(self, root: Path, models: list[dict[str, Any]], checkpoints: Path) -> None:
        self.port = free_port()
        repository, _, tag = IMAGE.rpartition(":")
        values = {
            "image": {"repository": repository, "tag": tag, "pullPolicy": "Never"},
            "pool": {"models": models, "device_memory": "96MiB", "host_memory": "64MiB", "page_size": "1MiB",
                     "shutdown_timeout": "20s"},
            "keys": {name: [{"secret": "keys", "key": name}] for name in SECRETS},
            "env": [{"name": "HF_HUB_OFFLINE", "value": "1"}, {"name": "VLLM_LOGGING_LEVEL", "value": "ERROR"}],
            "modelVolume": {"claim": "checkpoints", "mountPath": str(checkpoints)},
            "cpu": {"request": 1}, "memory": {"base": "3GiB"}, "drain": {"delaySeconds": 1}, "port": self.port,
        }  # fmt: skip
        (root / "values.yaml").write_text(yaml.safe_dump(values))
        self.manifests = render("-f", str(root / "values.yaml"))
        ((_, template),) = pod_templates(self.manifests)
        self.spec = template["spec"]
        self.spec["hostNetwork"] = True
        for volume in self.spec["volumes"]:
            if "persistentVolumeClaim" in volume:
                del volume["persistentVolumeClaim"]
                volume["hostPath"] = {"path": str(checkpoints), "type": "Directory"}
            elif volume["name"] == "shm":  # its group is set by a kubelet, which is not here
                del volume["emptyDir"]
                shared = root / "shm"
                shared.mkdir()
                shared.chmod(0o777)
                volume["hostPath"] = {"path": str(shared), "type": "Directory"}
        (self.container,) = self.spec["containers"]
        (config_map,) = (m for m in self.manifests if m["kind"] == "ConfigMap")
        # podman would map the port, and ask the probes with a curl in the container.
        left_out = ("ports", "startupProbe", "readinessProbe", "livenessProbe", "lifecycle")
        played = {key: value for key, value in self.container.items() if key not in left_out}
        spec = {**self.spec, "containers": [played]}
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "tokenpool-test"}, "spec": spec}
        self.file = root / "pod.yaml"
        self.file.write_text(yaml.safe_dump_all([config_map, pod]))
        self.name = f"tokenpool-test-{self.container['name']}"
        self.url = f"http://127.0.0.1:{self.port}"

    def play(self) -> None:
        held = self.file.with_name("keys.json")  # as podman keeps a Secret
        held.write_text(json.dumps({key: base64.b64encode(value.encode()).decode() for key, value in SECRETS.items()}))
        podman("secret", "create", "keys", str(held))
        podman("kube", "play", str(self.file))

    def end(self) -> None:
        run_podman("pod", "rm", "--force", "tokenpool-test")
        run_podman("secret", "rm", "keys")

    def inspected(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(podman("inspect", self.name))[0]
        return found

    def log(self) -> str:
        done = run_podman("logs", self.name)
        return (done.stdout + done.stderr)[-4000:]

    def probe(self, kind: str) -> int:
        try:
            return httpx.get(f"{self.url}{self.container[f'{kind}Probe']['httpGet']['path']}", timeout=10).status_code
        except httpx.TransportError:
            assert self.inspected()["State"]["Running"], self.log()
            return 0

    def complete(self, model: str, key: str = SECRETS["api"], **more: Any) -> int:
        body = {"model": model, "prompt": [5, 6, 7], "max_tokens": 4, "ignore_eos": True, **more}
        headers = {"authorization": f"Bearer {key}"}
        return httpx.post(f"{self.url}/v1/completions", json=body, headers=headers, timeout=120).status_code


@pytest.fixture(scope="module")
def pod(helm: str, tiny_models: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pod]:
    root = tmp_path_factory.mktemp("pod")
    checkpoints = root / "checkpoints"
    models = []
    for name in ("llama", "qwen2"):
        shutil.copytree(tiny_models.path(name), checkpoints / name)
        models.append({"name": name, "model": str(checkpoints / name), "args": TINY_ARGS})
    for path in [*checkpoints.rglob("*"), checkpoints, *checkpoints.parents]:  # user 10001 has to read them
        if path.is_relative_to("/tmp") and path != Path("/tmp"):
            path.chmod(0o755 if path.is_dir() else 0o644)
    made = Pod(root, models, checkpoints)
    made.play()
    try:
        poll(lambda: made.probe("startup"), until=lambda status: status == 200, limit_s=START_LIMIT_S)
        poll(lambda: httpx.get(f"{made.url}/ready?all=1").status_code, until=lambda s: s == 200, limit_s=START_LIMIT_S)
        yield made
    finally:
        made.end()


def test_the_image_is_small() -> None:
    """For a CPU; what is in it and how large is printed when it is not."""
    (image,) = json.loads(podman("image", "inspect", IMAGE))
    assert image["Config"]["User"] == "10001:10001"
    assert image["Size"] <= MOST_BYTES, f"{image['Size'] / 1e9:.2f} GB"


def test_it_serves_as_the_chart_says(pod: Pod) -> None:
    """Every probe answers, each model gives tokens, and a wrong key opens nothing."""
    assert [pod.probe(kind) for kind in ("startup", "readiness", "liveness")] == [200, 200, 200]
    assert [pod.complete("llama"), pod.complete("qwen2"), pod.complete("llama", "wrong")] == [200, 200, 401]
    grammar = {"structured_outputs": {"regex": "[a-d]{4}"}, "ignore_eos": False}
    assert pod.complete("llama", **grammar) == 200, "grammars need what the image may lack"


def test_it_is_as_shut_in_as_the_chart_says(pod: Pod) -> None:
    """User, root filesystem, capabilities and memory limit are in force, not only written down."""
    state = pod.inspected()
    assert state["HostConfig"]["ReadonlyRootfs"] is True
    assert quantity(pod.container["resources"]["limits"]["memory"]) == state["HostConfig"]["Memory"]
    status = podman("exec", pod.name, "cat", "/proc/self/status")
    fields = dict(line.split(":\t", 1) for line in status.splitlines() if ":\t" in line)
    assert fields["Uid"].split()[0] == "10001" and int(fields["CapEff"], 16) == 0 and fields["NoNewPrivs"] == "1"
    write = "import sys\ntry: open('/opt/x', 'w')\nexcept OSError as e: sys.exit(e.errno)"
    done = run_podman("exec", pod.name, "python", "-c", write)
    assert done.returncode in (13, 30)  # no right to, or a read-only filesystem


def test_helm_test_passes_from_outside(pod: Pod) -> None:
    """The test pod's own script, in a container of the image."""
    (container,) = only(pod.manifests, "Pod")["spec"]["containers"]
    args = list(container["args"])
    args[1] = pod.url
    words = ["run", "--rm", "--network=host"]
    words += ["--env", f"TOKENPOOL_API_KEY={SECRETS['api']}", "--entrypoint", container["command"][0], IMAGE]
    said = podman(*words, *container["command"][1:], *args, limit_s=300)
    assert [line.partition(":")[0] for line in said.splitlines()] == ["llama", "qwen2"]


def test_sigterm_drains_it_and_it_comes_back(pod: Pod) -> None:
    """It ends with status 0 within its grace, and a restarted container serves again."""
    podman("stop", "--time", str(pod.spec["terminationGracePeriodSeconds"]), pod.name, limit_s=200)
    assert pod.inspected()["State"]["ExitCode"] == 0, pod.log()
    podman("start", pod.name)
    poll(lambda: pod.probe("readiness"), until=lambda status: status == 200, limit_s=START_LIMIT_S)
    poll(lambda: pod.complete("llama"), until=lambda status: status == 200)

# SPDX-License-Identifier: Apache-2.0
"""Render the Helm chart with a real helm and look into what comes out. Imports no vLLM."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

REPOSITORY = Path(__file__).parents[2]
CHART = REPOSITORY / "deploy" / "chart"
VALUES_FILES = sorted((CHART / "ci").glob("*.yaml"))
RELEASE = "rel"
NO_HELM = "RENDER TESTS OF THE HELM CHART ARE NOT RUN: no helm; `make test-deploy` fetches one, HELM_BIN names another"
POOL_FILE = "/etc/tokenpool/pool.yaml"

Manifest = dict[str, Any]


def helm_binary() -> str | None:
    """The helm to use: HELM_BIN, the one that `make test-deploy` fetched, or the one on the PATH."""
    fetched = REPOSITORY / "build" / "tools" / "helm"
    return os.environ.get("HELM_BIN") or (str(fetched) if fetched.exists() else shutil.which("helm"))


def run_helm(*words: str) -> subprocess.CompletedProcess[str]:
    """Run helm; the caller judges its exit status."""
    helm = helm_binary()
    assert helm is not None, NO_HELM
    return subprocess.run([helm, *words], capture_output=True, text=True, timeout=120)


def render(*words: str) -> list[Manifest]:
    """The objects of `helm template` with these flags; raises with helm's message when it refuses."""
    done = run_helm("template", RELEASE, str(CHART), "--namespace", "ns", *words)
    assert done.returncode == 0, done.stderr
    return [manifest for manifest in yaml.safe_load_all(done.stdout) if manifest]


def refusal(*words: str) -> str:
    """What helm says when it refuses to render with these flags."""
    done = run_helm("template", RELEASE, str(CHART), *words)
    assert done.returncode != 0, "helm renders it"
    return done.stderr


def of_kind(manifests: list[Manifest], kind: str) -> list[Manifest]:
    """The objects of one kind."""
    return [manifest for manifest in manifests if manifest["kind"] == kind]


def only(manifests: list[Manifest], kind: str) -> Manifest:
    """The one object of a kind."""
    found = of_kind(manifests, kind)
    assert len(found) == 1, f"{len(found)} objects of kind {kind}"
    return found[0]


def pod_templates(manifests: list[Manifest]) -> Iterator[tuple[str, Manifest]]:
    """(component, pod template) of every pod that the release runs, without the test pod."""
    for deployment in of_kind(manifests, "Deployment"):
        template = deployment["spec"]["template"]
        yield component_of(template), template
    for cluster in of_kind(manifests, "RayCluster"):
        groups = [cluster["spec"]["headGroupSpec"], *cluster["spec"]["workerGroupSpecs"]]
        for template in (group["template"] for group in groups):
            yield component_of(template), template


def component_of(template: Manifest) -> str:
    """What a pod is in the release: server, head or host."""
    return template["metadata"]["labels"]["app.kubernetes.io/component"]


def selects(selector: Mapping[str, str], labels: Mapping[str, str]) -> bool:
    """Whether a label selector matches."""
    return bool(selector) and selector.items() <= labels.items()


def pool_file(manifests: list[Manifest]) -> str:
    """The text of the rendered pool file."""
    (config_map,) = (m for m in of_kind(manifests, "ConfigMap") if "pool.yaml" in m["data"])
    return config_map["data"]["pool.yaml"]


def quantity(text: str | int) -> float:
    """A Kubernetes quantity of memory in bytes, or of CPU in cores."""
    scales = {"Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "m": 1e-3}
    text = str(text)
    for suffix, scale in scales.items():
        if text.endswith(suffix):
            return float(text.removesuffix(suffix)) * scale
    return float(text)

# SPDX-License-Identifier: Apache-2.0
"""Closed JSON schemas of the custom resources that the deployment files make.

They hold the fields that we write, by the definitions of KubeRay 1.5 (ray.io/v1), Prometheus Operator 0.80 and Gateway
API 1.2, and nothing else, so that a misspelt field is an error. Pod templates are checked by Kubernetes' own schema.
"""

from __future__ import annotations

from typing import Any

import jsonschema
import kubernetes_validate

Schema = dict[str, Any]
TEXT: Schema = {"type": "string", "minLength": 1}
TEXTS: Schema = {"type": "object", "additionalProperties": {"type": "string"}}
COUNT: Schema = {"type": "integer", "minimum": 0}
TEMPLATE: Schema = {"type": "object"}


def closed(required: Schema, optional: Schema | None = None) -> Schema:
    return {
        "type": "object",
        "additionalProperties": False,
        "required": list(required),
        "properties": {**required, **(optional or {})},
    }


def array(items: Schema, minimum: int = 1) -> Schema:
    return {"type": "array", "items": items, "minItems": minimum}


_CLUSTER = closed(
    {
        "rayVersion": TEXT,
        "headGroupSpec": closed({"rayStartParams": TEXTS, "template": TEMPLATE}, {"serviceType": TEXT}),
        "workerGroupSpecs": array(
            closed(
                {"groupName": TEXT, "replicas": COUNT, "minReplicas": COUNT, "maxReplicas": COUNT}
                | {"rayStartParams": TEXTS, "template": TEMPLATE}
            )
        ),
    },
    {"authOptions": closed({"mode": {"enum": ["token", "disabled"]}})},
)
_SELECTOR = closed({"matchLabels": TEXTS})
_ENDPOINT = closed(
    {"port": TEXT, "path": TEXT, "interval": TEXT},
    {"authorization": closed({"type": TEXT, "credentials": closed({"name": TEXT, "key": TEXT})})},
)
_RULE = closed({"alert": TEXT, "expr": TEXT, "for": TEXT, "labels": TEXTS, "annotations": TEXTS})

_RULES = closed({"groups": array(closed({"name": TEXT, "rules": array(_RULE)}))})
_MATCHES = array(closed({"path": closed({"type": {"enum": ["Exact", "PathPrefix"]}, "value": TEXT})}))
_BACKENDS = array(closed({"name": TEXT, "port": COUNT}))

SPECS: dict[tuple[str, str], Schema] = {
    ("ray.io/v1", "RayCluster"): _CLUSTER,
    ("ray.io/v1", "RayJob"): closed(
        {"entrypoint": TEXT, "rayClusterSpec": _CLUSTER, "shutdownAfterJobFinishes": {"type": "boolean"}},
        {"submissionMode": {"enum": ["K8sJobMode", "HTTPMode", "SidecarMode"]}, "backoffLimit": COUNT},
    ),
    ("monitoring.coreos.com/v1", "ServiceMonitor"): closed({"selector": _SELECTOR, "endpoints": array(_ENDPOINT)}),
    ("monitoring.coreos.com/v1", "PodMonitor"): closed(
        {"selector": _SELECTOR, "podMetricsEndpoints": array(_ENDPOINT)}
    ),
    ("monitoring.coreos.com/v1", "PrometheusRule"): _RULES,
    ("gateway.networking.k8s.io/v1", "HTTPRoute"): closed(
        {
            "parentRefs": array(closed({"name": TEXT}, {"namespace": TEXT, "sectionName": TEXT})),
            "rules": array(
                closed({"matches": _MATCHES, "backendRefs": _BACKENDS, "timeouts": closed({"request": TEXT})})
            ),
        },
        {"hostnames": array(TEXT)},
    ),
}


def check(manifest: dict[str, Any], version: str) -> None:
    """Raise a ValidationError unless an object is good for this Kubernetes version, strictly."""
    spec = SPECS.get((manifest["apiVersion"], manifest["kind"]))
    if spec is None:
        kubernetes_validate.validate(manifest, version, strict=True)
        return
    metadata = closed({"name": TEXT}, {"namespace": TEXT, "labels": TEXTS, "annotations": TEXTS})
    schema = closed({"apiVersion": TEXT, "kind": TEXT, "metadata": metadata, "spec": spec})
    jsonschema.validate(manifest, schema)
    cluster = manifest["spec"].get("rayClusterSpec", manifest["spec"])
    if "headGroupSpec" in cluster:
        for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
            template = {"apiVersion": "v1", "kind": "PodTemplate", "metadata": {"name": "x"}}
            kubernetes_validate.validate(template | {"template": group["template"]}, version, strict=True)

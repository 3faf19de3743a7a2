# SPDX-License-Identifier: Apache-2.0
"""Closed JSON schemas of the custom resources that the deployment files make.

They hold the fields that we write, by the definitions of KubeRay 1.5 (ray.io/v1, with the rules of its operator's
`ValidateRayClusterSpec`), Prometheus Operator 0.80, Gateway API
1.2, its Inference Extension 1.0 (InferencePool v1, as its API reference lists the fields) and KEDA 2.16 (ScaledObject
v1alpha1, with the metadata that its Prometheus scaler reads), and nothing else, so that a misspelt field is an error.
Pod templates are checked by Kubernetes' own schema.
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


_AUTOSCALER = closed(
    {"version": {"const": "v2"}, "idleTimeoutSeconds": COUNT, "upscalingMode": {"enum": ["Default", "Conservative"]}},
    {"resources": TEMPLATE, "securityContext": TEMPLATE, "imagePullPolicy": TEXT, "env": array(TEMPLATE)}
    | {"volumeMounts": array(TEMPLATE)},
)
_CLUSTER = closed(
    {
        "rayVersion": TEXT,
        "headGroupSpec": closed({"rayStartParams": TEXTS, "template": TEMPLATE}, {"serviceType": TEXT}),
        "workerGroupSpecs": array(
            closed(
                {"groupName": TEXT, "minReplicas": COUNT, "maxReplicas": COUNT}
                | {"rayStartParams": TEXTS | {"not": {"required": ["labels"]}}, "template": TEMPLATE},
                {"replicas": COUNT, "labels": TEXTS},
            )
        ),
    },
    {"authOptions": closed({"mode": {"enum": ["token", "disabled"]}})}
    | {"enableInTreeAutoscaling": {"type": "boolean"}, "autoscalerOptions": _AUTOSCALER},
)
_SELECTOR = closed({"matchLabels": TEXTS})
_ENDPOINT = closed(
    {"port": TEXT, "path": TEXT, "interval": TEXT},
    {"authorization": closed({"type": TEXT, "credentials": closed({"name": TEXT, "key": TEXT})})},
)
_RULE = closed({"alert": TEXT, "expr": TEXT, "for": TEXT, "labels": TEXTS, "annotations": TEXTS})

_RULES = closed({"groups": array(closed({"name": TEXT, "rules": array(_RULE)}))})
_SERVICE = closed({"name": TEXT, "port": COUNT})
_INFERENCE_POOL = closed(
    {"group": {"const": "inference.networking.k8s.io"}, "kind": {"const": "InferencePool"}, "name": TEXT}
)
_MATCH = closed(
    {"path": closed({"type": {"enum": ["Exact", "PathPrefix"]}, "value": TEXT})},
    {"headers": array(closed({"type": {"enum": ["Exact", "RegularExpression"]}, "name": TEXT, "value": TEXT}))},
)
_PORT = closed({"number": {"type": "integer", "minimum": 1, "maximum": 65535}})
_POLICY = closed({"type": {"enum": ["Pods", "Percent"]}, "value": {"type": "integer", "minimum": 1}})
_POLICY["properties"]["periodSeconds"] = {"type": "integer", "minimum": 1, "maximum": 1800}
_SCALING = closed({"policies": array(_POLICY)}, {"stabilizationWindowSeconds": COUNT | {"maximum": 3600}})
_BEHAVIOR = closed({"scaleUp": _SCALING, "scaleDown": _SCALING})
_TRIGGER = closed(
    {
        "type": {"const": "prometheus"},
        "metricType": {"enum": ["AverageValue", "Value"]},
        "metadata": closed(dict.fromkeys(("serverAddress", "query", "threshold"), TEXT)),
    },
    {"authenticationRef": closed({"name": TEXT})},
)

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
                closed(
                    {
                        "matches": array(_MATCH),
                        "backendRefs": array({"oneOf": [_SERVICE, _INFERENCE_POOL]}),
                        "timeouts": closed({"request": TEXT}),
                    }
                )
            ),
        },
        {"hostnames": array(TEXT)},
    ),
    ("inference.networking.k8s.io/v1", "InferencePool"): closed(
        {
            "selector": _SELECTOR,
            "targetPorts": array(_PORT) | {"maxItems": 8},
            "endpointPickerRef": closed(
                {"name": TEXT, "port": _PORT}, {"failureMode": {"enum": ["FailOpen", "FailClose"]}}
            ),
        }
    ),
    ("keda.sh/v1alpha1", "ScaledObject"): closed(
        {
            "scaleTargetRef": closed({"name": TEXT}),
            "minReplicaCount": COUNT,
            "maxReplicaCount": COUNT,
            "pollingInterval": COUNT,
            "triggers": array(_TRIGGER),
        },
        {
            "advanced": closed(
                {
                    "horizontalPodAutoscalerConfig": closed(
                        {"behavior": closed({"scaleUp": _SCALING, "scaleDown": _SCALING})}
                    )
                }
            )
        },
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
        templates = [group["template"] for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"])]
        if "autoscalerOptions" in cluster:
            templates.append(_with_autoscaler(templates[0], cluster["autoscalerOptions"]))
        for pod in templates:
            template = {"apiVersion": "v1", "kind": "PodTemplate", "metadata": {"name": "x"}, "template": pod}
            kubernetes_validate.validate(template, version, strict=True)


def _with_autoscaler(head: dict[str, Any], options: dict[str, Any]) -> dict[str, Any]:
    """The head's pod as KubeRay makes it: with a container of these options."""
    own = ("resources", "securityContext", "imagePullPolicy", "env", "volumeMounts")
    container = {"name": "autoscaler"} | {key: options[key] for key in own if key in options}
    spec = head["spec"] | {"containers": [*head["spec"]["containers"], container]}
    return head | {"spec": spec}

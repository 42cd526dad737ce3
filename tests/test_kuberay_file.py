"""The structure of kuberay.yaml: fields that KubeRay's operator refuses, and fields that it needs."""

from pathlib import Path
from typing import Any

import pytest
import ray
import yaml
from jsonschema import Draft202012Validator

POD = {
    "type": "object",
    "required": ["spec"],
    "additionalProperties": False,
    "properties": {
        "spec": {
            "type": "object",
            "required": ["containers", "serviceAccountName"],
            # No restartPolicy: with autoscaler v2, the operator refuses a restartPolicy.
            "additionalProperties": False,
            "properties": {
                "serviceAccountName": {"const": "distillkac"},
                "nodeSelector": {"type": "object", "additionalProperties": {"type": "string"}},
                "tolerations": {"type": "array"},
                "volumes": {"type": "array"},
                "containers": {
                    "type": "array",
                    "minItems": 1,
                    "maxItems": 1,
                    "items": {
                        "type": "object",
                        "required": ["name", "image", "envFrom", "securityContext", "resources"],
                        "properties": {
                            "securityContext": {
                                "type": "object",
                                "required": [
                                    "allowPrivilegeEscalation",
                                    "capabilities",
                                    "runAsNonRoot",
                                    "seccompProfile",
                                ],
                            },
                            "resources": {"type": "object", "required": ["requests", "limits"]},
                        },
                    },
                },
            },
        }
    },
}
PARAMETERS = {"type": "object", "additionalProperties": {"type": "string"}}
CLUSTER = {
    "type": "object",
    "required": ["rayVersion", "authOptions", "enableInTreeAutoscaling", "headGroupSpec", "workerGroupSpecs"],
    "additionalProperties": False,
    "properties": {
        "rayVersion": {"const": ray.__version__},
        "authOptions": {"const": {"mode": "token"}},
        "enableInTreeAutoscaling": {"const": True},
        "autoscalerOptions": {
            "type": "object",
            "additionalProperties": False,
            "properties": {
                "version": {"const": "v2"},
                "idleTimeoutSeconds": {"type": "integer"},
                "securityContext": {"type": "object"},
            },
        },
        "headGroupSpec": {
            "type": "object",
            "required": ["rayStartParams", "template"],
            "additionalProperties": False,
            "properties": {"serviceType": {"const": "ClusterIP"}, "rayStartParams": PARAMETERS, "template": POD},
        },
        "workerGroupSpecs": {
            "type": "array",
            "items": {
                "type": "object",
                "required": ["groupName", "labels", "minReplicas", "maxReplicas", "rayStartParams", "template"],
                "additionalProperties": False,
                "properties": {
                    "groupName": {"type": "string"},
                    "labels": PARAMETERS,
                    "replicas": {"type": "integer"},
                    "minReplicas": {"const": 0},
                    "maxReplicas": {"type": "integer", "minimum": 1},
                    "rayStartParams": PARAMETERS,
                    "template": POD,
                },
            },
        },
    },
}
JOB = {
    "type": "object",
    "required": ["entrypoint", "activeDeadlineSeconds", "rayClusterSpec"],
    "additionalProperties": False,
    "properties": {
        "entrypoint": {"type": "string"},
        "shutdownAfterJobFinishes": {"const": True},  # otherwise the cluster keeps running and costs money
        "ttlSecondsAfterFinished": {"type": "integer", "minimum": 0},
        "activeDeadlineSeconds": {"type": "integer", "minimum": 1},
        "preRunningDeadlineSeconds": {"type": "integer", "minimum": 1},
        "backoffLimit": {"type": "integer", "minimum": 0},
        "rayClusterSpec": CLUSTER,
    },
}


@pytest.fixture
def items(project_root: Path) -> dict[str, dict[str, Any]]:
    """Return the objects of the file, by kind."""
    listed = yaml.safe_load((project_root / "kuberay.yaml").read_text())
    assert (listed["kind"], listed["apiVersion"]) == ("List", "v1")
    return {item["kind"]: item for item in listed["items"]}


def test_cluster_and_job_match_the_schema_of_kuberay(items: dict[str, dict[str, Any]]):
    Draft202012Validator(CLUSTER).validate(items["RayCluster"]["spec"])
    Draft202012Validator(JOB).validate(items["RayJob"]["spec"])
    assert all(items[kind]["apiVersion"] == "ray.io/v1" for kind in ("RayCluster", "RayJob"))
    assert {kind: item["metadata"]["labels"]["part"] for kind, item in items.items()} == {
        "ConfigMap": "settings",
        "ServiceAccount": "settings",
        "RayCluster": "cluster",
        "RayJob": "job",
    }


def test_worker_groups_match_the_cluster_file(items: dict[str, dict[str, Any]], project_root: Path):
    types = yaml.safe_load((project_root / "cluster.yaml").read_text())["available_node_types"]
    groups = {group["groupName"]: group for group in items["RayCluster"]["spec"]["workerGroupSpecs"]}
    assert set(groups) == set(types) - {"head"}
    for name, group in groups.items():
        assert group["labels"] == types[name]["labels"]
        assert group["maxReplicas"] == types[name]["max_workers"]
        assert "nvidia.com/gpu" in group["template"]["spec"]["containers"][0]["resources"]["limits"]
    selectors = [group["template"]["spec"]["nodeSelector"] for group in groups.values()]
    assert selectors[0] != selectors[1]


def test_every_pod_has_the_settings_and_no_secret(items: dict[str, dict[str, Any]], project_root: Path):
    assert {"AWS_REGION", "DISTILLKAC_CACHE", "MLFLOW_TRACKING_URI"} <= set(items["ConfigMap"]["data"])
    cluster = items["RayCluster"]["spec"]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        (container,) = group["template"]["spec"]["containers"]
        assert container["envFrom"] == [{"configMapRef": {"name": items["ConfigMap"]["metadata"]["name"]}}]
    text = (project_root / "kuberay.yaml").read_text().lower()
    assert "aws_secret" not in text
    assert "aws_access_key" not in text


def test_its_job_is_a_valid_command(items: dict[str, dict[str, Any]]):
    from jobs.parsing import parse
    from pipeline.config import RolloutSpec

    python, dash_m, module, *options = items["RayJob"]["spec"]["entrypoint"].split()
    assert (python, dash_m, module) == ("python", "-m", "jobs.rollout")
    parse(RolloutSpec, options, "rollout")

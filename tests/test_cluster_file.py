"""cluster.yaml is accepted by Ray's launcher (schema, and nodes on a simulated EC2), by bash and by `ray start`."""

import shlex
import subprocess
from pathlib import Path
from typing import Any

import boto3
import pytest
import yaml
from moto import mock_aws
from ray.autoscaler._private.aws.config import bootstrap_aws
from ray.autoscaler._private.aws.node_provider import AWSNodeProvider
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.scripts.scripts import start, stop

COMMANDS = ("setup_commands", "worker_setup_commands", "head_start_ray_commands", "worker_start_ray_commands")


@pytest.fixture
def text(project_root: Path) -> str:
    return (project_root / "cluster.yaml").read_text()


@pytest.fixture
def config(text: str) -> dict[str, Any]:
    return yaml.safe_load(text)


def settings_of(config: dict[str, Any]) -> dict[str, str]:
    """Return the environment variables of the nodes, read from the command that writes them."""
    lines = config["metadata"]["settings"].splitlines()
    return dict(line.split("=", 1) for line in lines if "=" in line)


def test_the_cluster_file_is_valid(config: dict[str, Any]):
    prepared = prepare_config(config)
    validate_config(prepared)
    types = prepared["available_node_types"]
    head = types.pop(prepared["head_node_type"])
    assert head["resources"] == {"CPU": 0}
    assert set(types) == {"spot", "on-demand"}
    for name, workers in types.items():
        assert workers["min_workers"] == 0
        assert workers["resources"]["GPU"] >= 1
        assert workers["labels"] == {"market": name}
        assert ("InstanceMarketOptions" in workers["node_config"]) == (name == "spot")


@mock_aws
def test_the_launcher_starts_its_nodes(config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", str(tmp_path))  # the launcher writes its SSH key there
    (tmp_path / ".ssh").mkdir()
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "simulated")
    monkeypatch.delenv("AWS_ENDPOINT_URL", raising=False)  # other tests set this variable to their own server
    region, profiles = config["provider"]["region"], config["metadata"]
    for name in ("head_profile", "worker_profile"):
        boto3.client("iam", region).create_instance_profile(InstanceProfileName=profiles[name])
    image = boto3.client("ec2", region).describe_images()["Images"][0]["ImageId"]
    for node in config["available_node_types"].values():
        node["node_config"]["ImageId"] = image
    prepared = bootstrap_aws(prepare_config(config))
    provider = AWSNodeProvider(prepared["provider"], config["cluster_name"])
    for name, node in prepared["available_node_types"].items():
        tags = {"ray-user-node-type": name, "ray-node-name": name}
        started = provider.create_node_with_resources_and_labels(
            node["node_config"], tags, 1, node["resources"], node.get("labels", {})
        )
        (instance,) = (found if isinstance(found, dict) else found.meta.data for found in started.values())
        assert (instance.get("InstanceLifecycle") == "spot") == (name == "spot")
        profile = profiles["head_profile" if name == "head" else "worker_profile"]
        assert instance["IamInstanceProfile"]["Arn"].endswith(f"/{profile}")


def test_the_values_to_fill_in_are_at_the_top(text: str, config: dict[str, Any]):
    head, rest = text.split("\ncluster_name:")
    assert head.count("FILL-IN") == 3
    assert "FILL-IN" not in rest
    assert config["provider"]["region"] == settings_of(config)["AWS_REGION"]
    assert config["setup_commands"][0] == config["metadata"]["settings"]
    profiles = {
        name: node["node_config"]["IamInstanceProfile"] for name, node in config["available_node_types"].items()
    }
    assert profiles.pop("head") == {"Name": config["metadata"]["head_profile"]}
    assert all(profile == {"Name": config["metadata"]["worker_profile"]} for profile in profiles.values())


def test_its_commands_are_valid_for_bash_and_ray(config: dict[str, Any]):
    known = {option for parameter in (*start.params, *stop.params) for option in parameter.opts}
    seen = []
    for command in (command for name in COMMANDS for command in config[name]):
        checked = subprocess.run(["bash", "-n", "-c", command], capture_output=True, text=True, check=False)
        assert (checked.returncode, checked.stderr) == (0, ""), command
        if "ray start" in command or "ray stop" in command:
            words = shlex.split(command.rpartition(";")[2])
            seen.append((words[1], {word.partition("=")[0] for word in words[2:]}))
    assert [verb for verb, _ in seen] == ["stop", "start"] * 2
    options = set().union(*(names for _, names in seen))
    assert options <= known
    assert {"--head", "--address", "--autoscaling-config"} <= options


def test_its_settings_reach_the_processes_of_ray(config: dict[str, Any], tmp_path: Path):
    """The test writes and reads the settings file as the nodes do, with a fake `ray` that prints its environment."""
    (tmp_path / ".venv/bin").mkdir(parents=True)
    ray = tmp_path / ".venv/bin/ray"
    ray.write_text('#!/bin/bash\necho "$1 $RAY_AUTH_MODE $MLFLOW_TRACKING_URI"\n')
    ray.chmod(0o755)
    environment = {"HOME": str(tmp_path), "PATH": "/usr/bin:/bin", "RAY_HEAD_IP": "10.0.0.1"}
    for commands in (config["head_start_ray_commands"], config["worker_start_ray_commands"]):
        script = "\n".join([config["metadata"]["settings"], "ulimit() { :; }", *commands])
        printed = subprocess.run(["bash", "-c", script], env=environment, capture_output=True, text=True, check=True)
        uri = settings_of(config)["MLFLOW_TRACKING_URI"]
        assert printed.stdout.splitlines()[-1] == f"start token {uri}"


def test_the_token_is_a_mounted_file_and_not_in_the_config(text: str, config: dict[str, Any]):
    assert config["file_mounts"]["/home/ubuntu/.ray/auth_token"] == "~/.ray/auth_token"
    assert settings_of(config)["RAY_AUTH_MODE"] == "token"
    assert not [name for name in ("AWS_SECRET", "AWS_ACCESS_KEY", "RAY_AUTH_TOKEN") if name in text.upper()]
    assert "--dashboard-host=127.0.0.1" in text
    assert "0.0.0.0" not in text

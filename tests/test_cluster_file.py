"""cluster.yaml against the schema that Ray's launcher uses."""

from pathlib import Path

import yaml
from ray.autoscaler._private.util import prepare_config, validate_config


def test_the_cluster_file_is_valid(project_root: Path):
    config = prepare_config(yaml.safe_load((project_root / "cluster.yaml").read_text()))
    validate_config(config)
    workers = config["available_node_types"]["gpu_worker"]
    assert workers["min_workers"] == 0
    assert workers["resources"]["GPU"] >= 1
    assert "GPU" not in config["available_node_types"][config["head_node_type"]]["resources"]


def test_the_cluster_file_holds_no_secret(project_root: Path):
    text = (project_root / "cluster.yaml").read_text().lower()
    assert "secret" not in text
    assert "aws_access_key" not in text

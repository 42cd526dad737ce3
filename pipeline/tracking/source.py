"""What a run was made with: the command, the commit, the user, and the data."""

import functools
import getpass
import json
import subprocess
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
DIGEST_LENGTH = 16
"""Hexadecimal digits of a digest: MLflow's databases take 36 at most."""


class Dataset(NamedTuple):
    """Data that a run read: a data set, or a store."""

    name: str
    digest: str  # sha256 or fingerprint of the content
    path: str  # a path or URI, or what else says where it comes from
    context: str = "training"

    def values(self) -> dict[str, str]:
        """As MLflow takes it."""
        return {
            "name": self.name,
            "digest": self.digest[:DIGEST_LENGTH],
            "source_type": self.path.partition("://")[0] if "://" in self.path else "local",
            "source": json.dumps({"uri": self.path}),
            "context": self.context,
        }


def source_tags(stage: str) -> dict[str, str]:
    """MLflow's own tags: they fill its column Source."""
    tags = {"mlflow.source.name": f"python -m jobs.{stage}", "mlflow.source.type": "LOCAL"}
    if user := _user():
        tags["mlflow.user"] = user
    if commit := _commit():
        tags["mlflow.source.git.commit"] = commit
    return tags


@functools.cache
def _commit() -> str:
    """The commit that is checked out; empty if this is no checkout."""
    if not (ROOT / ".git").exists():
        return ""
    try:
        asked = ["git", "-C", str(ROOT), "rev-parse", "HEAD"]
        found = subprocess.run(asked, capture_output=True, text=True, check=False, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return found.stdout.strip() if found.returncode == 0 else ""


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's user without a name
        return ""

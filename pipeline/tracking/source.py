"""Where a run comes from: the command, the commit, the user and the data."""

import functools
import getpass
import json
import subprocess
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
DIGEST_LENGTH = 16
"""Hexadecimal digits of a digest. MLflow's databases accept at most 36."""


class Dataset(NamedTuple):
    """Data that a run reads: a dataset or a store."""

    name: str
    digest: str  # SHA-256 or fingerprint of the content
    path: str  # path, URI or other description of the source
    context: str = "training"

    def values(self) -> dict[str, str]:
        """The fields of MLflow's ``Dataset``."""
        return {
            "name": self.name,
            "digest": self.digest[:DIGEST_LENGTH],
            "source_type": self.path.partition("://")[0] if "://" in self.path else "local",
            "source": json.dumps({"uri": self.path}),
            "context": self.context,
        }


def source_tags(stage: str) -> dict[str, str]:
    """MLflow's own tags for the source of a run, which its pages show."""
    tags = {"mlflow.source.name": f"python -m jobs.{stage}", "mlflow.source.type": "LOCAL"}
    if user := _user():
        tags["mlflow.user"] = user
    if commit := _commit():
        tags["mlflow.source.git.commit"] = commit
    return tags


@functools.cache
def _commit() -> str:
    """The checked-out commit; empty outside of a git checkout."""
    if not (ROOT / ".git").exists():
        return ""
    try:
        command = ["git", "-C", str(ROOT), "rev-parse", "HEAD"]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # in a container, the user may have no name
        return ""

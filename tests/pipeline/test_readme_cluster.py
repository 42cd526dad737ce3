"""The documented commands for a cluster of one machine work unchanged in a fresh clone with its own home folder.

The last command is `ray stop`, which stops every Ray that it sees. Therefore the commands run in their own namespaces
(processes, mounts, network), which needs Linux and root.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from mlflow import MlflowClient

from pipeline.store import manifest

pytestmark = [pytest.mark.ray, pytest.mark.cluster, pytest.mark.slow]

TIMEOUT_SECONDS = 1200
LIGHT_SERVER = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
"""Settings that stop MLflow's server from starting eight processes for its own jobs."""
NAMESPACES = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc", "--mount", "--net"]
SETUP = "ip link set lo up && mkdir -p /tmp/ray && mount -t tmpfs tmpfs /tmp/ray"


def can_isolate() -> bool:
    if not (shutil.which("unshare") and shutil.which("ip")):
        return False
    return subprocess.run([*NAMESPACES, "bash", "-c", SETUP], capture_output=True, check=False).returncode == 0


def commands_of(readme: str) -> str:
    """Return the bash blocks of the section "One machine"."""
    (section,) = re.findall(r"^## One machine\n(.*?)^## ", readme, re.MULTILINE | re.DOTALL)
    return "\n".join(re.findall(r"^```bash\n(.*?)^```", section, re.MULTILINE | re.DOTALL))


@pytest.fixture
def clone(project_root: Path, tmp_path: Path) -> Path:
    """A fresh clone, in which `make setup` finds the environment of these tests."""
    installed = Path(sys.prefix) / "installed"
    if not installed.exists():
        pytest.skip("the environment of these tests was not created by make setup")
    folder = tmp_path / "clone"
    subprocess.run(["git", "clone", "--quiet", str(project_root), str(folder)], check=True)
    (folder / ".venv").symlink_to(sys.prefix)
    for name in ("requirements.lock", "pyproject.toml"):
        os.utime(folder / name, (0, 0))  # older than the installation, so that make does not repeat it
    return folder


@pytest.mark.skipif(not can_isolate(), reason="needs root, unshare and ip")
def test_the_readme_commands_for_one_machine_work(clone: Path, tmp_path: Path):
    script = f"{SETUP}\nset -euo pipefail\n{commands_of((clone / 'pipeline/CLUSTER.md').read_text())}"
    home = tmp_path / "home"
    home.mkdir()
    environment = {"PATH": os.environ["PATH"], "HOME": str(home), "LANG": "C.UTF-8", **LIGHT_SERVER}
    done = subprocess.run(
        [*NAMESPACES, "bash", "-c", script],
        cwd=clone,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=TIMEOUT_SECONDS,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-20_000:]
    out = clone / "runs/cluster"
    assert (home / ".ray/auth_token").stat().st_mode & 0o077 == 0
    assert (out / "student/config.json").exists()
    assert manifest.read_manifest(str(out / "store")) is not None

    client = MlflowClient(f"sqlite:///{out / 'mlflow.db'}")
    runs = client.search_runs([experiment.experiment_id for experiment in client.search_experiments()])
    statuses = sorted((run.data.tags["distillkac.stage"], run.info.status) for run in runs)
    # The stopped rollout resumes the earlier run, because it extends the same store.
    assert statuses == [("distill", "FINISHED"), ("rollout", "KILLED"), ("teach", "FINISHED")]

    assert "python -m jobs.rollout: error: terminated" in done.stdout
    assert "SIGTERM received" not in done.stdout, "Ray printed its stack trace"
    # A job's log ends before the next line of `ray job submit`, which begins with a time and a tab.
    one_log = r"^Running entrypoint for job raysubmit_.*?(?=^\d{4}-\d\d-\d\d \S+\t)"
    logs = re.findall(one_log, done.stdout, re.MULTILINE | re.DOTALL)
    assert len(logs) == 3
    for log in logs:
        lines = log.splitlines()
        assert len(lines) < 100
        assert "\x1b" not in log
        assert len(set(lines)) == len(lines), "no line is repeated"
        assert ": wrote " in lines[-1], "the last line is the result"

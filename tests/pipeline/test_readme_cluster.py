"""The README's commands for a cluster of one machine, word for word, in a fresh clone with a home folder of its own.

They end in `ray stop`, which ends every Ray that it sees: so they run in namespaces of their own (processes, mounts,
network), for which Linux and root's rights are needed.
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

TIMEOUT_SECONDS = 1200
LIGHTER = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
"""Without the eight processes that MLflow's server starts for jobs of its own."""
NAMESPACES = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc", "--mount", "--net"]
ALONE = "ip link set lo up && mkdir -p /tmp/ray && mount -t tmpfs tmpfs /tmp/ray"


def can_be_alone() -> bool:
    if not (shutil.which("unshare") and shutil.which("ip")):
        return False
    return subprocess.run([*NAMESPACES, "bash", "-c", ALONE], capture_output=True, check=False).returncode == 0


def commands_of(readme: str) -> str:
    """The bash blocks below the heading "One machine"."""
    (section,) = re.findall(r"^### One machine\n(.*?)^### ", readme, re.MULTILINE | re.DOTALL)
    return "\n".join(re.findall(r"^```bash\n(.*?)^```", section, re.MULTILINE | re.DOTALL))


@pytest.fixture
def clone(project_root: Path, tmp_path: Path) -> Path:
    """A fresh clone, for which `make setup` finds the environment that these tests run in."""
    installed = Path(sys.prefix) / "installed"
    if not installed.exists():
        pytest.skip("the tests run in an environment that make setup has not made")
    folder = tmp_path / "clone"
    subprocess.run(["git", "clone", "--quiet", str(project_root), str(folder)], check=True)
    (folder / ".venv").symlink_to(sys.prefix)
    for name in ("requirements.lock", "pyproject.toml"):
        os.utime(folder / name, (0, 0))  # older than what was installed
    return folder


@pytest.mark.skipif(not can_be_alone(), reason="no rights to make namespaces, or no unshare and ip")
def test_the_commands_for_one_machine_do_what_the_readme_says(clone: Path, tmp_path: Path):
    script = f"{ALONE}\nset -euo pipefail\n{commands_of((clone / 'README.md').read_text())}"
    home = tmp_path / "home"
    home.mkdir()
    environment = {"PATH": os.environ["PATH"], "HOME": str(home), "LANG": "C.UTF-8", **LIGHTER}
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
    # The rollout that is stopped goes on in the run of the one before: it makes the same store larger.
    assert statuses == [("distill", "FINISHED"), ("rollout", "KILLED"), ("teach", "FINISHED")]

    assert "python -m jobs.rollout: error: terminated: run the same command again to go on" in done.stdout
    assert "SIGTERM received" not in done.stdout, "Ray's stack"
    # A job's log ends where the next line of `ray job submit` itself begins: a time and a tab.
    one_log = r"^Running entrypoint for job raysubmit_.*?(?=^\d{4}-\d\d-\d\d \S+\t)"
    logs = re.findall(one_log, done.stdout, re.MULTILINE | re.DOTALL)
    assert len(logs) == 3
    for log in logs:
        lines = log.splitlines()
        assert len(lines) < 100
        assert "\x1b" not in log
        assert len(set(lines)) == len(lines), "nothing is said twice"
        assert ": wrote " in lines[-1], "the result comes last"

"""The same command resumes a sweep whose driver was killed: each trial has one ended run and keeps its metrics."""

import random
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from pipeline.sweep import Ledger
from tests.pipeline.running import ROOT, WAIT_SECONDS
from tests.pipeline.stages import runs_of

pytestmark = [pytest.mark.ray, pytest.mark.slow]

SPACES = {
    "grid": ["--grid", "steps=1,2", "guidance=0,1"],
    "optuna": ["--search", "optimizer.learning-rate=loguniform(1e-3,1e-2)", "--trials", "4", "--asha-metric", "loss"],
    "teach": ["--stage", "teach", "--data", "moons", "--grid", "path.a=9,25", "path.c=2,5"],
}


def start(store: str, out: Path, space: list[str]) -> "subprocess.Popen[bytes]":
    training = ["--optimizer.updates", "400", "--optimizer.batch-size", "64", "--checkpoint-updates", "50"]
    inputs = [] if "teach" in space else ["--store", store]
    options = [*inputs, "--out", str(out), "--samples", "0", *training, *space]
    with Path(f"{out}.log").open("ab") as log:
        return subprocess.Popen([sys.executable, "-m", "jobs.sweep", *options], cwd=ROOT, stdout=log, stderr=log)


@pytest.mark.parametrize("space", SPACES)
def test_a_sweep_resumes_after_its_driver_was_killed(space: str, small_store: str, tmp_path: Path):
    out = tmp_path / "sweep"
    driver = start(small_store, out, SPACES[space])
    deadline = time.monotonic() + WAIT_SECONDS
    while not list(out.glob("trials/*.json")) and driver.poll() is None and time.monotonic() < deadline:
        time.sleep(0.1)
    assert driver.poll() is None, Path(f"{out}.log").read_text()
    time.sleep(random.uniform(0, 12))
    started = psutil.Process(driver.pid).children(recursive=True)
    driver.kill()
    driver.wait()
    for process in psutil.wait_procs(started, timeout=60)[1]:
        process.kill()
    before = Ledger(str(out)).records
    assert start(small_store, out, SPACES[space]).wait(WAIT_SECONDS) == 0, Path(f"{out}.log").read_text()

    records = Ledger(str(out)).records
    assert [(r.status, r.updates) for r in records] == [("finished", 400)] * 4
    for old, new in zip(before, records, strict=False):
        assert (old.number, old.name, old.values) == (new.number, new.name, new.values)
        assert old.status != "finished" or old == new, "finished trials do not change"
    (parent,) = [run for run in runs_of("sweep") if run.data.params["out"] == str(out)]
    stage = "teach" if space == "teach" else "distill"
    children = [run for run in runs_of(stage) if run.data.params["out"].startswith(f"{out}/")]
    assert len(children) == 4, "one child per trial"
    assert {run.data.tags["mlflow.parentRunId"] for run in children} == {parent.info.run_id}
    assert {run.info.status for run in (parent, *children)} == {"FINISHED"}
    assert {run.data.params["out"]: run.data.metrics["loss"] for run in children} == pytest.approx(
        {record.out: record.metrics["loss"] for record in records}, rel=0.5
    )

"""Only one job at a time writes a folder: a second job is refused, and a job that lost its folder stops."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from kac.util import files
from kac.util.errors import DistillKacError
from pipeline import claims, outputs, training
from pipeline.distill import distill
from pipeline.teach import teach
from pipeline.tracking import process_tags
from tests.pipeline.s3_server import FaultyS3, environment
from tests.pipeline.stages import DIVERGING, distill_spec, teach_spec

# Set when the tests are collected, before any test starts Ray, because Ray's workers inherit the environment.
os.environ.update(environment())

ENDLESS = teach_spec(Path("unused")).optimizer.model_copy(update={"updates": 10**7})

JOB = """
import sys
from kac.util.log import show
from pipeline.teach import teach
from pipeline.config import TeachSpec
show()
teach(TeachSpec.model_validate_json(sys.argv[1]))
"""


@pytest.fixture(params=["disk", pytest.param("s3", marks=pytest.mark.s3)])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty local folder or an empty S3 prefix."""
    if request.param == "disk":
        return str(tmp_path)
    server: FaultyS3 = request.getfixturevalue("s3_server")
    server.client().create_bucket(Bucket="claims")
    return f"s3://claims/{tmp_path.name}"


@pytest.fixture
def job(tmp_path: Path, project_root: Path) -> Iterator["subprocess.Popen[str]"]:
    """An endless training run that has claimed its folder ``out``."""
    spec = teach_spec(tmp_path / "out", optimizer=ENDLESS, checkpoint_updates=10**7)
    command = [sys.executable, "-u", "-c", JOB, spec.model_dump_json()]
    with subprocess.Popen(command, cwd=project_root, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            assert any("in this process" in line for line in process.stdout)  # printed after the claim
            yield process
        finally:
            process.kill()


def claim_from_elsewhere(out: str) -> str:
    """Claim the folder as a process on another machine would, and return the token."""
    record = {**process_tags.tags(), "token": "theirs", process_tags.HOST_TAG: "another-machine"}
    files.write_bytes(files.join(out, claims.CLAIM_FILE), json.dumps(record).encode())
    return "theirs"


@pytest.mark.parametrize("sign", [signal.SIGKILL, signal.SIGTERM])
def test_a_second_job_is_refused_at_its_start_until_the_first_is_killed(
    sign: signal.Signals, job: "subprocess.Popen[str]", tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(training, "train_model", lambda *_: pytest.fail("the second job trains"))
    out, spec = str(tmp_path / "out"), teach_spec(tmp_path / "out", optimizer=ENDLESS)
    before = (tmp_path / "out" / "spec.json").read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(claims, "WAIT_SECONDS", 0.0)
        for second in (spec, spec.model_copy(update={"seed": 1})):
            with pytest.raises(DistillKacError, match=rf"/out: .*process {job.pid} on "):
                teach(second)
    assert (tmp_path / "out" / "spec.json").read_bytes() == before
    os.kill(job.pid, sign)
    assert outputs.begin(out, spec, "config.json")
    assert claims.token_of(out)
    claims.release(out)


def test_a_job_on_another_machine_takes_over_the_folder(folder: str):
    claims.take(folder)
    mine = claims.token_of(folder)
    claims.check(folder, mine)
    theirs = claim_from_elsewhere(folder)
    with pytest.raises(DistillKacError, match=r"process \d+ on another-machine"):
        claims.check(folder, mine)
    claims.release(folder)
    claims.check(folder, theirs)  # the other job's claim remains
    claims.take(folder)
    with pytest.raises(DistillKacError, match="taken over this folder"):
        claims.check(folder, theirs)
    claims.release(folder)
    assert files.names_in(folder) == []
    with pytest.raises(DistillKacError, match="another job has taken over"):
        claims.check(folder, mine)  # the other job has finished and removed its claim


def test_a_damaged_claim_is_ignored(tmp_path: Path):
    (tmp_path / claims.CLAIM_FILE).write_text("{")
    claims.take(str(tmp_path))
    claims.release(str(tmp_path))
    assert not (tmp_path / claims.CLAIM_FILE).exists()


def test_a_training_run_that_lost_its_folder_stops_at_its_next_checkpoint(tmp_path: Path, small_store: str):
    out, seen = tmp_path / "out", []

    def report(metrics: dict[str, float]) -> None:
        seen.append(metrics["update"])
        claim_from_elsewhere(str(out))

    spec = distill_spec(small_store, out, checkpoint_updates=10, validation_updates=0)
    with pytest.raises(DistillKacError, match="taken over this folder"):
        distill(spec, on_report=report)
    assert seen == [10.0]
    assert not (out / "model.safetensors").exists()


def test_a_training_run_on_workers_that_lost_its_folder_stops(
    tmp_path: Path, ray_cluster: None, monkeypatch: pytest.MonkeyPatch
):
    """The workers check the driver's claim."""
    take = claims.take

    def take_and_lose(out: str) -> None:
        take(out)
        claim_from_elsewhere(out)

    monkeypatch.setattr(claims, "take", take_and_lose)
    with pytest.raises(DistillKacError, match="taken over this folder"):
        teach(teach_spec(tmp_path / "out", workers=1, checkpoint_updates=10))
    assert not (tmp_path / "out" / "model.safetensors").exists()


def test_the_claim_is_removed_at_the_end(tmp_path: Path):
    with pytest.raises(DistillKacError, match="loss"):
        teach(teach_spec(tmp_path / "out", optimizer=DIVERGING))
    assert not (tmp_path / "out" / claims.CLAIM_FILE).exists()
    teach(teach_spec(tmp_path / "out"))
    assert not (tmp_path / "out" / claims.CLAIM_FILE).exists()

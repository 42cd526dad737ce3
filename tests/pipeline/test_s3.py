"""All stages with s3:// paths, on moto behind a proxy that injects typical faults of S3.

The stores on S3 must equal local reference stores.
"""

import contextlib
import io
import os
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import ray

from jobs import command
from kac.util import files, probes
from kac.util.errors import DistillKacError
from pipeline.config import (
    DistillSpec,
    EvaluateSpec,
    OptimizerConfig,
    RolloutSpec,
    SampleSpec,
    SweepSpec,
    TeachSpec,
)
from pipeline.distill import distill
from pipeline.evaluate.evaluate_stage import evaluate
from pipeline.rollout import RolloutError, actors, make_plan, rollout
from pipeline.rollout.shard_maker import ShardMaker
from pipeline.sample import sample
from pipeline.store.layout import Shard
from pipeline.store.manifest import list_shards, read_manifest
from pipeline.store.shards import read_rows
from pipeline.sweep import sweep
from pipeline.teach import teach
from tests.pipeline import faulty
from tests.pipeline.compare import assert_same_store, list_files
from tests.pipeline.running import SHARDS, Summary, running_job, spec_of
from tests.pipeline.s3_server import ACCESS_KEY_ID, SECRET_ACCESS_KEY, SERVER, Fault, FaultKind, FaultyS3, environment
from tests.pipeline.stores import make_teacher

# Set at collection, before any test starts Ray, because the workers inherit the environment.
os.environ.update(environment())

BUCKET = "kac-bucket"


@pytest.fixture(scope="module", autouse=True)
def bucket(s3_server: FaultyS3) -> str:
    s3_server.client().create_bucket(Bucket=BUCKET)
    return BUCKET


@pytest.fixture(scope="module")
def teacher(bucket: str) -> str:
    """A teacher on S3."""
    return make_teacher(f"s3://{bucket}/teacher")


@pytest.fixture(scope="module")
def reference(teacher: str, ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> str:
    store = str(tmp_path_factory.mktemp("reference") / "store")
    rollout(spec_of(teacher, store))
    return store


@pytest.fixture
def store(bucket: str, request: pytest.FixtureRequest) -> str:
    return f"s3://{bucket}/{request.node.name}"


def test_transient_errors_of_s3_are_retried(teacher: str, reference: str, store: str) -> None:
    """The driver and the actors retry after 503 errors, broken connections and truncated replies."""
    faults = [
        Fault("slow_down", probability=0.04),
        Fault("reset", probability=0.04),
        Fault("truncate", ("GET",), probability=0.1),
    ]
    with SERVER.failing(*faults):
        rollout(spec_of(teacher, store))
    assert all(fault.injected for fault in faults), faults
    assert_same_store(store, reference)


def test_a_shard_whose_put_reply_is_lost_counts(teacher: str, reference: str, store: str) -> None:
    """S3 stores the shard, but the writer gets no reply and retries. The retry finds the shard."""
    fault = Fault("lose_reply", ("PUT",), path="shard-", count=5)
    with SERVER.failing(fault):
        rollout(spec_of(teacher, store))
    assert fault.injected == 5
    assert_same_store(store, reference)


def test_a_shard_that_s3_always_refuses(
    teacher: str, reference: str, store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After its retries, the rollout names the shard in an error. Without the fault, the same command succeeds."""
    spec = spec_of(teacher, store)
    name = Shard(1.0, 3, 96, 32).name
    fault = Fault("slow_down", ("PUT",), path=name.rsplit("=", 1)[-1])
    with monkeypatch.context() as patch, SERVER.failing(fault):
        patch.setattr(actors, "ShardActor", faulty.ImpatientActor)
        with pytest.raises(RolloutError, match=rf"{store}/{name}\b.*reduce your request rate"):
            rollout(spec)
    assert 0 < fault.injected <= 2 * faulty.S3_ATTEMPTS**2  # at most two actors tried
    existing = list_shards(store)
    assert name not in existing
    assert read_manifest(store) is None
    requests = len(SERVER.requests)
    rollout(spec)
    written = {path for method, path in SERVER.requests[requests:] if method == "PUT" and "shard-" in path}
    assert len(written) == SHARDS - len(existing)
    assert_same_store(store, reference)


def test_an_unfinished_upload_is_not_a_shard(teacher: str, reference: str, store: str, bucket: str) -> None:
    """A writer that is killed while it uploads a large shard leaves an unfinished upload."""
    s3, shard = SERVER.client(), Shard(0.0, 2, 64, 32)
    key = files.join(store, shard.name).removeprefix(f"s3://{bucket}/")
    upload = s3.create_multipart_upload(Bucket=bucket, Key=key)["UploadId"]
    s3.upload_part(Bucket=bucket, Key=key, UploadId=upload, PartNumber=1, Body=b"half a shard" * 500_000)
    assert list_shards(store) == {}
    rollout(spec_of(teacher, store))
    assert_same_store(store, reference)


def test_two_jobs_finish_after_a_killed_driver(teacher: str, reference: str, store: str, tmp_path: Path) -> None:
    """One driver is killed during the rollout. Two other jobs then finish it concurrently."""
    spec = spec_of(teacher, store, actors=1)
    address = ray.get_runtime_context().gcs_address
    with running_job(["jobs.rollout"], spec, address, tmp_path / "killed.log") as job:
        while len(list_shards(store)) < 3:
            assert not job.is_over(), job.output()
            time.sleep(0.02)
        job.kill_driver()
    existing = list_shards(store)
    assert 3 <= len(existing) < SHARDS
    assert read_manifest(store) is None
    before = {name: files.read_bytes(files.join(store, name)) for name in existing}
    with (
        running_job(["jobs.rollout"], spec, address, tmp_path / "one.log") as one,
        running_job(["jobs.rollout"], spec, address, tmp_path / "other.log") as other,
    ):
        outputs = [one.finish(), other.finish()]
    assert {name: files.read_bytes(files.join(store, name)) for name in existing} == before
    assert all(Summary(output).reused_shards >= len(existing) for output in outputs)
    assert_same_store(store, reference)


def test_the_first_writer_wins(store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """S3 checks for the object in the PUT itself, so a concurrent writer is detected."""
    path = files.join(store, "object")
    fs = files.locate(path).fs
    assert files.write_bytes(path, b"first", if_absent=True)
    answers, exists = [False], fs.exists
    monkeypatch.setattr(fs, "exists", lambda path: answers.pop() if answers else exists(path))
    assert not files.write_bytes(path, b"second", if_absent=True)
    assert not answers
    assert files.read_bytes(path) == b"first"


def test_the_number_of_s3_requests_per_shard(teacher: str, store: str) -> None:
    """The documentation multiplies these numbers by a hundred thousand shards. A large shard is sent in parts."""
    spec = spec_of(teacher, store).model_copy(update={"actors": 0})
    plan = make_plan(spec)
    maker, shard = ShardMaker(spec, plan.identity), plan.todo[0]

    def count_requests(work: Callable[[], object]) -> Counter[str]:
        before = len(SERVER.requests)
        work()
        return Counter("LIST" if "list-type" in path else method for method, path in SERVER.requests[before:])

    assert count_requests(lambda: maker.make(shard)) == {"HEAD": 2, "LIST": 2, "PUT": 1}
    knots = plan.identity.knot_columns
    columns = ["label", knots[0], knots[-1]]
    # One request for the footer and one for all columns, which are adjacent in a small shard.
    assert count_requests(lambda: read_rows(store, plan.identity, shard, columns)) == {"HEAD": 1, "GET": 2}


def test_an_evaluation_caches_its_samples_on_s3(bucket: str, teacher: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DISTILLKAC_CACHE", f"s3://{bucket}/cache")
    first, again = (
        EvaluateSpec(teacher=teacher, out=f"s3://{bucket}/{name}", samples=40, solver_steps=4, actors=0)
        for name in ("first", "again")
    )
    scores = evaluate(first)
    cached = list_files(f"s3://{bucket}/cache")
    assert {name.split("/")[0] for name in cached} == {"classifiers", "features", "reference", "samples"}
    assert evaluate(again) == scores
    assert list_files(f"s3://{bucket}/cache") == cached


def test_every_stage_works_on_s3_and_leaks_no_key(
    bucket: str, ray_cluster: None, tracking_database: str, capfd: pytest.CaptureFixture[str]
) -> None:
    """All outputs are on S3, including those of Ray Train and Ray Tune. The access keys appear nowhere."""
    root = f"s3://{bucket}/chain"
    paths = {
        name: f"{root}/{name}" for name in ("teacher", "store", "student", "student-on-ray", "sweep", "evaluation")
    }
    quick = OptimizerConfig(updates=20, batch_size=32)
    teach(TeachSpec(data="digits", out=paths["teacher"], optimizer=quick, workers=0))
    rollout(
        RolloutSpec(
            teacher=paths["teacher"], store=paths["store"], trajectories=96, shard_size=32, solver_steps=20, actors=1
        )
    )
    distill(DistillSpec(store=paths["store"], out=paths["student"], optimizer=quick, workers=0))
    distill(DistillSpec(store=paths["store"], out=paths["student-on-ray"], optimizer=quick, workers=1))
    sweep(SweepSpec(store=paths["store"], out=paths["sweep"], steps=(1,), optimizer=quick))
    students = (paths["student"], paths["student-on-ray"], paths["sweep"])
    evaluate(
        EvaluateSpec(teacher=paths["teacher"], students=students, out=paths["evaluation"], samples=100, solver_steps=20)
    )
    sample(SampleSpec(model=paths["student"], out=f"{root}/sample.png", count=4))
    outputs = list_files(root)
    for name in (
        "teacher/config.json",
        "student/config.json",
        "student-on-ray/config.json",
        "sweep/trials.json",
        "sample.png",
    ):
        assert name in outputs
    assert {"evaluation/evaluation.json", "evaluation/samples.png"} <= set(outputs)
    assert [name for name in outputs if "training/" in name or name.endswith(".tmp")] == []

    refusals = []
    for methods, where in (((), paths["teacher"]), (("PUT",), f"{root}/other")):
        with SERVER.failing(Fault("refuse_key", methods)):
            refusals.append(_refusal("--teacher", paths["teacher"], "--store", f"{root}/other"))
        assert where in refusals[-1]
        assert len(refusals[-1].strip().splitlines()) == 1, refusals[-1]

    printed = "".join([*capfd.readouterr(), *refusals])
    sources = {"printed output": printed.encode(), **_objects(bucket), **_local_files(tracking_database)}
    assert any(name.endswith("mlflow.db") for name in sources)
    assert any("worker" in name and name.endswith((".out", ".err")) for name in sources), "no logs of Ray's workers"
    keys = (ACCESS_KEY_ID.encode(), SECRET_ACCESS_KEY.encode())
    assert [name for name, data in sources.items() for key in keys if key in data] == []


@pytest.mark.parametrize(
    ("fault", "path", "problem"),
    [
        (None, "s3://no-such-bucket/store", "the bucket no-such-bucket"),
        ("refuse_key", f"s3://{BUCKET}/store", "The AWS Access Key Id"),
        ("deny", f"s3://{BUCKET}/store", "Access Denied"),
        ("reset", f"s3://{BUCKET}/store", "http://127.0.0.1:"),
        ("slow_down", f"s3://{BUCKET}/store", "reduce your request rate"),
    ],
)
def test_refusals_of_s3_are_reported_after_few_requests(
    fault: FaultKind | None, path: str, problem: str, tmp_path: Path
) -> None:
    """Two probes send fewer requests than a single write during a rollout, which is tried twenty times."""
    requests = len(SERVER.requests)
    with SERVER.failing(*([Fault(fault)] if fault else [])):
        refusal = _refusal("--teacher", str(tmp_path), "--store", path)
        with pytest.raises(DistillKacError, match=problem):
            probes.check_writable(path)
    assert path in refusal
    assert problem in refusal
    assert len(refusal.strip().splitlines()) == 1
    assert len(SERVER.requests) - requests < 20


def test_probing_a_writable_path_leaves_no_file(bucket: str) -> None:
    probes.check_writable(f"s3://{bucket}/probed")
    assert list_files(f"s3://{bucket}/probed") == []


def _refusal(*options: str) -> str:
    """Return the standard error of `python -m jobs.rollout`, which exits with 1."""
    stderr = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stderr(stderr):
        patch.setattr(sys, "argv", ["jobs.rollout", *options])
        with pytest.raises(SystemExit) as stop:
            command.main(RolloutSpec, rollout)
    assert stop.value.code == 1
    return stderr.getvalue()


def _objects(bucket: str) -> dict[str, bytes]:
    """Return every object in the bucket, by key."""
    s3 = SERVER.client()
    pages = s3.get_paginator("list_objects_v2").paginate(Bucket=bucket)
    keys = [entry["Key"] for page in pages for entry in page.get("Contents", [])]
    return {key: s3.get_object(Bucket=bucket, Key=key)["Body"].read() for key in keys}


def _local_files(tracking_database: str) -> dict[str, bytes]:
    """Return the database and artifacts of MLflow, and the logs of Ray in this session."""
    folders = [
        Path(tracking_database.removeprefix("sqlite:///")).parent,
        Path(ray._private.worker._global_node.get_session_dir_path()) / "logs",
    ]
    paths = [path for folder in folders for path in folder.rglob("*") if path.is_file()]
    return {str(path): path.read_bytes() for path in paths}

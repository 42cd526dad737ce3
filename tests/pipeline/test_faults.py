"""After any fault, running the same command again gives the store of an undisturbed run."""

import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest
import ray

from kac.util import files
from pipeline.config import RolloutSpec
from pipeline.rollout import RolloutError, actors, compute_shards, make_plan, rollout, seal
from pipeline.store.manifest import list_shards, read_manifest
from tests.pipeline import faulty
from tests.pipeline.compare import assert_same_store, list_files, read_store
from tests.pipeline.running import (
    SHARDS,
    TRAJECTORIES,
    WAIT_SECONDS,
    Job,
    Summary,
    end,
    named,
    running_job,
    spec_of,
)
from tests.pipeline.stages import wait_for_free_cpus
from tests.pipeline.stores import make_teacher

pytestmark = [pytest.mark.ray, pytest.mark.cluster, pytest.mark.slow]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_teacher(str(tmp_path_factory.mktemp("teacher")))


@pytest.fixture(scope="module")
def reference(teacher: str, ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The store of an undisturbed run."""
    store = str(tmp_path_factory.mktemp("reference") / "store")
    rollout(spec_of(teacher, store))
    assert len(read_manifest(store).shards) == SHARDS
    return store


@pytest.fixture
def store(tmp_path: Path) -> str:
    return str(tmp_path / "store")


def wait_until(condition: Callable[[], object], running: Job | Future) -> None:
    """Wait until the condition holds. Fail if the job ends first."""
    deadline = time.monotonic() + WAIT_SECONDS
    while not condition():
        if running.is_over() if isinstance(running, Job) else running.done():
            report = running.output() if isinstance(running, Job) else running.result()
            pytest.fail(f"the job ended too early: {report}")
        assert time.monotonic() < deadline, "the condition was not met in time"
        time.sleep(0.005)


def address() -> str:
    """Return the address of the session's cluster."""
    return ray.get_runtime_context().gcs_address


def alive(name: str) -> list[psutil.Process]:
    """Return the processes of the session's cluster that run actors of a class."""
    return named(psutil.Process().children(recursive=True), name)


def published(store: str) -> dict[str, tuple[int, int]]:
    """Return the inode and size of each shard. A rewritten file has a different inode."""
    return {name: (os.stat(files.join(store, name)).st_ino, size) for name, size in list_shards(store).items()}


def finish(spec: RolloutSpec, reference: str, capsys: pytest.CaptureFixture[str]) -> Summary:
    """Run the same command again, and check that it reuses intact shards and gives the reference store."""
    before = published(spec.store)
    capsys.readouterr()
    rollout(spec)
    summary = Summary(capsys.readouterr().out)
    after = published(spec.store)
    assert {name: after[name] for name in before} == before, "an intact shard was rewritten"
    # Actors outlive a killed driver for a moment and may publish more shards.
    assert summary.reused_shards >= len(before)
    assert summary.computed_shards + summary.reused_shards == SHARDS
    assert summary.computed + summary.reused == TRAJECTORIES
    assert_same_store(spec.store, reference)
    return summary


def test_a_driver_is_killed_twice(teacher: str, reference: str, store: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The first driver has an embedded Ray, which ends with it. The second uses a cluster, which keeps running."""
    spec = spec_of(teacher, store)
    for where, shards in ((None, 1), (address(), 11)):
        with running_job(["jobs.rollout"], spec, where) as job:
            wait_until(lambda n=shards: len(list_shards(store)) >= n, job)
            job.kill_driver()
        assert shards <= len(list_shards(store)) < SHARDS
        assert read_manifest(store) is None
    assert finish(spec, reference, capsys).computed_shards > 0


def test_a_driver_is_terminated(teacher: str, reference: str, store: str, capsys: pytest.CaptureFixture[str]) -> None:
    """With an embedded Ray, SIGTERM gives a one-line error without a stack trace."""
    spec = spec_of(teacher, store)
    with running_job(["jobs.rollout"], spec, address=None) as job:
        wait_until(lambda: list_shards(store), job)
        job.process.terminate()
        assert job.process.wait(WAIT_SECONDS) == 143
        lines = job.output().splitlines()
    assert len([line for line in lines if line.startswith("python -m jobs.rollout: error: terminated")]) == 1
    assert not [line for line in lines if "SIGTERM" in line or "Traceback" in line]
    finish(spec, reference, capsys)


@pytest.mark.parametrize(
    ("where", "temporary", "reused"),
    [("hang-in-shard", "shard-", range(2, SHARDS)), ("hang-in-manifest", "manifest.json", range(SHARDS, SHARDS + 1))],
)
def test_a_driver_is_killed_during_a_write(
    teacher: str,
    reference: str,
    store: str,
    capsys: pytest.CaptureFixture[str],
    where: str,
    temporary: str,
    reused: range,
) -> None:
    spec = spec_of(teacher, store)
    faulty.fault_file(store).touch()
    hung = faulty.hung_file(store)
    with running_job(["tests.pipeline.faulty", where], spec, address()) as job:
        wait_until(lambda: hung.exists() and hung.read_text(), job)
        job.kill_driver()
        end(int(hung.read_text()))
    half_written = [name for name in list_files(store) if files.is_temporary(name.rsplit("/", 1)[-1])]
    assert any(temporary in name for name in half_written)
    assert read_manifest(store) is None
    assert finish(spec, reference, capsys).reused_shards in reused  # also checks that no temporary file is left


def test_killed_actors_lose_only_their_shards(teacher: str, reference: str, store: str) -> None:
    """The rollout survives the death of three actors and of the ledger."""
    with ThreadPoolExecutor(1) as thread:
        running = thread.submit(rollout, spec_of(teacher, store))
        for shards, victim in ((1, "MapWorker"), (5, "AttemptLedger"), (9, "MapWorker"), (14, "MapWorker")):
            wait_until(lambda n=shards, name=victim: len(list_shards(store)) >= n and alive(name), running)
            alive(victim)[0].kill()
        running.result()
    assert_same_store(store, reference)


def test_a_lost_node(teacher: str, reference: str, store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One of two worker nodes is lost, and the other computes its shards."""
    # Ray's sockets need a short path. The folder is separate so that no other test finds this cluster's address.
    with tempfile.TemporaryDirectory(prefix="kac", ignore_cleanup_errors=True) as folder:
        monkeypatch.setenv("RAY_TMPDIR", folder)
        with running_job(["tests.pipeline.faulty", "lose-node"], spec_of(teacher, store), address=None) as job:
            assert "removed a node" in job.finish()
    assert_same_store(store, reference)


@pytest.mark.parametrize(
    ("actor", "expected"),
    [
        (faulty.RaisingActor, r"RuntimeError: the card fell off the bus with a second line"),
        (faulty.NanActor, r"NaN or infinity in samples 129, 159 .*not published"),
        (faulty.DyingActor, rf"{faulty.QUICK_ATTEMPTS} processes died"),
    ],
)
def test_a_shard_that_always_fails_is_named(
    teacher: str,
    reference: str,
    store: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    actor: type,
    expected: str,
) -> None:
    """Retries are limited, and the shard is not published. Without the fault, the same command succeeds."""
    spec = spec_of(teacher, store)
    name = f"data/guidance=0.0/shard-{faulty.FAULTY_SHARD:06d}.parquet"
    faulty.fault_file(store).touch()
    monkeypatch.setattr(actors, "ShardActor", actor)
    monkeypatch.setattr(actors, "AttemptLedger", faulty.ImpatientLedger)
    with pytest.raises(RolloutError, match=rf"{name}.*{expected}") as refusal:
        rollout(spec)
    assert "\n" not in str(refusal.value)
    assert name not in list_shards(store)
    assert read_manifest(store) is None
    faulty.fault_file(store).unlink()
    finish(spec, reference, capsys)


@pytest.mark.parametrize(
    ("maker", "expected"),
    [
        (
            faulty.DyingMaker,
            r"^\d+ actors died in a row before starting a shard",
        ),
        (faulty.RefusingMaker, r"^\S+ is not a model folder\.$"),
        (faulty.BrokenMaker, r"in Ray: .*ZeroDivisionError: a bug"),
    ],
)
def test_actors_that_cannot_start(
    teacher: str, store: str, ray_cluster: None, monkeypatch: pytest.MonkeyPatch, maker: Callable, expected: str
) -> None:
    spec = spec_of(teacher, store)
    monkeypatch.setattr(actors, "AttemptLedger", faulty.ImpatientLedger)
    with pytest.raises(RolloutError, match=expected) as refusal:
        list(actors.compute_on_actors(spec, make_plan(spec), maker))
    assert "\n" not in str(refusal.value)
    assert wait_for_free_cpus()


def test_a_failed_actor_skips_the_other_shards_of_its_block(
    teacher: str, store: str, ray_cluster: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a large rollout, a block has several shards, and its rows arrive after its last shard."""
    monkeypatch.setattr("pipeline.cluster.ray_data.MAX_BLOCKS", 1)
    spec = spec_of(teacher, store)
    with pytest.raises(RolloutError, match=r"^data/guidance=0.0/shard-000000.parquet: fails$"):
        list(actors.compute_on_actors(spec, make_plan(spec), faulty.FailingMaker))
    assert [path.name for path in Path(store).parent.glob("store.*")] == ["store.0"]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk with one megabyte."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)]
    done = subprocess.run(mount, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"cannot mount a tmpfs: {done.stderr.strip()}")
    yield disk
    subprocess.run(["umount", "-l", disk], check=True)


def test_a_full_disk(teacher: str, reference: str, small_disk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The error names a shard, and no partial file has a shard's name. With more space, the command succeeds."""
    spec = spec_of(teacher, str(small_disk / "store"))
    store_bytes = sum(receipt.bytes for receipt in read_manifest(reference).shards) // 2
    ballast = small_disk / "ballast"
    ballast.write_bytes(bytes(shutil.disk_usage(small_disk).free - store_bytes))
    with pytest.raises(RolloutError, match=r"data/guidance=.*/shard-\d{6}\.parquet .*No space left on device"):
        rollout(spec)
    there = list_files(spec.store)
    assert 0 < len(there) < SHARDS
    assert [name for name in there if name != "run.json"] == sorted(list_shards(spec.store))
    ballast.unlink()
    finish(spec, reference, capsys)


def test_two_concurrent_jobs_on_one_store(teacher: str, reference: str, store: str) -> None:
    """Both jobs succeed, and the store is intact."""
    spec = spec_of(teacher, store, actors=1)
    with (
        running_job(["jobs.rollout"], spec, address()) as one,
        running_job(["jobs.rollout"], spec, address()) as other,
    ):
        one.finish()
        other.finish()
    assert_same_store(store, reference)


def test_two_jobs_that_add_different_scales_lose_nothing(teacher: str, store: str, ray_cluster: None) -> None:
    """Both jobs start from the same empty store, and both write its manifest."""
    specs = [spec_of(teacher, store, trajectories=32, guidance=(w,)) for w in (0.0, 1.0)]
    plans = [make_plan(spec) for spec in specs]
    for spec, plan in zip(specs, plans, strict=True):
        seal(spec, plan, compute_shards(spec, plan))
    manifest, rows = read_store(store)
    assert sorted(rows) == [0.0, 1.0]
    assert [part["guidance"] for part in manifest["extents"]] == [0.0, 1.0]

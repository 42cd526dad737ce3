"""Whatever is killed, lost, full or broken: the same command again, and the store is that of a run without faults."""

import itertools
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
import torch

from kac import files
from kac.checkpoint import ModelConfig, save_model
from kac.data import load_dataset
from kac.networks import NetworkConfig, build_network
from kac.path import PathConfig
from pipeline import rollout
from pipeline.config import RolloutSpec
from pipeline.store.manifest import list_shards, merge_ranges, read_manifest
from tests.pipeline import faulty
from tests.pipeline.compare import assert_same_store, list_files, read_store

ROOT = Path(__file__).parents[2]
SHARDS = 20  # over two guidance scales
WAIT_SECONDS = 240.0


def write_teacher(folder: str, data: str = "moons", width: int = 16) -> str:
    """A teacher with random weights: what it does is not the point, only that it does the same each time."""
    dataset = load_dataset(data)
    config = NetworkConfig(width=width, depth=1)
    network = build_network(config, dataset.sample_shape, dataset.num_classes)
    generator = torch.Generator().manual_seed(1)
    weights = {name: 0.2 * torch.randn(w.shape, generator=generator) for name, w in network.state_dict().items()}
    model = ModelConfig(
        kind="teacher",
        network=config,
        path=PathConfig(),
        data=data,
        sample_shape=dataset.sample_shape,
        num_classes=dataset.num_classes,
        class_frequencies=dataset.class_frequencies,
    )
    save_model(folder, network, model, weights)
    return folder


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_teacher(str(tmp_path_factory.mktemp("teacher")))


@pytest.fixture(scope="module")
def reference(teacher: str, ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The store of a run that nothing disturbed."""
    store = str(tmp_path_factory.mktemp("reference") / "store")
    rollout.rollout(spec_of(teacher, store))
    assert len(read_manifest(store).shards) == SHARDS
    return store


@pytest.fixture
def store(tmp_path: Path) -> str:
    return str(tmp_path / "store")


def spec_of(teacher: str, store: str, **options: object) -> RolloutSpec:
    """The rollout that all tests here do."""
    defaults = {
        "trajectories": 310,  # the last shard is short
        "shard_size": 32,
        "guidance": (0.0, 1.0),
        "knots": 4,
        "solver_steps": 40,
        "batch_size": 16,
        "actors": 2,
    }
    return RolloutSpec(teacher=teacher, store=store, **{**defaults, **options})


def command_line(spec: RolloutSpec) -> list[str]:
    words = []
    for name, value in spec.model_dump(mode="json").items():
        values = value if isinstance(value, list) else [value]
        words += [f"--{name.replace('_', '-')}", *map(str, values)]
    return words


@contextmanager
def job(module: list[str], spec: RolloutSpec, address: str | None) -> Iterator[subprocess.Popen]:
    """A job as a process of its own, on the cluster at ``address`` or with an embedded Ray; all of it is ended."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    if address:
        environment["RAY_ADDRESS"] = address
    process = subprocess.Popen(
        [sys.executable, "-m", *module, *command_line(spec)],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    started: list[psutil.Process] = []
    try:
        yield process
    finally:
        if process.poll() is None:
            started = kill(process)
        psutil.wait_procs(started, timeout=30)
        for left in (child for child in started if child.is_running()):
            left.kill()
        process.stdout.close()


def kill(process: subprocess.Popen) -> list[psutil.Process]:
    """SIGKILL the driver alone; returns the processes it had started."""
    started = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    process.wait()
    return started


def wait_until(condition: Callable[[], object], process: subprocess.Popen | Future) -> None:
    """Wait for the moment of a fault; the job must not end before it."""
    deadline = time.monotonic() + WAIT_SECONDS
    while not condition():
        ended = process.poll() is not None if isinstance(process, subprocess.Popen) else process.done()
        if ended and not condition():
            output = process.stdout.read() if isinstance(process, subprocess.Popen) else process.result()
            pytest.fail(f"the job ended before the fault: {output}")
        assert time.monotonic() < deadline, "the moment of the fault did not come"
        time.sleep(0.005)


def ray_address() -> str:
    import ray

    return ray.get_runtime_context().gcs_address


def published(store: str) -> dict[str, tuple[int, int]]:
    """The shards that are there: a file that is written again gets another inode."""
    return {name: (os.stat(files.join(store, name)).st_ino, size) for name, size in list_shards(store).items()}


class Summary:
    """The line that a rollout prints at its end."""

    def __init__(self, output: str) -> None:
        match = re.search(
            r"([\d,]+) trajectories computed in ([\d,]+) shards, ([\d,]+) reused in ([\d,]+) shards", output
        )
        assert match, output
        numbers = [int(text.replace(",", "")) for text in match.groups()]
        self.computed, self.computed_shards, self.reused, self.reused_shards = numbers


def finish(spec: RolloutSpec, reference: str, capsys: pytest.CaptureFixture[str]) -> Summary:
    """Run the same command again: it takes over what is whole, computes the rest, and leaves nothing else behind."""
    before = published(spec.store)
    capsys.readouterr()
    rollout.rollout(spec)
    summary = Summary(capsys.readouterr().out)
    after = published(spec.store)
    assert {name: after[name] for name in before} == before, "a whole shard was written again"
    # Actors of a killed driver may publish the shards that they were at, before the cluster ends them.
    assert len(before) <= summary.reused_shards
    assert summary.computed_shards + summary.reused_shards == SHARDS
    assert summary.computed + summary.reused == 620
    assert_same_store(spec.store, reference)
    return summary


# ------------------------------------------------------------------------------------------------ killed processes


@pytest.mark.parametrize("shards", [1, 9])
def test_a_killed_driver_with_its_own_ray(
    teacher: str, reference: str, store: str, capsys: pytest.CaptureFixture[str], shards: int
) -> None:
    spec = spec_of(teacher, store, solver_steps=40)
    with job(["jobs.rollout"], spec, address=None) as process:
        wait_until(lambda: len(list_shards(store)) >= shards, process)
        psutil.wait_procs(kill(process), timeout=30)
    assert shards <= len(list_shards(store)) < SHARDS
    assert read_manifest(store) is None
    assert finish(spec, reference, capsys).reused_shards >= shards


@pytest.mark.parametrize(
    ("where", "temporary", "reused"),
    [("hang-in-shard", "shard-", range(2, SHARDS)), ("hang-in-manifest", "manifest.json", range(SHARDS, SHARDS + 1))],
)
def test_a_driver_killed_in_the_middle_of_a_write(
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
    with job(["tests.pipeline.faulty", where], spec, ray_address()) as process:
        wait_until(faulty.hung_file(store).exists, process)
        hung = int(faulty.hung_file(store).read_text())
        kill(process)
        end(hung)
    half_written = [name for name in list_files(store) if files.is_temporary(name.rsplit("/", 1)[-1])]
    assert any(temporary in name for name in half_written)
    assert read_manifest(store) is None
    assert finish(spec, reference, capsys).reused_shards in reused  # and no temporary file is left


def end(pid: int) -> None:
    """Wait until a process is gone, and see to it."""
    try:
        process = psutil.Process(pid)
        process.kill()
        process.wait(30)
    except psutil.NoSuchProcess:
        pass


def ray_processes(name: str) -> list[psutil.Process]:
    """The processes of this session's Ray that run an actor of this class."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if name in process.name() and "__init__" not in process.name():
                found.append(process)
        except psutil.Error:
            continue
    return found


def test_killed_actors_cost_their_shards_only(teacher: str, reference: str, store: str) -> None:
    spec = spec_of(teacher, store, solver_steps=40)
    with ThreadPoolExecutor(1) as thread:
        running = thread.submit(rollout.rollout, spec)
        for shards in (1, 6, 12):
            wait_until(lambda n=shards: len(list_shards(store)) >= n and ray_processes("MapWorker"), running)
            ray_processes("MapWorker")[0].kill()
        running.result()
    assert_same_store(store, reference)


def test_a_killed_ledger_does_not_end_the_rollout(teacher: str, reference: str, store: str) -> None:
    spec = spec_of(teacher, store)
    with ThreadPoolExecutor(1) as thread:
        running = thread.submit(rollout.rollout, spec)
        wait_until(lambda: list_shards(store), running)
        for process in ray_processes("Ledger"):
            process.kill()
        running.result()
    assert_same_store(store, reference)


def test_a_lost_node(teacher: str, reference: str, store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import tempfile

    spec = spec_of(teacher, store)
    # A short path, for Ray's sockets; and of its own, for the address of this cluster is not for others.
    with tempfile.TemporaryDirectory(prefix="kac", ignore_cleanup_errors=True) as folder:
        monkeypatch.setenv("RAY_TMPDIR", folder)
        with job(["tests.pipeline.faulty", "lose-node"], spec, address=None) as process:
            output, _ = process.communicate(timeout=WAIT_SECONDS)
    assert process.returncode == 0, output
    assert "removed a node" in output
    assert_same_store(store, reference)


# ------------------------------------------------------------------------------------------- faults that come back


@pytest.mark.parametrize(
    ("roller", "expected"),
    [
        (faulty.RaisingRoller, r"RuntimeError: the card fell off the bus with a second line"),
        (faulty.NanRoller, r"found NaN or infinity in samples 129, 159: nothing of the shard was published"),
        (faulty.DyingRoller, rf"its process died {faulty.QUICK_ATTEMPTS} times"),
    ],
)
def test_a_shard_that_always_fails_is_named(
    teacher: str,
    reference: str,
    store: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    roller: type,
    expected: str,
) -> None:
    spec = spec_of(teacher, store)
    monkeypatch.setattr(rollout, "ShardRoller", roller)
    monkeypatch.setattr(rollout, "Ledger", faulty.ImpatientLedger)
    name = f"data/guidance=0.0/shard-{faulty.FAULTY_SHARD:06d}.parquet"
    faulty.fault_file(store).touch()
    with pytest.raises(rollout.RolloutError, match=rf"{name}.*{expected}") as refusal:
        rollout.rollout(spec)
    assert "\n" not in str(refusal.value)
    assert name not in list_shards(store)
    assert read_manifest(store) is None
    faulty.fault_file(store).unlink()
    finish(spec, reference, capsys)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk with room for a few shards, and a file on it that leaves less."""
    disk = tmp_path / "disk"
    disk.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", disk], capture_output=True, text=True, check=False
    )
    if done.returncode:
        pytest.skip(f"needs the right to mount a tmpfs: {done.stderr.strip()}")
    yield disk
    subprocess.run(["umount", "-l", disk], check=True)


def test_a_full_disk(
    teacher: str, reference: str, small_disk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spec = spec_of(teacher, str(small_disk / "store"))
    ballast = small_disk / "ballast"
    room = sum(receipt.bytes for receipt in read_manifest(reference).shards) // 2
    ballast.write_bytes(bytes(shutil.disk_usage(small_disk).free - room))
    with pytest.raises(rollout.RolloutError, match=r"data/guidance=.*/shard-\d{6}\.parquet: .*No space left on device"):
        rollout.rollout(spec)
    there = list_files(spec.store)
    assert 0 < len(there) < SHARDS
    assert there == sorted(list_shards(spec.store)), "something half-written remains"
    ballast.unlink()
    assert finish(spec, reference, capsys).reused_shards >= len(there)


# -------------------------------------------------------------------------------------------------------- two jobs


def test_two_jobs_at_once_on_one_store(teacher: str, reference: str, store: str) -> None:
    spec = spec_of(teacher, store, actors=1)
    with job(["jobs.rollout"], spec, ray_address()) as one, job(["jobs.rollout"], spec, ray_address()) as other:
        outputs = [process.communicate(timeout=WAIT_SECONDS)[0] for process in (one, other)]
    assert (one.returncode, other.returncode) == (0, 0), outputs
    assert_same_store(store, reference)


def test_two_jobs_that_add_different_scales_lose_nothing(teacher: str, store: str, ray_cluster: None) -> None:
    """Both plan from the same empty store, and both seal it."""
    specs = [spec_of(teacher, store, trajectories=32, guidance=(w,)) for w in (0.0, 1.0)]
    identity = rollout.identify(specs[0], rollout.load_config(teacher))
    plans = [rollout.make_plan(spec, identity) for spec in specs]
    for spec, plan in zip(specs, plans, strict=True):
        rollout.seal(spec, plan, [outcome.receipt for outcome in rollout.roll_out(spec, plan)])
    manifest, rows = read_store(store)
    assert sorted(rows) == [0.0, 1.0]
    assert [part["guidance"] for part in manifest["contents"]] == [0.0, 1.0]

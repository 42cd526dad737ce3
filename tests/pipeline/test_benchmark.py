"""The benchmark measures the right quantities. No test checks how fast anything is."""

import json
import subprocess
import sys
from pathlib import Path

import fsspec
import numpy as np
import pytest
import torch

from jobs.parsing import parse
from kac.guidance import guide
from kac.model import load_config, load_model
from kac.networks import MLPConfig
from kac.sampling import draw
from kac.solvers import knot_times, solve
from kac.util import files
from kac.util.errors import ArgumentError
from pipeline import store, training
from pipeline.benchmark import (
    CALLS_PER_SHARD,
    BenchmarkSpec,
    Measurement,
    benchmark,
    interleave,
    make_setting,
    parts,
    table,
)
from pipeline.benchmark.parts import (
    CountingFileSystem,
    bare_speed,
    count_bytes,
    loop_speed,
    online_batches,
    run_and_remove,
    speed,
    steady_rate,
    tensor_batches,
)
from pipeline.config import DistillSpec, OptimizerConfig, RolloutSpec
from pipeline.distill import DistillTask
from pipeline.store.shards import adopt, column_array
from pipeline.training.loop import LOG_UPDATES
from tests.pipeline.stores import make_store, make_teacher, run_rollout

TINY = BenchmarkSpec(
    trajectories=320,
    batch_size=16,
    repeats=2,
    data="moons",
    network=MLPConfig(width=8, depth=1),
    only=("bytes-read", "bytes-stored"),
)


@pytest.fixture
def setting(tmp_path: Path):
    return make_setting(TINY, str(tmp_path))


@pytest.fixture(scope="module")
def digits_store(tmp_path_factory: pytest.TempPathFactory) -> str:
    """An uncompressed store of known size in bytes, with the default 20 knots and shard size."""
    folder = tmp_path_factory.mktemp("benchmark")
    teacher = make_teacher(folder / "teacher", data="digits")
    size = {"trajectories": 2048, "shard_size": 1024}
    make_store(folder / "store", teacher, knots=20, solver_steps=20, compression="none", **size)
    return str(folder / "store")


def counted(path: str) -> str:
    fsspec.register_implementation(CountingFileSystem.protocol, CountingFileSystem, clobber=True)
    return f"counted://{path}"


def test_ratios_are_taken_per_turn_and_their_median_is_compared_with_the_bar():
    speeds = Measurement("x", "rows/s", (9.0, 20.0, 10.0), (10.0, 10.0, 20.0), ">= 0.9")
    assert speeds.ratios == (0.9, 2.0, 0.5)
    assert speeds.holds
    assert not Measurement("x", "rows/s", (9.0, 20.0, 8.0), (10.0, 10.0, 10.0), ">= 0.91").holds
    assert Measurement("x", "bytes", (12.0,), (100.0,), "<= 0.12").holds
    assert not Measurement("x", "bytes", (13.0,), (100.0,), "<= 0.12").holds
    assert Measurement("x", "ns", (13.0,), (100.0,)).holds is None


def test_the_table_and_the_record_agree():
    measurement = Measurement("store / tensors", "samples/s", (9.0, 20.0, 10.0), (10.0, 10.0, 20.0), ">= 0.95")
    record = json.loads(json.dumps(measurement.record()))
    assert (record["median_ratio"], record["min_ratio"], record["max_ratio"]) == (0.9, 0.5, 2.0)
    assert (record["bar"], record["holds"]) == (">= 0.95", False)
    head, rule, line = table({"distill-speed": [measurement]}).splitlines()
    assert len(head) == len(rule) == len(line)
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells[:5] == ["distill-speed", "store / tensors", "10", "10", "samples/s"]
    assert cells[5:] == ["0.900", "0.500..2.000", "3", ">= 0.95", "missed"]


def test_sides_alternate():
    calls: list[str] = []
    sides = [lambda name=name: calls.append(name) or len(calls) for name in "AB"]
    assert interleave(3, *sides) == [(1, 3, 5), (2, 4, 6)]
    assert "".join(calls) == "ABABAB"


def test_the_steady_rate_excludes_the_first_and_the_last_shards_of_every_actor():
    # Two actors each finish a shard every 2 s, half a period apart. Their first shards are slow, and one ends late.
    first, second = [5.0, 10, 12, 14, 16, 18], [6.0, 11, 13, 15, 17, 40]
    assert steady_rate(sorted(first + second), actors=2) == pytest.approx(1.0)
    # Both actors finish their shards at the same times.
    assert steady_rate(sorted([1.0, 9, 11, 13, 15] * 2), actors=2) == pytest.approx(1.0)
    assert steady_rate([5.0, 9, 10, 11, 12, 99], actors=1) == pytest.approx(1.0)


def test_the_bare_loop_gives_the_ends_of_the_stored_trajectories(setting, monkeypatch: pytest.MonkeyPatch):
    spec = setting.rollout_spec("store", trajectories=40, shard_size=32)
    run_rollout(spec)
    rows = next(store.open(spec.store).batches(40, knots=[0, 20]))
    drawn = []
    monkeypatch.setattr(parts, "draw", lambda *args, **options: drawn.append(draw(*args, **options)) or drawn[-1])
    assert loop_speed(spec) > 0
    assert [len(samples.images) for samples in drawn] == [spec.batch_size, 40], "one batch to warm up, then all batches"
    assert torch.equal(drawn[1].label, rows.label)
    torch.testing.assert_close(drawn[1].images, rows.knots[:, 1])
    assert not torch.allclose(rows.knots[:, 0], rows.knots[:, 1], atol=1e-2), "the teacher does not move its samples"


def test_the_bare_loop_runs_in_processes_with_one_thread(setting, ray_cluster: None, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(parts, "loop_speed", count_threads)
    assert bare_speed(setting, loops=2) == 2


def count_threads(spec: RolloutSpec) -> int:
    """Run the loop in another process, and return its number of threads."""
    assert loop_speed(spec) > 0
    return torch.get_num_threads()


def test_read_bytes_are_counted(tmp_path: Path):
    (tmp_path / "file").write_bytes(bytes(10_000))
    location = files.locate(counted(str(tmp_path / "file")))
    CountingFileSystem.reads.clear()
    with location.fs.open(location.path, "rb") as file:
        file.read(100)
        file.seek(9_990)
        assert len(file.read(500)) == 10
    assert sum(CountingFileSystem.reads) == 110
    files.read_bytes(counted(str(tmp_path / "file")))
    assert sum(CountingFileSystem.reads) == 10_110


def test_a_one_step_student_reads_two_of_the_knots(digits_store: str, setting, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(type(setting), "store", lambda self: store.open(digits_store))
    knot = 2048 * 64 * 4
    written = [
        file for file in Path(digits_store).rglob("*") if file.suffix == ".parquet" or file.name == "manifest.json"
    ]
    measurements = parts.measure_bytes_read(setting)
    for steps, measurement in zip((1, 4, 20), measurements, strict=True):
        # Labels, levels, page headers and footers add at most 5% of the size of all knots.
        assert (steps + 1) * knot <= measurement.values[0] <= (steps + 1) * knot + 0.05 * 21 * knot
        assert measurement.against == (sum(file.stat().st_size for file in written),)
    assert [measurement.holds for measurement in measurements] == [True, None, None]


@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="requires Linux's /proc")
def test_the_count_agrees_with_the_kernel(digits_store: str):
    def kernel_count() -> int:
        return int(Path("/proc/self/io").read_text().split()[1])

    path = counted(digits_store)
    count_bytes(path, 4)  # warms up, so that the second call imports nothing
    before = kernel_count()
    count = count_bytes(path, 4)
    # The kernel counts more bytes, because buffered files read to the end of a block.
    assert count <= kernel_count() - before <= 1.05 * count


def test_tensor_bytes_equal_the_bytes_of_the_knots(
    digits_store: str, setting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(type(setting), "store", lambda self: store.open(digits_store))
    measurements = {m.what: m for m in parts.measure_bytes_stored(setting)}
    plain = measurements["stored, none / bytes of the tensors"]
    assert plain.against == (1024 * 21 * 64 * 4,)
    written = next(Path(digits_store).rglob("shard-000000.parquet"))
    assert plain.values == (written.stat().st_size,)
    assert plain.holds
    assert measurements["stored, zstd / bytes of the tensors"].ratios < plain.ratios
    for name in parts.COMPRESSIONS:
        shard = store.open(digits_store).shards[0]
        copied = adopt(str(tmp_path / f"compressed-{name}"), shard, store.open(digits_store).identity)[1]
        original = adopt(digits_store, shard, store.open(digits_store).identity)[1]
        for column in original.column_names:
            np.testing.assert_array_equal(column_array(copied[column]), column_array(original[column]))


needs_clear_refs = pytest.mark.skipif(not parts.RESET_FILE.exists(), reason="requires Linux's /proc")


@needs_clear_refs
def test_the_peak_includes_freed_memory_until_it_is_reset():
    code = """
from pipeline.benchmark.parts import RESET_FILE, peak_memory
RESET_FILE.write_text("5")
before = peak_memory()
x = bytearray(300 << 20)
x = None
print(peak_memory() - before)
RESET_FILE.write_text("5")
print(peak_memory() - before)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], capture_output=True, check=True)
    freed, after_reset = (int(line) / 1024 for line in done.stdout.split())
    assert 290 <= freed <= 310
    assert abs(after_reset) < 20


@needs_clear_refs
def test_the_peaks_of_the_actor_and_the_driver(setting, ray_cluster: None):
    actor, driver = parts.rollout_peaks(setting)
    # Importing torch takes more than 100 MiB, and nothing here takes 4 GiB.
    assert 100 < actor < 4096
    assert 100 < driver < 4096


def test_outcomes_are_in_order_of_completion(setting, ray_cluster: None):
    spec = setting.rollout_spec("unsealed", actors=2, trajectories=320)
    outcomes = run_and_remove(spec)
    assert sum(outcome.computed_rows for outcome in outcomes) == 320
    assert len(outcomes) == 320 // (CALLS_PER_SHARD * TINY.batch_size)
    assert [outcome.finished for outcome in outcomes] == sorted(outcome.finished for outcome in outcomes)
    assert not Path(spec.store).exists()


def test_the_compared_loops_train_on_the_same_endpoints(setting):
    """Training from tensors in memory gives the same loss as training from the store."""
    spec = setting.rollout_spec("store", trajectories=320, solver="euler", solver_steps=100, shard_size=64)
    run_rollout(spec)
    source = store.open(spec.store)
    whole = next(source.batches(320, knots=[0, 5, 10, 15, 20]))
    worker = training.Worker(0, 1, torch.device("cpu"))

    def part(update: int) -> training.MicroBatch:
        return training.MicroBatch(update, 0, 1, worker)

    def mean_loss(task: training.Task) -> float:
        torch.manual_seed(0)
        learner = task.build(worker)
        with torch.no_grad():
            losses = [learner.losses(learner.forward, part(update)).losses["endpoint"] for update in range(400)]
        return float(torch.stack(losses).mean())

    student = DistillSpec(
        store=spec.store, out="", steps=4, optimizer=OptimizerConfig(updates=100, batch_size=TINY.batch_size)
    )
    expected = mean_loss(DistillTask(student, setting.teacher))
    batch = tensor_batches(whole.knots, whole.label, TINY.batch_size)
    assert mean_loss(DistillTask(student, setting.teacher, batch)) == pytest.approx(expected, rel=0.05)
    assert mean_loss(DistillTask(student, setting.teacher)) == expected


def test_the_online_teacher_follows_the_path_of_the_teacher(setting):
    teacher, batch = load_model(setting.teacher), online_batches(setting)
    for k in range(4):
        interval = batch(4 + k)
        assert torch.equal(interval.t_start, knot_times(4).float()[k].expand(TINY.batch_size))
        assert torch.equal(interval.t_end, knot_times(4).float()[k + 1].expand(TINY.batch_size))
        times = torch.linspace(1 - k / 4, 1 - (k + 1) / 4, 201, dtype=torch.float64)
        x_end = solve(guide(teacher.network, 0.0, interval.label), interval.x_start, times, "euler").x
        torch.testing.assert_close(interval.x_end, x_end.detach(), atol=1e-3, rtol=1e-3)
        assert not torch.allclose(interval.x_end, interval.x_start, atol=1e-2)


def test_the_speed_excludes_the_first_window(setting, monkeypatch: pytest.MonkeyPatch):
    def loop(job: training.Job, *_: object) -> None:
        for samples_per_second in (1.0, 100.0, 300.0):
            job.run.metrics({"samples_per_second": samples_per_second})

    monkeypatch.setattr("pipeline.benchmark.parts.run_updates", loop)
    # Windows have the same number of samples, so the speed is the harmonic mean.
    assert speed(setting, 150) == pytest.approx(150.0)


def test_training_speed_is_measured_with_the_training_loop(setting):
    run_rollout(setting.rollout_spec("store", trajectories=64))
    assert speed(setting, 2 * LOG_UPDATES) > 0
    assert speed(setting, 2, batch=online_batches(setting)) > 0


def test_the_benchmark_end_to_end(ray_cluster: None, tmp_path: Path, capsys: pytest.CaptureFixture):
    out = tmp_path / "figures.json"
    scratch = tmp_path / "scratch"
    results = benchmark(TINY.model_copy(update={"json_file": str(out), "folder": str(scratch)}))
    printed = capsys.readouterr().out.splitlines()
    record = json.loads(out.read_text())
    assert [m["part"] for m in record["measurements"]] == (["bytes-read"] * 3 + ["bytes-stored"] * 9)
    assert list(results) == list(TINY.only)
    assert len(printed) == 2 + len(record["measurements"])
    assert record["machine"]["torch"] == torch.__version__
    assert record["options"]["trajectories"] == TINY.trajectories
    reads = next(m for m in record["measurements"] if m["what"] == "read, lz4 / none")
    assert len(reads["values"]) == len(reads["against"]) == TINY.repeats
    assert list(scratch.iterdir()) == [], "the scratch folder is not empty"


def test_json_can_be_printed(ray_cluster: None, capsys: pytest.CaptureFixture):
    benchmark(TINY.model_copy(update={"json_file": "-", "only": ("bytes-read",)}))
    figures = json.loads(capsys.readouterr().out)["measurements"]
    assert [m["part"] for m in figures] == ["bytes-read"] * 3


def test_options():
    def options(text: str) -> BenchmarkSpec:
        return parse(BenchmarkSpec, text.split(), "python -m jobs.benchmark")

    spec = options("--only bytes-read rollout-speed bytes-read --json figures.json --repeats 3")
    assert (set(spec.only), spec.json_file, spec.repeats) == ({"rollout-speed", "bytes-read"}, "figures.json", 3)
    for text, name in (("--only z", "only"), ("--trajectories 1000", "trajectories"), ("--repeats 0", "repeats")):
        with pytest.raises(ArgumentError, match=text.split()[1]) as refusal:
            options(text)
        assert refusal.value.name == name


def test_a_given_teacher_is_used(tmp_path: Path):
    teacher = make_teacher(tmp_path / "own")
    setting = make_setting(TINY.model_copy(update={"teacher": teacher}), str(tmp_path / "scratch"))
    assert setting.teacher == teacher
    assert load_config(setting.rollout_spec("x").teacher) == load_config(teacher)

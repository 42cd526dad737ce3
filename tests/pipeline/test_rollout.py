"""The rollout with and without Ray: equal rows however the work is split, growth, and refusals."""

import gc
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import safetensors.torch
import torch

from kac import noise
from kac.guidance import guide
from kac.model import ModelConfig, load_model, save_model
from kac.solvers import KnotGrid, knot_times, solve
from kac.util import files
from kac.util.errors import DistillKacError
from pipeline import store
from pipeline.cluster.connection import ClusterResources
from pipeline.cluster.placement import ActorGroup, Node, Resources, choose_actors
from pipeline.config import RolloutSpec, SampleSpec
from pipeline.rollout import make_plan, rollout, rollout_stage
from pipeline.rollout import plan as plan_module
from pipeline.rollout.actors import MAX_ATTEMPTS, AttemptLedger
from pipeline.sample import sample
from pipeline.store.manifest import Manifest
from tests.pipeline.compare import assert_same_store
from tests.pipeline.stages import wait_for_free_cpus
from tests.pipeline.stores import make_teacher

KNOTS = 4


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_teacher(str(tmp_path_factory.mktemp("models") / "teacher"), data="digits")


def spec(teacher: str, path: Path, **options: object) -> RolloutSpec:
    """Return the spec of a rollout in this process."""
    sizes = {"trajectories": 100, "knots": KNOTS, "solver_steps": 8, "shard_size": 32}
    defaults = {**sizes, "guidance": (0.0, 1.0), "actors": 0}
    return RolloutSpec(**{**defaults, **options}, teacher=teacher, store=str(path))  # type: ignore[arg-type]


def rows(path: Path, guidance: float) -> dict[str, np.ndarray]:
    """Read every row of a guidance scale with pyarrow, in the order of sample ids."""
    tables = [pq.read_table(file) for file in sorted((path / "data" / f"guidance={guidance}").glob("*.parquet"))]
    columns: dict[str, list[np.ndarray]] = {}
    for table in tables:
        for name in table.column_names:
            array = table[name].combine_chunks()
            values = array.to_numpy_ndarray() if hasattr(array, "to_numpy_ndarray") else array.to_numpy()
            columns.setdefault(name, []).append(values)
    return {name: np.concatenate(parts) for name, parts in columns.items()}


def assert_same_rows(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> None:
    assert a.keys() == b.keys()
    for name, values in a.items():
        if name in ("sample_id", "label", "knot_00", "interval"):
            np.testing.assert_array_equal(values, b[name], err_msg=name)
        else:
            np.testing.assert_allclose(values, b[name], rtol=1e-5, atol=1e-5, err_msg=name)


@pytest.fixture(scope="module")
def reference(teacher: str, tmp_path_factory: pytest.TempPathFactory, ray_cluster: None) -> Path:
    path = tmp_path_factory.mktemp("stores") / "reference"
    rollout(spec(teacher, path, actors=1))
    return path


@pytest.mark.parametrize(
    "options", [{"actors": 2, "shard_size": 100, "batch_size": 7}, {"actors": 2, "shard_size": 10}]
)
def test_rows_do_not_depend_on_actors_shards_or_batches(teacher: str, reference: Path, tmp_path: Path, options: dict):
    rollout(spec(teacher, tmp_path / "store", **options))
    for w in (0.0, 1.0):
        assert_same_rows(rows(reference, w), rows(tmp_path / "store", w))


@pytest.mark.parametrize("source", ["trajectory", "forward"])
def test_the_store_is_the_same_with_and_without_actors(
    teacher: str, tmp_path: Path, ray_cluster: None, source: str, capsys: pytest.CaptureFixture[str]
):
    for name, actors in (("here", 0), ("on actors", 2)):
        for trajectories in (40, 100):  # the store grows, which extends its short last shard
            rollout(spec(teacher, tmp_path / name, source=source, trajectories=trajectories, actors=actors))
            assert f"{2 * trajectories - (trajectories > 40) * 80} trajectories computed" in capsys.readouterr().out
    assert_same_store(str(tmp_path / "here"), str(tmp_path / "on actors"))


def test_a_rollout_in_one_process_does_not_import_ray(teacher: str, tmp_path: Path, project_root: Path):
    code = f"""
import sys
from pipeline.config import RolloutSpec
from pipeline.rollout import rollout
rollout(RolloutSpec(teacher={teacher!r}, store={str(tmp_path / "store")!r}, trajectories=40, shard_size=32, actors=0))
assert "ray" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], cwd=project_root, check=True)
    assert store.open(str(tmp_path / "store")).rows(0.0) == 40


@pytest.mark.ray
def test_a_new_process_starts_ray_to_place_actors(teacher: str, tmp_path: Path, project_root: Path):
    """A process that has not used Ray starts an embedded Ray, even if `gpu` is given."""
    code = f"""
from pipeline.cluster.placement import choose_actors, wait_for_capacity
from pipeline.config import RolloutSpec
place = choose_actors(RolloutSpec(teacher={teacher!r}, store={str(tmp_path / "store")!r}, actors=1, gpu=False))
wait_for_capacity("rollout", "`actors`", place.actors, place.resources)
"""
    subprocess.run([sys.executable, "-c", code], cwd=project_root, check=True)


def test_rows_are_trajectories_of_the_teacher_from_the_noise_of_each_sample(teacher: str, reference: Path):
    model = load_model(teacher)
    path = model.config.path.build()
    ids = range(100)
    x_1 = noise.noise(path, 0, ids, model.config.sample_shape)
    label = noise.labels(0, ids, model.config.class_frequencies)
    for w in (0.0, 1.0):
        stored = rows(reference, w)
        with torch.inference_mode():
            solution = solve(guide(model.network, w, label), x_1, knot_times(8), "ab2", keep=range(0, 9, 2))
        np.testing.assert_array_equal(stored["sample_id"], np.arange(100))
        np.testing.assert_array_equal(stored["label"], label.numpy())
        np.testing.assert_array_equal(stored["knot_00"], x_1.numpy())
        for k in range(KNOTS + 1):
            np.testing.assert_allclose(stored[f"knot_{k:02d}"], solution.knots[k].numpy(), atol=1e-5)
        np.testing.assert_allclose(stored["kinetic_energy"], solution.kinetic_energy.numpy(), rtol=1e-4)


def test_a_dry_run_describes_the_cost_and_writes_nothing(
    teacher: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    assert rollout(spec(teacher, tmp_path / "store", dry_run=True, solver="heun")) is None
    assert list(tmp_path.iterdir()) == []
    printed = capsys.readouterr().out
    # 8 steps of two calls: one call without guidance and two with guidance.
    assert "rollout: 200 trajectories, 4,800 network calls" in printed
    size = 200 * (5 * 64 * 4 + 8 + 4 + 4)
    assert f"{size / 1e3:.3g} kB before compression in 8 shards (0 already exist)" in printed


def test_the_remaining_time_is_logged_after_the_first_shard(
    teacher: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    rollout(spec(teacher, tmp_path / "store"))
    captured = capsys.readouterr()
    assert (captured.out + captured.err).count("seconds left") == 1
    assert "rollout: in this process on the CPU, float32, contiguous, not compiled" in captured.out


@pytest.mark.parametrize("actors", [0, 1])
def test_a_lower_precision_logs_its_rounding_error(
    teacher: str, tmp_path: Path, ray_cluster: None, actors: int, capsys: pytest.CaptureFixture[str]
):
    exact, rough = tmp_path / "exact", tmp_path / "rough"
    options = {"guidance": (1.0,), "trajectories": 64, "actors": actors}
    assert rollout(spec(teacher, exact, **options)).endpoint_rms is None
    assert "endpoint_rms" not in (exact / "manifest.json").read_text()
    manifest = rollout(spec(teacher, rough, precision={"dtype": "bfloat16"}, **options))
    ends = [rows(path, 1.0)["knot_04"].astype(np.float64) for path in (exact, rough)]
    assert manifest.endpoint_rms == pytest.approx(np.sqrt(np.square(ends[0] - ends[1]).mean()), rel=0.01)
    assert "rollout: bfloat16 changes endpoints by" in capsys.readouterr().out
    grown = rollout(spec(teacher, rough, precision={"dtype": "bfloat16"}, **{**options, "trajectories": 96}))
    assert grown.endpoint_rms == manifest.endpoint_rms
    assert "changes endpoints" not in capsys.readouterr().out


def test_several_actors_share_a_gpu(teacher: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def place(gpus: int, **options: object) -> ActorGroup:
        monkeypatch.setattr("pipeline.cluster.connection.connect", lambda: ClusterResources(cpus=8, gpus=gpus))
        monkeypatch.setattr("pipeline.cluster.placement.live_nodes", lambda: [Node({"CPU": 8, "GPU": gpus}, {})])
        return choose_actors(spec(teacher, tmp_path, **{"actors": None, **options}))

    assert place(0) == ActorGroup(8, Resources(1))
    assert place(0, cpus_per_actor=3) == ActorGroup(2, Resources(3))
    assert place(2) == ActorGroup(2, Resources(0, 1))
    assert place(2, gpus_per_actor=0.25) == ActorGroup(8, Resources(0, 0.25))
    assert place(3, gpus_per_actor=0.4, cpus_per_actor=1) == ActorGroup(6, Resources(1, 0.4)), (
        "an actor uses part of one GPU"
    )
    assert place(2, gpu=False) == ActorGroup(8, Resources(1))
    assert place(0, gpu=True, actors=5) == ActorGroup(5, Resources(0, 1))
    assert str(place(2, gpus_per_actor=0.25)) == "on 8 actors with 0.25 GPU each"


def test_another_seed_gives_different_noise(teacher: str, reference: Path, tmp_path: Path):
    rollout(spec(teacher, tmp_path / "store", seed=1, guidance=(0.0,)))
    assert not np.array_equal(rows(tmp_path / "store", 0.0)["knot_00"], rows(reference, 0.0)["knot_00"])


def test_a_complete_store_is_unchanged(teacher: str, reference: Path, capsys: pytest.CaptureFixture[str]):
    before = {file: file.stat().st_mtime_ns for file in reference.rglob("*") if file.is_file()}
    rollout(spec(teacher, reference))
    assert "is complete with 200 rows" in capsys.readouterr().out
    assert before == {file: file.stat().st_mtime_ns for file in reference.rglob("*") if file.is_file()}


def test_a_store_grows_by_only_the_new_rows(
    teacher: str, reference: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    path = tmp_path / "store"
    rollout(spec(teacher, path, trajectories=40, guidance=(0.0,)))
    first = (path / "data/guidance=0.0/shard-000000.parquet").stat().st_mtime_ns
    capsys.readouterr()
    rollout(spec(teacher, path, trajectories=100, guidance=(0.0,)))
    assert "60 trajectories computed" in capsys.readouterr().out
    rollout(spec(teacher, path, trajectories=100, guidance=(1.0,)))
    assert "100 trajectories computed" in capsys.readouterr().out
    assert (path / "data/guidance=0.0/shard-000000.parquet").stat().st_mtime_ns == first
    for w in (0.0, 1.0):
        assert_same_rows(rows(reference, w), rows(path, w))
    opened = store.open(str(path))
    assert (opened.guidance, opened.rows(0.0), opened.rows(1.0)) == ((0.0, 1.0), 100, 100)


@pytest.mark.parametrize("damage", ["delete", "truncate", "flip"])
def test_only_a_damaged_shard_is_recomputed(
    teacher: str, reference: Path, tmp_path: Path, damage: str, capsys: pytest.CaptureFixture[str]
):
    path = tmp_path / "store"
    rollout(spec(teacher, path, guidance=(0.0,)))
    shard = path / "data/guidance=0.0/shard-000001.parquet"
    data = bytearray(shard.read_bytes())
    if damage == "delete":
        shard.unlink()
    elif damage == "truncate":
        shard.write_bytes(data[: len(data) // 2])
    else:  # without a manifest, only the page checksums detect the damage
        data[len(data) // 2] ^= 1
        shard.write_bytes(data)
        (path / "manifest.json").unlink()
    capsys.readouterr()
    rollout(spec(teacher, path, guidance=(0.0,)))
    assert "32 trajectories computed in 1 shards, 68 reused" in capsys.readouterr().out
    assert_same_rows(rows(reference, 0.0), rows(path, 0.0))


@pytest.mark.parametrize("options", [{}, {"knot_grid": "quadratic"}, {"time_factor": 0.9}, {"solver": "heun"}])
def test_the_last_knots_are_the_samples_with_the_same_options(teacher: str, tmp_path: Path, options: dict[str, Any]):
    rollout(spec(teacher, tmp_path / "store", guidance=(1.0,), **options))
    out = str(tmp_path / "samples.npz")
    sample(SampleSpec(model=teacher, out=out, count=100, steps=8, guidance=1.0, raw=True, **options))
    with np.load(out) as made:
        np.testing.assert_allclose(rows(tmp_path / "store", 1.0)["knot_04"], made["images"], atol=1e-5)


@pytest.mark.parametrize(
    ("clock", "grid", "factor"),
    [("linear", "uniform", 1.0), ("quadratic", "quadratic", 1.0), ("quadratic", "uniform", 0.5)],
)
def test_forward_rows_start_on_the_path_and_follow_the_teacher(
    tmp_path: Path, clock: str, grid: KnotGrid, factor: float
):
    from kac.path import PathConfig

    teacher = make_teacher(str(tmp_path / "teacher"), data="digits", path_config=PathConfig(clock=clock))
    path = tmp_path / "store"
    options = {"knot_grid": grid, "time_factor": factor}
    rollout(spec(teacher, path, source="forward", guidance=(0.5,), trajectories=64, **options))
    found, model = rows(path, 0.5), load_model(teacher)
    assert set(found["interval"]) == set(range(KNOTS))
    for i in (0, 5, 63):
        k = int(found["interval"][i])
        start, label = torch.tensor(found["knot_start"][i : i + 1]), torch.tensor(found["label"][i : i + 1]).long()
        with torch.inference_mode():
            field = guide(model.network, 0.5, label)
            times = knot_times(8, grid)[2 * k : 2 * k + 3]
            end = solve(lambda x, t: field(x, factor * t), start, times, "ab2").x  # noqa: B023
        np.testing.assert_allclose(found["knot_end"][i : i + 1], end.numpy(), atol=1e-5)
    at_noise = found["interval"] == 0
    x_1 = noise.noise(model.config.path.build(), 0, range(64), model.config.sample_shape).numpy()
    np.testing.assert_array_equal(found["knot_start"][at_noise], x_1[at_noise])


def test_a_different_spec_is_refused_with_the_names_of_the_fields(teacher: str, reference: Path):
    for options, field in (({"solver_steps": 16}, "solver_steps"), ({"seed": 5}, "seed"), ({"knots": 2}, "knots")):
        with pytest.raises(DistillKacError, match=field):
            rollout(spec(teacher, reference, **options))


def test_a_different_teacher_is_refused(reference: Path, tmp_path: Path):
    other = make_teacher(str(tmp_path / "other"), data="digits", seed=7)
    with pytest.raises(DistillKacError, match="teacher_sha256"):
        rollout(spec(other, reference))


def test_an_unfinished_store_of_a_different_spec_is_refused(teacher: str, tmp_path: Path):
    path = tmp_path / "store"
    rollout(spec(teacher, path, guidance=(0.0,)))
    (path / "manifest.json").unlink()
    with pytest.raises(DistillKacError, match="solver_steps"):
        rollout(spec(teacher, path, solver_steps=16))


@pytest.fixture
def without_collector() -> Iterator[None]:
    """Disable the garbage collector, which may not run for minutes in a process that makes few objects."""
    gc.disable()
    yield
    gc.enable()


@pytest.mark.parametrize("actors", [0, 1])
def test_nan_from_the_teacher_is_named_and_not_published(
    tmp_path: Path, ray_cluster: None, without_collector: None, actors: int
):
    broken = make_teacher(str(tmp_path / "teacher"), data="digits")
    model = load_model(broken)
    weights = model.network.state_dict()
    weights["label.weight"][3] = float("nan")
    save_model(broken, model.config, weights)
    with pytest.raises(DistillKacError, match=r"shard-00000\d.parquet .*NaN or infinity in samples \d+"):
        rollout(spec(broken, tmp_path / "store", actors=actors))
    assert wait_for_free_cpus()
    assert list((tmp_path / "store").rglob("*.parquet")) == []
    assert not (tmp_path / "store" / "manifest.json").exists()


def test_a_rollout_that_fails_in_the_driver_frees_its_cpus(
    teacher: str, tmp_path: Path, ray_cluster: None, without_collector: None, monkeypatch: pytest.MonkeyPatch
):
    def full(*_: object) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(rollout_stage, "SHARDS_PER_RECEIPT_FILE", 1)
    monkeypatch.setattr(rollout_stage, "write_receipts", full)
    with pytest.raises(OSError, match="No space") as kept:  # keeps the frames, as a notebook does
        rollout(spec(teacher, tmp_path / "store", actors=2))
    assert wait_for_free_cpus()
    del kept


def test_a_forward_rollout_refuses_data_that_changed_since_training(teacher: str, tmp_path: Path):
    model = load_model(teacher)
    config = model.config.model_copy(update={"data_sha256": "0" * 64})
    save_model(str(tmp_path / "teacher"), config, model.network.state_dict())
    with pytest.raises(DistillKacError, match=r"digits with sha256 0{12}"):
        rollout(spec(str(tmp_path / "teacher"), tmp_path / "store", source="forward"))
    rollout(spec(str(tmp_path / "teacher"), tmp_path / "store"))  # other rollouts do not need the data


def test_a_student_is_refused_as_a_teacher(teacher: str, tmp_path: Path):
    model = load_model(teacher)
    config = ModelConfig(**{**model.config.model_dump(), "kind": "student", "steps": 1, "guidance": 0.0})
    save_model(str(tmp_path / "student"), config, model.network.state_dict())
    with pytest.raises(DistillKacError, match="student"):
        rollout(spec(str(tmp_path / "student"), tmp_path / "store"))


def test_the_plan_contains_every_row_once(teacher: str, tmp_path: Path):
    plan = make_plan(spec(teacher, tmp_path / "none", trajectories=70, first_sample=64))
    for w in (0.0, 1.0):
        ids = [i for shard in plan.todo if shard.guidance == w for i in shard.ids]
        assert ids == list(range(64, 134))


def test_the_ledger_ends_endless_restarts():
    ledger = AttemptLedger(actors=1)
    assert [ledger.begin("shard-7") for _ in range(3)] == [False, True, True]
    assert [ledger.begin_suspect("shard-7") for _ in range(MAX_ATTEMPTS)] == [None] * MAX_ATTEMPTS
    assert "shard-7" in (ledger.begin_suspect("shard-7") or "")
    ledger = AttemptLedger(actors=1)
    refusals = [ledger.started() for _ in range(100)]
    assert refusals[MAX_ATTEMPTS] is None
    assert refusals[-1] is not None
    ledger = AttemptLedger(actors=1)
    for _ in range(100):
        assert ledger.started() is None
        assert not ledger.begin("shard-7")
        assert ledger.begin_suspect("shard-7") is None
        ledger.finish("shard-7")


def test_the_weights_of_the_teacher_are_checked_first(teacher: str, tmp_path: Path):
    import shutil

    copy = tmp_path / "teacher"
    shutil.copytree(teacher, copy)
    weights = safetensors.torch.load(files.read_bytes(str(copy / "model.safetensors")))
    weights["enter.bias"] += 1
    (copy / "model.safetensors").write_bytes(safetensors.torch.save(weights))
    with pytest.raises(DistillKacError, match=str(copy)):
        rollout(spec(str(copy), tmp_path / "store"))
    assert not (tmp_path / "store").exists()


def test_a_manifest_that_another_job_writes_at_the_same_time_is_merged(
    teacher: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The other job has read the manifest before this job's manifest exists, and replaces it."""
    path, written = tmp_path / "store", []
    rollout(spec(teacher, path, guidance=(0.0,)))
    others = (path / "manifest.json").read_bytes()
    write = plan_module.write_manifest

    def write_and_be_replaced(store: str, manifest: Manifest) -> None:
        write(store, manifest)
        written.append(manifest)
        if len(written) == 1:
            (path / "manifest.json").write_bytes(others)

    monkeypatch.setattr(plan_module, "write_manifest", write_and_be_replaced)
    rollout(spec(teacher, path, guidance=(1.0,)))
    assert len(written) == 2
    assert store.open(str(path)).guidance == (0.0, 1.0)
    monkeypatch.setattr(plan_module, "write_manifest", lambda *_: (path / "manifest.json").write_bytes(others))
    with pytest.raises(DistillKacError, match="other jobs keep changing the manifest"):
        rollout(spec(teacher, path, guidance=(2.0,)))

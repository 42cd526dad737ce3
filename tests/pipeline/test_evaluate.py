"""Evaluate: scores agree with independent computations, samples are cached, and one table feeds all outputs."""

import html
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.linalg
import torch
from mlflow import MlflowClient

from kac import noise as noises
from kac.data import DataConfig, all_rows, open_dataset
from kac.guidance import guide
from kac.metrics import QUALITY, QualityMetric
from kac.metrics.distances import kernel_distance
from kac.model import load_config, load_model
from kac.precision import Precision
from kac.sampling import teacher_sampling
from kac.solvers import KnotGrid, knot_times, solve
from kac.util.errors import DistillKacError, DivergedError
from pipeline import store, tracking
from pipeline.config import EvaluateSpec, SampleSpec
from pipeline.distill import distill
from pipeline.evaluate import compute, samples
from pipeline.evaluate.evaluate_stage import evaluate
from pipeline.evaluate.results import plotted
from pipeline.evaluate.scores import Score, mean_score, read_record, table
from pipeline.report.evaluation_page import write_evaluation_page
from pipeline.sample import sample
from tests.pipeline.stages import distill_spec, runs_of
from tests.pipeline.stores import make_teacher

SEED = 1_000_003
FLOOR = "frechet_distance_pixels_at_floor_count"


def small(teacher: str, out: Path, **options: Any) -> EvaluateSpec:
    """Return the spec of an evaluation in this process, with 300 samples of eight steps."""
    return EvaluateSpec(**{"samples": 300, "solver_steps": 8, "actors": 0, **options}, teacher=teacher, out=str(out))


@pytest.fixture(scope="module")
def evaluation(tmp_path_factory: pytest.TempPathFactory, teacher: str, student: str) -> Path:
    out = tmp_path_factory.mktemp("evaluations") / "evaluation"
    evaluate(small(teacher, out, students=(student,)))
    return out


def test_an_evaluation_scores_real_images_teacher_and_students(evaluation: Path, teacher: str, student: str):
    scores = json.loads((evaluation / "evaluation.json").read_text())["scores"]
    assert [(s["kind"], s["steps"], s["metrics"].get("nfe")) for s in scores] == [
        ("real", None, None),
        ("teacher", 8, 8),
        ("student", 2, 2),
    ]
    expected = {}
    for kind, steps, method in (("teacher", 8, "ab2"), ("student", 2, "euler")):
        expected[kind] = _independent_frechet(teacher if kind == "teacher" else student, steps, method)
    for score in scores[1:]:
        assert score["metrics"]["frechet_distance_pixels"] == pytest.approx(expected[score["kind"]], rel=1e-3)
    ratio = scores[2]["metrics"]["frechet_ratio_pixels"]
    assert ratio == pytest.approx(expected["student"] / expected["teacher"], rel=1e-3)
    names = set(read_record(str(evaluation)).metrics())
    of_students = {"frechet_ratio_pixels", "frechet_ratio_classifier", "endpoint_error"}
    assert set(scores[2]["metrics"]) == names
    assert set(scores[1]["metrics"]) == names - of_students
    assert set(scores[0]["metrics"]) == names - of_students - {"nfe", "images_per_second"}
    for picture in ("samples.png", "quality_by_nfe.png"):
        assert (evaluation / picture).read_bytes().startswith(b"\x89PNG")


def test_the_first_row_is_held_out_images_and_the_table_describes_its_data(evaluation: Path):
    record = read_record(str(evaluation))
    real, text = record.scores[0], table(record)
    assert real.name == "real images"
    assert real.metrics["memorisation"] == 1
    assert real.metrics["label_agreement"] == pytest.approx(record.facts["classifier"]["held_out_accuracy"], abs=0.02)
    assert all(real.metrics[f"frechet_distance_{s}"] < 0.1 for s in record.features)
    described = open_dataset(DataConfig(kind="moons")).description
    for part in (f"noise seed {SEED}", "300 delivered samples", described.sha256[:12], "818 held-out", "accuracy"):
        assert part in text
    assert len(text.splitlines()[0]) < 160


def test_a_teacher_is_evaluated_at_the_given_guidance_scales(tmp_path: Path):
    teacher = make_teacher(tmp_path / "teacher", seed=3)
    scores = evaluate(small(teacher, tmp_path / "out", guidance=(1.0, 0.5), features=("pixels",)))
    assert [(score.name, score.metrics.get("nfe")) for score in scores] == [
        ("real images", None),
        ("teacher w=0", 8),
        ("teacher w=0.5", 16),
        ("teacher w=1", 16),
    ]
    assert len({score.metrics["frechet_distance_pixels"] for score in scores}) == 4


def test_the_table_names_models_that_copy_training_images(evaluation: Path):
    record = read_record(str(evaluation))
    real, *models = record.scores
    copying = [score.model_copy(update={"metrics": {**score.metrics, "memorisation": 0.8}}) for score in models[:1]]
    others = [score.model_copy(update={"metrics": {**score.metrics, "memorisation": 0.99}}) for score in models[1:]]
    text = table(record.model_copy(update={"scores": (real, *copying, *others)}))
    (line,) = [line for line in text.splitlines() if line.startswith("nearer to the training images")]
    assert f"{models[0].name} (memory ratio 0.800)" in line
    assert "0.990" not in line
    assert "nearer to the training" not in table(record.model_copy(update={"scores": (real, *others)}))


def test_endpoint_error_is_the_root_mean_square_per_coordinate(evaluation: Path, teacher: str, student: str):
    difference = _samples(teacher, 8, "ab2") - _samples(student, 2, "euler")
    error = float(difference.square().mean().sqrt())
    assert read_record(str(evaluation)).scores[2].metrics["endpoint_error"] == pytest.approx(error, rel=1e-4)


def test_models_are_compared_with_held_out_images(evaluation: Path, teacher: str, student: str):
    held_out = samples.RealImages(DataConfig(kind="moons"), "", "held_out", 300).rows(range(300)).images
    models = (_samples(teacher, 8, "ab2"), _samples(student, 2, "euler"))
    for score, images in zip(read_record(str(evaluation)).scores[1:], models, strict=True):
        expected = kernel_distance(held_out, images.float())
        assert score.metrics["kid_pixels_to_held_out"] == pytest.approx(expected, rel=1e-4)


def test_metrics_use_delivered_images(tmp_path: Path):
    """Most digits of an untrained teacher are out of range, and there are fewer held-out images than samples."""
    model = make_teacher(tmp_path / "digits", "digits", seed=2)
    evaluate(small(model, tmp_path / "out", samples=800, features=("pixels",)))
    sample(SampleSpec(model=model, out=str(tmp_path / "x.npz"), count=800, steps=8, seed=SEED))
    with np.load(tmp_path / "x.npz") as made:
        images = torch.from_numpy(made["images"]).flatten(1).double().numpy()
    train = all_rows(open_dataset(DataConfig()).train).images.flatten(1).double().numpy()
    record = read_record(str(tmp_path / "out"))
    assert record.scores[1].metrics["frechet_distance_pixels"] == pytest.approx(_frechet(train, images), rel=1e-2)
    blocks = [_frechet(train, images[:355]), _frechet(train, images[355:710])]
    at_floor = record.scores[1].metrics["frechet_distance_pixels_at_floor_count"]
    assert at_floor == pytest.approx(np.mean(blocks), rel=1e-2)
    assert [score.count for score in record.scores] == [355, 800]
    assert "@355" in table(record)


def test_the_teacher_is_sampled_on_the_requested_grid(teacher: str, tmp_path: Path):
    options = {"knot_grid": "quadratic", "solver_steps": 3, "features": ("pixels",)}
    evaluate(small(teacher, tmp_path / "cached", **options))  # its samples must not be used below
    evaluate(small(teacher, tmp_path / "out", time_factor=0.9, **options))
    record = read_record(str(tmp_path / "out"))
    assert record.scores[1].prefix == "quadratic/time_factor_0.9/steps_3/", "runs keep the metrics of other options"
    assert "the teacher's solver is ab2 on a quadratic grid, with time factor 0.9" in table(record)
    found = record.scores[1].metrics["frechet_distance_pixels"]
    assert found == pytest.approx(_independent_frechet(teacher, 3, "ab2", "quadratic", 0.9), rel=1e-3)
    for others in (("uniform", 0.9), ("quadratic", 1.0)):
        assert found != pytest.approx(_independent_frechet(teacher, 3, "ab2", *others), rel=1e-2)


def _samples(path: str, steps: int, method: str, grid: KnotGrid = "uniform", factor: float = 1.0) -> torch.Tensor:
    model, data = load_model(path), open_dataset(DataConfig(kind="moons"))
    noise = noises.noise(model.config.path.build(), SEED, range(300), (2,))
    label = noises.labels(SEED, range(300), data.description.class_frequencies)
    with torch.inference_mode():
        velocity = guide(model.network, 0.0, label)
        return solve(lambda x, t: velocity(x, factor * t), noise, knot_times(steps, grid), method).x.double()


def _independent_frechet(path: str, steps: int, method: str, *others: Any) -> float:
    real = all_rows(open_dataset(DataConfig(kind="moons")).train).images.double().numpy()
    return _frechet(real, _samples(path, steps, method, *others).numpy())


def _frechet(real: np.ndarray, fake: np.ndarray) -> float:
    root = scipy.linalg.sqrtm(np.cov(real.T) @ np.cov(fake.T)).real
    gap = real.mean(0) - fake.mean(0)
    return float(gap @ gap + np.trace(np.cov(real.T) + np.cov(fake.T) - 2 * root))


def test_an_any_step_student_of_all_scales_has_a_row_per_step_count_and_scale(
    teacher: str, small_store: str, tmp_path: Path
):
    objective = {"kind": "flow-map", "grids": (1, 2, 4)}
    distill(distill_spec(small_store, tmp_path / "every", objective=objective, guidance="all"))
    options = {"students": (str(tmp_path / "every"),), "steps": (1, 2)}
    scores = evaluate(small(teacher, tmp_path / "out", **options))
    assert [(s.name, s.steps, s.guidance) for s in scores if s.kind == "student"] == [
        ("every@2 w=0", 2, 0.0),
        ("every@1 w=0", 1, 0.0),
        ("every@2 w=1", 2, 1.0),
        ("every@1 w=1", 1, 1.0),
    ]
    assert [s.guidance for s in scores if s.kind == "teacher"] == [0.0, 1.0]
    assert {s.any_step for s in scores if s.kind == "student"} == {"every"}
    between = evaluate(small(teacher, tmp_path / "between", **options, guidance=(0.5,)))
    assert [s.guidance for s in between if s.kind == "student"] == [0.5, 0.5]
    with pytest.raises(DistillKacError, match=r"`guidance`.*2"):
        evaluate(small(teacher, tmp_path / "beyond", **options, guidance=(2.0,)))


def test_the_table_names_students_that_were_trained_in_its_features(teacher: str, small_store: str, tmp_path: Path):
    distill(distill_spec(small_store, tmp_path / "refined", refine={"kind": "data", "spaces": ("pixels", "random")}))
    evaluate(small(teacher, tmp_path / "out", students=(str(tmp_path / "refined"),)))
    assert "pixels (refined)" in table(read_record(str(tmp_path / "out")))


def test_runs_are_linked_by_fingerprints(evaluation: Path, student: str, small_store: str, teacher: str):
    config, manifest = load_config(student), store.read_manifest(small_store)
    assert manifest is not None
    run = next(run for run in runs_of("evaluate") if config.fingerprint in run.data.tags.values())
    distilled = next(run for run in runs_of("distill") if run.data.tags[tracking.FINGERPRINT_TAG] == config.fingerprint)
    assert distilled.data.tags[f"{tracking.INPUT_TAG}rollout"] == manifest.fingerprint
    assert distilled.data.tags[f"{tracking.INPUT_TAG}teacher"] == load_config(teacher).weights_sha256
    children = [r for r in runs_of("evaluate-model") if r.data.tags["mlflow.parentRunId"] == run.info.run_id]
    assert {child.data.metrics.get("nfe") for child in children} == {None, 8.0}, "each student has its own run"
    for child in children:
        assert set(child.data.metrics) <= set(tracking.METRICS)
        assert [file.path for file in MlflowClient().list_artifacts(child.info.run_id)] == ["samples.png"]
    assert run.info.status == "FINISHED"


def test_an_evaluation_refuses_a_student_of_a_different_teacher(student: str, tmp_path: Path):
    other = make_teacher(tmp_path / "other", seed=5)
    with pytest.raises(DistillKacError, match="another teacher"):
        evaluate(small(other, tmp_path / "out", students=(student,)))
    with pytest.raises(DistillKacError, match=r"none .*config.json"):
        evaluate(small(other, tmp_path / "out", students=(str(tmp_path / "none"),)))


def test_a_complete_evaluation_is_not_repeated(
    evaluation: Path, teacher: str, student: str, capsys: pytest.CaptureFixture[str]
):
    spec = small(teacher, evaluation, students=(student,))
    assert evaluate(spec) == list(read_record(str(evaluation)).scores)
    assert f"{evaluation} is complete" in capsys.readouterr().out


def test_an_evaluation_of_different_features_or_an_older_version_is_refused(
    evaluation: Path, teacher: str, student: str
):
    with pytest.raises(DistillKacError, match="features"):
        evaluate(small(teacher, evaluation, students=(student,), features=("pixels",)))
    record = json.loads((evaluation / "evaluation.json").read_text())
    record.pop("features")
    old = evaluation.parent / "old"
    old.mkdir()
    (old / "evaluation.json").write_text(json.dumps(record))
    with pytest.raises(DistillKacError, match=r"old/evaluation.json .*older version"):
        read_record(str(old))


def test_a_new_metric_is_one_line_for_table_log_and_report(
    teacher: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def mean(judged):
        return float(judged.statistics["pixels"].moments.mean.mean())

    brightness = QualityMetric("brightness", "mean of all values", "bright", "+.5f", "", True, compute=mean)
    monkeypatch.setattr("kac.metrics.quality.QUALITY", [*QUALITY, brightness])
    *_, score = evaluate(small(teacher, tmp_path, samples=50, features=("pixels",)))
    assert f"{score.metrics['brightness']:+.5f}" in table(read_record(str(tmp_path))).splitlines()[4]
    logged = [run.data.metrics["brightness"] for run in runs_of("evaluate-model") if "brightness" in run.data.metrics]
    assert score.metrics["brightness"] in logged
    write_evaluation_page(str(tmp_path / "page.html"), "t", str(tmp_path), {}, "sqlite:///mlflow.db")
    assert "mean of all values" in (tmp_path / "page.html").read_text()
    del tracking.METRICS["brightness"]


def test_samples_are_drawn_once_for_all_batch_sizes(
    teacher: str, student: str, evaluation: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(samples, "draw", lambda *args, **options: pytest.fail("drawn again"))
    again = evaluate(small(teacher, tmp_path, batch_size=7, students=(student,)))
    assert [s.metrics for s in again] == [s.metrics for s in read_record(str(evaluation)).scores]


def test_metrics_do_not_depend_on_the_chunk_size(teacher: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    metrics = []
    for rows in (1000, 64):
        monkeypatch.setattr(samples, "CHUNK_ROWS", rows)
        monkeypatch.setenv("DISTILLKAC_CACHE", str(tmp_path / f"cache-{rows}"))
        *_, score = evaluate(small(teacher, tmp_path / str(rows), features=("pixels",)))
        metrics.append({name: value for name, value in score.metrics.items() if name != "images_per_second"})
    assert metrics[0] == pytest.approx(metrics[1], rel=1e-4)


def test_several_noise_seeds_give_a_mean_and_its_interval(teacher: str, tmp_path: Path):
    single = [evaluate(small(teacher, tmp_path / str(i), seed=SEED + i, features=("pixels",)))[1] for i in range(3)]
    score = evaluate(small(teacher, tmp_path / "three", seeds=3, features=("pixels",)))[1]
    values = [s.metrics["frechet_distance_pixels"] for s in single]
    assert score.metrics["frechet_distance_pixels"] == pytest.approx(np.mean(values))
    half_width = 4.302653 * np.std(values, ddof=1) / 3**0.5  # Student's t with two degrees of freedom
    assert score.half_widths["frechet_distance_pixels"] == pytest.approx(half_width, rel=1e-5)
    record = read_record(str(tmp_path / "three"))
    assert f"{np.mean(values):.4f} ±{half_width:.4f}" in table(record)
    assert f"noise seeds {SEED} .. {SEED + 2}" in table(record)


def test_one_seed_has_no_interval():
    score = Score(name="a", kind="teacher", steps=1, guidance=0.0, count=2, metrics={"nfe": 1.0}, fingerprint="f")
    assert mean_score([score]) == score


class DyingActor(compute.ChunkActor):
    """Kills its process at the first chunk of the first actor."""

    def make(self, chunk: samples.Chunk) -> int:
        has_died = Path(os.environ["DISTILLKAC_CACHE"]) / "has-died"
        if not has_died.exists():
            has_died.touch()
            os._exit(1)
        return super().make(chunk)


def test_actors_give_the_same_scores_as_this_process(
    teacher: str, student: str, tmp_path: Path, ray_cluster: None, monkeypatch: pytest.MonkeyPatch
):
    """The scores are the same even if an actor dies during the evaluation."""
    monkeypatch.setattr(compute, "ChunkActor", DyingActor)
    halves = "tests.kac.test_features:Halves"
    spec = {"samples": 1100, "seed": 5, "students": (student,), "features": ("pixels", halves)}
    there = evaluate(small(teacher, tmp_path / "there", actors=2, **spec))
    assert (Path(os.environ["DISTILLKAC_CACHE"]) / "has-died").exists()
    monkeypatch.setenv("DISTILLKAC_CACHE", str(tmp_path / "cache"))
    here = evaluate(small(teacher, tmp_path / "here", **spec))
    for a, b in zip(there, here, strict=True):
        names = set(a.metrics) - {"images_per_second"}
        assert {n: a.metrics[n] for n in names} == pytest.approx({n: b.metrics[n] for n in names}, rel=1e-3)


def test_a_cache_that_nodes_do_not_share_is_refused(teacher: str, tmp_path: Path):
    with pytest.raises(DistillKacError, match="DISTILLKAC_CACHE"):
        compute.ChunkActor(["pixels"], DataConfig(kind="moons"), ["another network's"])
    sampling = teacher_sampling(load_config(teacher), 0.0, 8)
    not_cached = samples.ModelSamples(teacher, load_config(teacher), sampling, Precision(), 77, 10, 10)
    with pytest.raises(DistillKacError, match="DISTILLKAC_CACHE"):
        not_cached.rows(range(10))


def test_a_model_that_gives_infinite_values_is_refused(tmp_path: Path):
    model = make_teacher(tmp_path / "bad", "moons")
    config, network = load_config(model), load_model(model).network
    from kac.model import save_model

    weights = {name: torch.full_like(value, 1e38) for name, value in network.state_dict().items()}
    save_model(model, config, weights)
    with pytest.raises(DivergedError):
        evaluate(small(model, tmp_path / "out"))


@pytest.mark.parametrize("kind", ["samples", "features"])
def test_a_damaged_file_of_the_cache_is_named(kind: str, teacher: str, monkeypatch, tmp_path: Path):
    monkeypatch.setenv("DISTILLKAC_CACHE", str(tmp_path / "cache"))
    features = ("pixels",) if kind == "samples" else ("classifier",)
    evaluate(small(teacher, tmp_path / "first", features=features))
    whole = {path: path.read_bytes() for path in (tmp_path / "cache" / kind).rglob("*.np*")}
    assert whole
    for n, damage in enumerate((lambda d: d[:-40], lambda d: b"", lambda d: d[:90] + b"\xff" * 8 + d[98:])):
        for path, data in whole.items():
            path.write_bytes(damage(data))
        with pytest.raises(DistillKacError, match=rf"cache/{kind}/.*damaged") as caught:
            evaluate(small(teacher, tmp_path / f"again-{n}", batch_size=300, features=features))
        assert "\n" not in str(caught.value)


def test_the_curve_shows_metrics_at_the_count_of_real_images(evaluation: Path):
    record = read_record(str(evaluation))
    assert [metric.name for metric in plotted(record)][:2] == [f"frechet_distance_{s}" for s in record.features]
    scores = [score.model_copy(update={"metrics": {**score.metrics, FLOOR: 0.75}}) for score in record.scores]
    fewer = record.model_copy(update={"floor_count": 100, "scores": tuple(scores)})
    assert plotted(fewer)[0].name == FLOOR


def test_the_report_is_self_contained(evaluation: Path, student: str, tmp_path: Path):
    page = tmp_path / "report.html"
    sections = {"distill": str(Path(student) / "spec.json")}
    write_evaluation_page(str(page), "a <test>", str(evaluation), sections, "sqlite:////somewhere/mlflow.db")
    text = page.read_text()
    assert text.count("data:image/png;base64,") == 2
    assert 'src="http' not in text and "href=" not in text
    for part in (
        "a &lt;test&gt;",
        "mlflow ui --backend-store-uri sqlite:////somewhere/mlflow.db",
        "learning_rate",
        "two",
        *(html.escape(metric.meaning) for metric in read_record(str(evaluation)).metrics().values()),
    ):
        assert part in text

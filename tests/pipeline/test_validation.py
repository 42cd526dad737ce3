"""Validation during training: its metrics, its interval, and that it does not affect training."""

from pathlib import Path
from typing import Any

import pytest
import torch

from kac.data import DataConfig, open_dataset
from kac.model import load_config, load_model
from kac.sampling import BATCH_SIZE, Samples, generate, student_sampling
from kac.util.errors import DistillKacError
from kac.util.images import delivered
from pipeline import decode, store
from pipeline.config import OptimizerConfig
from pipeline.distill import distill, plan_student
from pipeline.teach import teach
from pipeline.training import Validation, validation
from pipeline.training.validation import ENDPOINT_ERROR, ENERGY_DISTANCE
from tests.pipeline.stages import FEW, distill_spec, metrics_of, teach_spec, weights


@pytest.mark.parametrize(
    ("every", "updates", "due"),
    [
        (None, 2000, list(range(200, 2001, 200))),
        (None, 60, [50, 60]),
        (7, 20, [7, 14, 20]),
        (0, 20, []),
    ],
)
def test_validation_intervals(every: int | None, updates: int, due: list[int], teacher: str):
    validation = Validation(every, load_config(teacher), OptimizerConfig(updates=updates))
    assert [n for n in range(1, updates + 1) if validation.is_due(n)] == due


def test_validation_costs_a_small_part_of_training(teacher: str):
    config = load_config(teacher)  # a teacher is sampled in 20 steps
    for updates, batch_size, samples in ((10_000, 256, 1920), (4000, 128, 384), (1000, 64, 256)):
        validation = Validation(None, config, OptimizerConfig(updates=updates, batch_size=batch_size))
        assert validation.samples == samples
        assert validation.is_due(updates)
    tiny = OptimizerConfig(updates=4, batch_size=8)
    assert not Validation(None, config, tiny).is_due(4), "one validation would take longer than training"
    assert Validation(2, config, tiny).is_due(4)


def test_validation_is_reported_and_logged_and_changes_no_weight(small_store: str, tmp_path: Path):
    reports: list[dict[str, Any]] = []
    spec = distill_spec(
        small_store, tmp_path / "validated", validation_updates=20, checkpoint_updates=30, held_out_rows=40
    )
    distill(spec.model_copy(update={"out": str(tmp_path / "not"), "validation_updates": 0}))
    config = distill(spec, on_report=reports.append)
    assert weights(tmp_path / "validated") == weights(tmp_path / "not")
    assert [report["update"] for report in reports] == [20, 30, 40, 60]
    assert reports[1][ENERGY_DISTANCE] == reports[0][ENERGY_DISTANCE] != reports[2][ENERGY_DISTANCE]
    assert config is not None
    for name in (ENERGY_DISTANCE, ENDPOINT_ERROR):
        logged = [(point.step, point.value) for point in metrics_of("distill", config.fingerprint, name)]
        assert {step for step, _ in logged} == {20, 40, 60}
        assert logged[-1][1] == pytest.approx(reports[-1][name])


@pytest.mark.parametrize("error", [DistillKacError("d: expected files"), PermissionError(13, "denied")])
def test_a_student_is_trained_even_if_the_images_cannot_be_read(
    error: Exception,
    small_store: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    def refuse(config: DataConfig) -> None:
        raise error

    validation._real_images.cache_clear()
    monkeypatch.setattr(validation, "open_dataset", refuse)
    monkeypatch.setattr(decode, "begin_decoding", refuse)
    config = distill(distill_spec(small_store, tmp_path, validation_updates=20, held_out_rows=40))
    assert config is not None
    assert metrics_of("distill", config.fingerprint, ENDPOINT_ERROR)
    assert metrics_of("distill", config.fingerprint, ENERGY_DISTANCE) == []
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("validation: "))
    assert line.endswith(str(error))
    validation._real_images.cache_clear()


def test_validation_images_are_decoded_before_any_worker_starts(
    small_store: str, teacher: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    decoded: list[DataConfig] = []
    monkeypatch.setattr(decode, "begin_decoding", decoded.append)
    plan_student(distill_spec(small_store, tmp_path, validation_updates=0))
    assert decoded == []
    plan_student(distill_spec(small_store, tmp_path))
    assert decoded == [load_config(teacher).data]


def test_the_endpoint_error_is_measured_on_held_out_rows(small_store: str, tmp_path: Path):
    reports: list[dict[str, Any]] = []
    config = distill(distill_spec(small_store, tmp_path / "out", held_out_rows=40), on_report=reports.append)
    assert config is not None
    source = store.open(small_store)
    whole = next(source.batches(source.rows(0.0), 0.0, [0, 4]))
    network = load_model(str(tmp_path / "out")).network
    images = generate(network, whole.knots[-40:, 0], whole.label[-40:], student_sampling(config)).x
    expected = (delivered(images) - delivered(whole.knots[-40:, 1])).square().mean().sqrt()
    assert reports[-1][ENDPOINT_ERROR] == pytest.approx(float(expected), rel=1e-5)


def test_held_out_rows_are_not_learned(small_store: str, ray_cluster: None):
    source = store.open(small_store)
    rows = source.rows(0.0)
    assert rows > source.identity.shard_size > 1
    for count in (0, 1, source.identity.shard_size + 3):
        kept = source.without_last(count)
        learned = torch.cat([batch.sample_id for batch in kept.batches(64, 0.0, [0], seed=3)])
        assert sorted(learned.tolist()) == list(range(rows - count))
        streamed = torch.cat([b.sample_id for b in kept.batches(64, 0.0, [0], seed=3, memory_bytes=1)])
        assert sorted(streamed.tolist()) == list(range(rows - count))
        if count:
            assert source.last(count, 0.0, ["sample_id"])["sample_id"].tolist() == list(range(rows - count, rows))
    with pytest.raises(DistillKacError, match=f"{rows:,}"):
        source.without_last(rows)


def test_held_out_rows_change_the_fingerprint_of_a_student(small_store: str, tmp_path: Path):
    spec = distill_spec(small_store, tmp_path / "out")
    assert spec.fingerprint() == spec.model_copy(update={"held_out_rows": 0}).fingerprint()
    assert spec.fingerprint() != spec.model_copy(update={"held_out_rows": 1}).fingerprint()


def test_a_teacher_is_validated(tmp_path: Path):
    config = teach(teach_spec(tmp_path / "teacher", validation_updates=5))
    assert config is not None
    values = [point.value for point in metrics_of("teach", config.fingerprint, ENERGY_DISTANCE)]
    assert len(values) == FEW.updates // 5
    assert values[-1] < 0.5 * values[0]


def test_validation_samples_in_batches_of_limited_size(teacher: str):
    config, network, sizes = load_config(teacher), load_model(teacher).network, []
    network.register_forward_pre_hook(lambda network, given: sizes.append(len(given[0])))
    Validation(None, config, OptimizerConfig(updates=10_000, batch_size=256)).measure(network)  # 1,920 samples
    assert max(sizes) == BATCH_SIZE < 1920
    assert sum(sizes) == 1920 * validation.TEACHER_STEPS


def test_real_images_have_an_energy_distance_of_one(teacher: str, monkeypatch: pytest.MonkeyPatch):
    config = load_config(teacher)
    rows, count = open_dataset(config.data).train, 800

    def distance(shift: float) -> float:
        real = rows.rows(torch.randperm(len(rows), generator=torch.Generator().manual_seed(1))[:count])
        drawn = Samples(delivered(real.images + shift), real.labels, 1, 1.0)
        monkeypatch.setattr(validation, "draw", lambda *args: drawn)
        return Validation(1, config, OptimizerConfig()).measure(load_model(teacher).network)[ENERGY_DISTANCE]

    assert distance(0) == pytest.approx(1, abs=1)  # noisy for points in two dimensions
    assert distance(0.1) > 2
    assert distance(0.3) > 4 * distance(0.1)

"""Teach: the spec determines the teacher."""

import os
import re
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from mlflow import MlflowClient

from kac.data import DataConfig, all_rows, open_dataset
from kac.model import load_config, load_model, main_weights
from kac.networks import MLPConfig, UNetConfig
from kac.util.errors import ArgumentError, DistillKacError, DivergedError
from pipeline import store, tracking, training
from pipeline.distill import distill
from pipeline.teach import TeachTask, teach
from pipeline.tracking import TrackedRun
from tests.pipeline.stages import DIVERGING, FEW, distill_spec, metrics_of, run_of, runs_of, teach_spec, weights
from tests.pipeline.stores import make_store

MODULE = sys.modules["pipeline.teach"]
"""The module ``teach``, because the package's attribute ``teach`` is a function."""


def test_the_spec_determines_the_teacher(tmp_path: Path):
    for name, options in {"a": {}, "b": {}, "other": {"seed": 1}}.items():
        teach(teach_spec(tmp_path / name, **options))
    assert weights(tmp_path / "a") == weights(tmp_path / "b") != weights(tmp_path / "other")
    config = load_config(str(tmp_path / "a"))
    assert (config.kind, config.data.kind, config.sample_shape, config.num_classes) == ("teacher", "moons", (2,), 2)
    assert not (tmp_path / "a" / "training").exists()


def test_training_lowers_the_loss(tmp_path: Path):
    longer = FEW.model_copy(update={"updates": 300})
    teach(teach_spec(tmp_path / "teacher", optimizer=longer))
    losses = [
        metric.value for metric in metrics_of("teach", load_config(str(tmp_path / "teacher")).fingerprint, "loss")
    ]
    assert len(losses) == 6
    assert losses[-1] < 0.9 * losses[0]


def test_a_failed_stage_ends_its_run_as_failed(tmp_path: Path):
    with pytest.raises(DistillKacError):
        teach(teach_spec(tmp_path / "out", optimizer=DIVERGING, seed=99))
    run = next(run for run in runs_of("teach") if run.data.params["seed"] == "99")
    assert run.info.status == "FAILED"


def test_held_out_images_are_not_trained_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    data = open_dataset(DataConfig(kind="moons"))
    held_out = {tuple(image.tolist()) for image in all_rows(data.held_out).images}
    seen = []

    def spy(network, path, x_0, t, label, *rest):
        seen.extend(tuple(image.tolist()) for image in x_0)
        return (network(x_0, t, label) - x_0).square().mean()

    monkeypatch.setattr(MODULE, "flow_matching_loss", spy)
    teach(teach_spec(tmp_path / "out"))
    assert len(seen) == FEW.updates * FEW.batch_size
    assert len(set(seen)) == data.description.train
    assert not held_out & set(seen)


def test_random_numbers_do_not_depend_on_the_split_of_the_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The parts split the whole batch's rows, times and dropped labels. Only the path's noise depends on the slot."""
    batches: dict[tuple[int, int], list[tuple[torch.Tensor, ...]]] = {}
    for workers, accumulation in ((1, 1), (1, 4), (2, 2), (4, 1)):
        drawn = batches.setdefault((workers, accumulation), [])

        def spy(network, path, x_0, t, label, noise, to=drawn):
            to.append((x_0, t, label, torch.rand(3, generator=noise)))
            return network(x_0, t, label).sum()

        monkeypatch.setattr(MODULE, "flow_matching_loss", spy)
        optimizer = FEW.model_copy(update={"accumulation": accumulation})
        for rank in range(workers):
            task = TeachTask(teach_spec(tmp_path, optimizer=optimizer))
            task.build(training.Worker(rank, workers, torch.device("cpu"))).update(3)
    whole, parts = batches.pop((1, 1)), batches.pop((1, 4))
    for other in batches.values():
        assert all(torch.equal(a, b) for p, q in zip(parts, other, strict=True) for a, b in zip(p, q, strict=True))
    for k in range(3):
        assert torch.equal(torch.stack([part[k] for part in parts], dim=1).flatten(0, 1), whole[0][k])
    assert len({tuple(noise.tolist()) for *_, noise in parts}) == 4


def test_a_tenth_of_the_labels_is_dropped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    labels = []

    def spy(network, path, x_0, t, label, noise):
        labels.append(label)
        return network(x_0, t, label).sum()

    monkeypatch.setattr(MODULE, "flow_matching_loss", spy)
    learner = TeachTask(teach_spec(tmp_path)).build(training.Worker(0, 1, torch.device("cpu")))
    for update in range(100):
        learner.update(update)
    assert (torch.cat(labels) == 2).double().mean().item() == pytest.approx(0.1, abs=0.02)


def test_half_of_the_images_are_flipped_and_a_pass_reads_only_its_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The memory that training needs does not grow with the data."""
    digits, requested, seen = open_dataset(DataConfig(kind="digits")), [], []

    class Watched:
        def __len__(self):
            return len(digits.train)

        def rows(self, ids):
            requested.append(len(ids))
            seen.append(digits.train.rows(ids).images)
            return digits.train.rows(ids)

    given = []

    def spy(network, path, x_0, t, label, noise):
        given.append(x_0)
        return network(x_0, t, label).sum()

    monkeypatch.setattr(MODULE, "flow_matching_loss", spy)
    monkeypatch.setattr(MODULE, "open_dataset", lambda config: replace(digits, train=Watched()))
    flipping = DataConfig.model_construct(kind="digits", horizontal_flip=True)
    spec = teach_spec(tmp_path, data="digits", optimizer=FEW.model_copy(update={"accumulation": 2}))
    spec = spec.model_copy(update={"data": flipping})
    learner = TeachTask(spec).build(training.Worker(0, 1, torch.device("cpu")))
    for update in range(20):
        learner.update(update)
    assert requested == [FEW.batch_size // 2] * 40
    images, inputs = torch.cat(seen), torch.cat(given)
    is_same, is_flipped = ((inputs == other).flatten(1).all(1) for other in (images, images.flip(-1)))
    assert (is_same | is_flipped).all()
    assert is_flipped.double().mean().item() == pytest.approx(0.5, abs=0.06)


def curve(out: Path) -> list[float]:
    return [metric.value for metric in metrics_of("teach", load_config(str(out)).fingerprint, "loss")]


def test_two_workers_have_the_loss_curve_of_one_worker(tmp_path: Path, ray_cluster: None):
    """The curves are equal up to rounding if one worker uses two passes, and up to different noise if it uses one."""
    optimizer = FEW.model_copy(update={"updates": 200, "batch_size": 256})
    in_passes = optimizer.model_copy(update={"accumulation": 2})
    teach(teach_spec(tmp_path / "two workers", optimizer=optimizer, seed=5, workers=2))
    teach(teach_spec(tmp_path / "two passes", optimizer=in_passes, seed=5))
    two_workers = curve(tmp_path / "two workers")
    teach(teach_spec(tmp_path / "whole", optimizer=optimizer.model_copy(update={"beta2": 0.9901}), seed=5))
    assert len(two_workers) == 4
    assert two_workers == pytest.approx(curve(tmp_path / "two passes"), rel=1e-4)
    assert two_workers == pytest.approx(curve(tmp_path / "whole"), rel=0.05)


def test_dropout_is_the_same_after_a_resume(tmp_path: Path):
    class Stopped(Exception):
        pass

    def stop(metrics):
        raise Stopped

    unet = UNetConfig(channels=(8,), blocks=1, groups=4, dropout=0.5)
    few = FEW.model_copy(update={"updates": 4, "batch_size": 4, "warmup_updates": 0})
    weights_of = []
    for name in ("whole", "stopped"):
        spec = teach_spec(tmp_path / name, data="digits", network=unet, optimizer=few)
        job = training.Job(TeachTask(spec), "test", spec.out, Untracked("", ""), 2)
        if name == "stopped":
            with pytest.raises(Stopped):
                training.train(job, training.WorkerGroup(0), stop)
        weights_of.append(training.train(job, training.WorkerGroup(0)))
    assert all(torch.equal(value, weights_of[1][name]) for name, value in weights_of[0].items())


@dataclass(frozen=True)
class LateTask(TeachTask):
    """A task that must resume at update ``first`` or later."""

    first: int = 0

    def build(self, worker: training.Worker) -> training.Learner:
        learner = super().build(worker)
        original = learner.losses

        def losses(network, micro):
            assert micro.update >= self.first
            return original(network, micro)

        learner.losses = losses
        return learner


def test_training_moves_between_one_process_and_workers(tmp_path: Path, ray_cluster: None):
    class Stopped(Exception):
        pass

    def stop(metrics: Any) -> None:
        raise Stopped

    spec, half = teach_spec(tmp_path / "moved", optimizer=FEW), FEW.updates // 2
    start, middle, end = (
        training.Job(LateTask(spec, first), "test", spec.out, Untracked("", ""), half)
        for first in (0, half, FEW.updates)
    )
    with pytest.raises(Stopped):
        training.train(start, training.WorkerGroup(0), stop)
    on_workers = training.train(middle, training.WorkerGroup(1))
    (tmp_path / "moved" / "training" / "state.pt").unlink()
    here = training.train(end, training.WorkerGroup(0))
    whole = training.train(replace(start, out=str(tmp_path / "whole")), training.WorkerGroup(0))
    for name, value in whole.items():
        assert torch.equal(here[name], on_workers[name])
        torch.testing.assert_close(on_workers[name], value, rtol=1e-3, atol=1e-4)


@dataclass(frozen=True)
class DyingTask(TeachTask):
    """A task whose second worker dies once, during update ``dies_at``."""

    dies_at: int = -1
    mark: str = ""

    def build(self, worker: training.Worker) -> training.Learner:
        learner = super().build(worker)
        original = learner.losses

        def losses(network, micro):
            if micro.update == self.dies_at and worker.rank == 1 and not Path(self.mark).exists():
                Path(self.mark).touch()
                os._exit(1)
            return original(network, micro)

        learner.losses = losses
        return learner


def test_two_workers_with_one_killed_train_the_same_unet_as_one_process(tmp_path: Path, ray_cluster: None):
    """The weights are equal up to rounding, with dropout. The single process makes two passes per update."""
    unet = UNetConfig(channels=(8, 16), blocks=1, groups=4, dropout=0.1)
    few = FEW.model_copy(update={"updates": 6, "batch_size": 8, "warmup_updates": 0})
    spec = teach_spec(tmp_path / "single", data="digits", network=unet, optimizer=few)
    in_passes = spec.model_copy(update={"optimizer": few.model_copy(update={"accumulation": 2})})
    here = training.Job(TeachTask(in_passes), "test", spec.out, Untracked("", ""), 2)
    single = training.train(here, training.WorkerGroup(0))
    mark = tmp_path / "killed"
    dying = DyingTask(spec, dies_at=3, mark=str(mark))
    # This job also saves checkpoints by time, on which the two workers must agree.
    there = training.Job(dying, "test", str(tmp_path / "distributed"), Untracked("", ""), 2, checkpoint_seconds=0.5)
    distributed = training.train(there, training.WorkerGroup(2))
    assert mark.exists()
    assert single.keys() == distributed.keys()
    for name, value in single.items():
        # Attention does not depend on the bias of its keys, so its gradient is only rounding, which Adam scales up.
        if not name.endswith("to_k.bias"):
            torch.testing.assert_close(distributed[name], value, rtol=1e-3, atol=1e-4)


def test_a_diverged_worker_is_not_restarted(tmp_path: Path, ray_cluster: None, capsys: pytest.CaptureFixture[str]):
    out = str(tmp_path / "out")
    with pytest.raises(DivergedError, match=rf"^{out}: training failed: {out}: the loss is .*learning_rate"):
        teach(teach_spec(out, optimizer=DIVERGING, workers=1))
    assert "resuming" not in capsys.readouterr().out


class Untracked(TrackedRun):
    def metrics(self, values, step=0):
        pass


def test_a_dry_run_prints_the_cost_and_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    before = len(runs_of("teach"))
    assert teach(teach_spec(tmp_path / "out", dry_run=True, data="digits")) is None
    assert list(tmp_path.iterdir()) == []
    assert len(runs_of("teach")) == before
    out = capsys.readouterr().out
    assert "60 updates of 64 samples" in out
    assert "2.7 epochs of 1,442" in out
    assert re.search(r"[\d.]+ k parameters, [\d.]+ kFLOP per call, .*[\d.]+ MFLOP", out)
    assert re.search(r"each worker needs [\d.]+ kB for weights and optimizer, and at most [\d.]+ kB per sample", out)


def test_samples_are_drawn_during_training(tmp_path: Path):
    spec = teach_spec(tmp_path / "out", sample_updates=25)
    teach(spec)
    run = run_of("teach", load_config(spec.out).fingerprint)
    paths = [
        file.path for file in MlflowClient().list_artifacts(run.info.run_id, "images") if file.path.endswith("png")
    ]
    assert sorted(re.search(r"samples.step.(\d+)\D", path)[1] for path in paths) == ["25", "50"]
    assert run.data.params["parameters"] == str(sum(p.numel() for p in load_model(spec.out).network.parameters()))
    assert int(run.data.params["flops_per_call"]) > 1000
    assert run.data.metrics.keys() >= {"gradient_norm", "peak_memory_bytes"}


CONSTANT = FEW.model_copy(update={"schedule": "constant"})


def test_a_guide_has_the_averaged_weights_after_its_updates(tmp_path: Path):
    teach(teach_spec(tmp_path / "short", optimizer=CONSTANT.model_copy(update={"updates": 20})))
    teach(teach_spec(tmp_path / "plain", optimizer=CONSTANT))
    teach(teach_spec(tmp_path / "guided", optimizer=CONSTANT, guide_updates=20))
    short, plain, guided = (load_model(str(tmp_path / name)) for name in ("short", "plain", "guided"))
    assert guided.config.has_guide
    assert guided.network.guide is not None
    for found, expected in ((guided.network.guide.state_dict(), short), (main_weights(guided.network), plain)):
        assert found.keys() == expected.network.state_dict().keys()
        assert all(torch.equal(found[name], value) for name, value in expected.network.state_dict().items())
    assert not torch.equal(guided.sample(8, guidance=1.0).images, plain.sample(8, guidance=1.0).images)
    assert torch.equal(guided.sample(8).images, plain.sample(8).images)


def test_a_resumed_teacher_keeps_its_guide():
    task = TeachTask(teach_spec(Path("unused"), guide_updates=2))
    learner, again = (task.build(training.Worker(0, 1, torch.device("cpu"))) for _ in range(2))
    for number in range(3):
        learner.update(number)
    again.load_state_dict(learner.state_dict())
    assert again.guide.keys() == learner.guide.keys() != set()
    assert all(torch.equal(again.guide[name], weight) for name, weight in learner.guide.items())


@pytest.mark.parametrize("updates", [0, 60, 61])
def test_a_guide_needs_fewer_updates_than_its_teacher(updates: int, tmp_path: Path):
    with pytest.raises(ArgumentError, match="`guide_updates`"):
        teach_spec(tmp_path, guide_updates=updates)


def test_an_unconditional_teacher_can_be_guided_by_its_guide(tmp_path: Path):
    """A store of the guided teacher gives students without a guide."""
    teacher = str(tmp_path / "teacher")
    teach(teach_spec(Path(teacher), label_dropout=1, guide_updates=20))
    make_store(tmp_path / "store", teacher, guidance=(0.0, 0.5))
    distill(distill_spec(str(tmp_path / "store"), tmp_path / "student", guidance=0.5))
    student = load_model(str(tmp_path / "student"))
    assert (student.config.has_guide, student.network.guide) == (False, None)
    by_scale = [store.open(str(tmp_path / "store")).first(4, w, ["knot_04"])["knot_04"] for w in (0.0, 0.5)]
    assert not torch.equal(*by_scale)


def test_a_teacher_starts_from_another_teachers_weights(tmp_path: Path):
    """It starts from the averaged weights, and not from the guide's."""
    first = str(tmp_path / "first")
    teach(teach_spec(Path(first), guide_updates=20))
    spec = teach_spec(tmp_path / "second", init=first)
    learner = TeachTask(spec).build(training.Worker(0, 1, torch.device("cpu")))
    initial, averaged = learner.averaged().state_dict(), main_weights(load_model(first).network)
    assert initial.keys() == averaged.keys()
    assert all(torch.equal(initial[name], weight) for name, weight in averaged.items())
    second, plain = teach(spec), teach(teach_spec(tmp_path / "plain"))
    assert second and plain
    assert second.fingerprint != plain.fingerprint
    assert (
        run_of("teach", second.fingerprint).data.tags[f"{tracking.INPUT_TAG}init"] == load_config(first).weights_sha256
    )


def test_initial_weights_that_do_not_fit_are_refused(tmp_path: Path):
    teacher, student = str(tmp_path / "teacher"), str(tmp_path / "student")
    teach(teach_spec(Path(teacher)))
    make_store(tmp_path / "store", teacher)
    distill(distill_spec(str(tmp_path / "store"), Path(student)))
    for options, message in (
        ({"init": student}, f"`init` {student} is a student"),
        ({"init": teacher, "network": MLPConfig(width=48)}, "has width .*, but this teacher needs 48"),
        (
            {"init": teacher, "data": DataConfig(kind="digits")},
            r"has sample_shape \(2,\), but .* needs \(1, 8",
        ),
        ({"init": str(tmp_path / "none")}, "none is not a model folder"),
    ):
        with pytest.raises(DistillKacError, match=message):
            teach(teach_spec(tmp_path / "out", **options))
    assert not (tmp_path / "out").exists()

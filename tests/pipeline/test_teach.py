"""Teach: a teacher is a function of its spec, and a folder belongs to one spec."""

from pathlib import Path

import pytest
import torch

from kac.checkpoint import load_config
from kac.data import DataConfig, all_rows, open_dataset
from kac.errors import DistillKacError
from pipeline import training
from pipeline.teach import TeachTask, teach
from tests.pipeline.stages import DIVERGING, FEW, metrics_of, runs_of, teach_spec, weights


def test_a_teacher_is_a_function_of_its_spec(tmp_path: Path):
    for name, options in {"a": {}, "b": {}, "other": {"seed": 1}}.items():
        teach(teach_spec(tmp_path / name, **options))
    assert weights(tmp_path / "a") == weights(tmp_path / "b") != weights(tmp_path / "other")
    config = load_config(str(tmp_path / "a"))
    assert (config.kind, config.data.kind, config.sample_shape, config.num_classes) == ("teacher", "moons", (2,), 2)
    assert not (tmp_path / "a" / "training").exists()


def test_teaching_lowers_the_loss(tmp_path: Path):
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


def test_nothing_held_out_is_trained_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    data = open_dataset(DataConfig(kind="moons"))
    held_out = {tuple(image.tolist()) for image in all_rows(data.held_out).images}
    seen = []

    def spy(network, path, x_0, *rest):
        seen.extend(tuple(image.tolist()) for image in x_0)
        return (network(x_0, torch.rand(len(x_0)), torch.zeros(len(x_0)).long()) - x_0).square().mean()

    monkeypatch.setattr("pipeline.teach.flow_matching_loss", spy)
    teach(teach_spec(tmp_path / "out"))
    assert len(seen) == FEW.updates * FEW.batch_size
    assert len(set(seen)) == data.description.train
    assert not held_out & set(seen)


def test_two_workers_share_the_batches_of_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    batches: dict[int, list[torch.Tensor]] = {1: [], 2: []}
    for world_size in (1, 2):

        def spy(network, path, x_0, *rest, to=batches[world_size]):
            to.append(x_0)
            return network(x_0, torch.rand(len(x_0)), torch.zeros(len(x_0)).long()).sum()

        monkeypatch.setattr("pipeline.teach.flow_matching_loss", spy)
        for rank in range(world_size):
            learner = TeachTask(teach_spec(tmp_path)).build(training.Worker(rank, world_size, torch.device("cpu")))
            learner.update(3)
    both = torch.stack(batches[2], dim=1).flatten(0, 1)
    assert torch.equal(both, batches[1][0])

"""Sweep: the grid's points, and their trials under one parent run."""

from pathlib import Path

import pytest
import torch

from kac.checkpoint import load_config, load_model
from kac.errors import DistillKacError
from pipeline import tracking
from pipeline.config import SweepSpec
from pipeline.distill import distill
from pipeline.sweep import plan_trials, sweep
from tests.pipeline.stages import FEW, distill_spec, runs_of, weights


def test_the_grid_has_a_folder_a_point(small_store: str, tmp_path: Path):
    spec = SweepSpec(
        store=small_store, out=str(tmp_path), steps=(1, 2), guidance=(0.0, 1.0), grid=("optimizer.updates=5,6",)
    )
    trials = plan_trials(spec)
    assert len(trials) == len({trial.name for trial in trials}) == 8
    assert {(t.spec.steps, t.spec.guidance, t.spec.optimizer.updates) for t in trials} == {
        (m, w, n) for m in (1, 2) for w in (0.0, 1.0) for n in (5, 6)
    }
    for axis in (
        "colour=1",
        "objective.kind=endpoint,flow-map",
        "optimizer.updates",
        "store=a,b",
        "optimizer.speed=1",
        "optimizer.updates=x",
    ):
        with pytest.raises(DistillKacError):
            plan_trials(spec.model_copy(update={"grid": (axis,)}))


def test_a_flow_map_is_one_student_for_all_step_counts(small_store: str, tmp_path: Path):
    spec = SweepSpec(store=small_store, out=str(tmp_path), steps=(4, 1), guidance=(0.0, "all"), objective="flow-map")
    assert [(trial.name, trial.spec.steps, trial.spec.guidance) for trial in plan_trials(spec)] == [
        ("any-steps-guidance-0.0", 4, 0.0),
        ("any-steps-guidance-all", 4, "all"),
    ]


def test_a_sweep_trains_what_is_missing_under_one_parent_run(small_store: str, tmp_path: Path, ray_cluster: None):
    spec = SweepSpec(store=small_store, out=str(tmp_path / "sweep"), steps=(1, 2), optimizer=FEW)
    alone = distill(distill_spec(small_store, tmp_path / "alone", steps=2))
    distill(distill_spec(small_store, tmp_path / "sweep" / "steps-1-guidance-0.0", steps=1))
    untouched = weights(tmp_path / "sweep" / "steps-1-guidance-0.0")
    sweep(spec)
    assert weights(tmp_path / "sweep" / "steps-1-guidance-0.0") == untouched
    swept = load_config(str(tmp_path / "sweep" / "steps-2-guidance-0.0"))
    assert swept.fingerprint == alone.fingerprint
    expected = load_model(str(tmp_path / "alone")).network.state_dict()
    for name, value in load_model(str(tmp_path / "sweep" / "steps-2-guidance-0.0")).network.state_dict().items():
        torch.testing.assert_close(value, expected[name], rtol=1e-3, atol=1e-4)
    parents = {
        run.data.tags.get("mlflow.parentRunId")
        for run in runs_of("distill")
        if run.data.tags[tracking.FINGERPRINT_TAG] == swept.fingerprint
    }
    assert parents & {run.info.run_id for run in runs_of("sweep")}
    with pytest.raises(DistillKacError, match="--steps"):
        sweep(spec.model_copy(update={"steps": (1, 3)}))


def test_what_all_trials_share_reaches_each(small_store: str, tmp_path: Path):
    spec = SweepSpec(
        store=small_store, out=str(tmp_path), optimizer=FEW, seed=5, precision={"dtype": "bfloat16"}, memory_gib=0.5
    )
    for trial in plan_trials(spec):
        assert (trial.spec.seed, trial.spec.optimizer, trial.spec.precision.dtype) == (5, FEW, "bfloat16")
        assert (trial.spec.memory_gib, trial.spec.workers) == (0.5, 0)

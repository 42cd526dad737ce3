"""On a cluster of machines with faults, the digits pipeline has the same results as on one machine."""

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from jobs.parsing import parse
from pipeline.config import DistillSpec, EvaluateSpec, RolloutSpec, Spec, TeachSpec
from pipeline.distill import distill
from pipeline.evaluate.evaluate_stage import evaluate
from pipeline.rollout import rollout
from pipeline.teach import teach
from tests.pipeline.machines.cluster import cluster_of_machines
from tests.pipeline.machines.faults import PLAIN, Outcome, Trials, command_of, scores_difference, weights_difference
from tests.pipeline.machines.network import missing_support

pytestmark = [pytest.mark.ray, pytest.mark.s3, pytest.mark.cluster, pytest.mark.slow]

TOLERANCE = 1e-4
"""Tolerance for weights: two workers add gradients in a different order than one worker with two passes."""

TABLE_TOLERANCE = 2 / 355
"""Tolerance for the table: a classifier trained elsewhere may classify two of the 355 held-out images differently."""

IN_TWO_PASSES = {"workers": 0, "optimizer": {"accumulation": 2}}


@pytest.fixture(scope="module")
def trials(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trials]:
    if reason := missing_support():
        pytest.skip(reason)
    with cluster_of_machines() as cluster:
        yield Trials(cluster, tmp_path_factory.mktemp("downloaded"))


def here(trials: Trials, name: str, spec_type: type[Spec], **changes: object) -> tuple[Spec, Path]:
    """Return the spec of a stage that runs in this process on downloaded inputs, and its output folder."""
    out = trials.folder / "here" / name
    spec = parse(spec_type, command_of(name, str(trials.folder / PLAIN), str(out))[1:], "here")
    nested = {"optimizer": spec.optimizer.model_copy(update=changes.pop("optimizer"))} if "optimizer" in changes else {}
    return spec.model_copy(update={**changes, **nested}), out


def test_a_teacher_trained_on_two_machines(trials: Trials) -> None:
    spec, expected = here(trials, "teach", TeachSpec, **IN_TWO_PASSES)
    teach(spec)
    trials.run_plain("teach")
    assert weights_difference(trials.expected["teach"], expected) < TOLERANCE
    assert trials.statuses(f"{PLAIN}/teach") == ("FINISHED",)


def run_with_fault(trials: Trials, fault: str, name: str, expected: Path) -> Outcome:
    """Run a stage with a fault. Its output replaces the undisturbed output."""
    trials.expected[name], trials.undisturbed[name] = expected, 0.0
    return trials.run(fault, name, f"{PLAIN}/{name}")


def test_a_rollout_with_a_killed_driver(trials: Trials) -> None:
    spec, expected = here(trials, "rollout", RolloutSpec, actors=0)
    rollout(spec)
    assert run_with_fault(trials, "driver", "rollout", expected).statuses == ("FINISHED",)


def test_a_student_trained_on_two_machines_with_one_lost(trials: Trials) -> None:
    teacher = str(trials.expected["teach"])
    spec, expected = here(trials, "distill", DistillSpec, teacher=teacher, **IN_TWO_PASSES)
    distill(spec)
    outcome = run_with_fault(trials, "machine", "distill", expected)
    assert outcome.difference < TOLERANCE
    assert outcome.statuses == ("FINISHED",)


def test_training_on_a_drained_machine_loses_no_update(trials: Trials) -> None:
    outcome = trials.run("drain", "distill")
    assert outcome.lost == "0 updates were repeated"
    assert outcome.difference < TOLERANCE
    assert outcome.statuses == ("FINISHED",)


def test_a_stopped_sweep_resumes(trials: Trials) -> None:
    teacher = str(trials.expected["teach"])
    expected = trials.folder / "here" / "sweep"
    for steps in (1, 4):
        spec, _ = here(trials, "distill", DistillSpec, teacher=teacher, workers=0, steps=steps)
        distill(spec.model_copy(update={"out": str(expected / f"steps-{steps}-guidance-0.0")}))
    outcome = run_with_fault(trials, "stop", "sweep", expected)
    assert outcome.stopped[0] == "KILLED"
    assert outcome.difference < TOLERANCE
    assert set(outcome.statuses) == {"FINISHED"}
    assert trials.students(f"{PLAIN}/sweep") == ["steps-1-guidance-0.0", "steps-4-guidance-0.0"], "each has one run"


@pytest.mark.parametrize(
    ("name", "options", "market", "process"),
    [
        ("rollout", "--trajectories 512 --actors 1", "spot", "ray::MapWorker"),
        ("distill", "--optimizer.updates 50 --workers 1", "on-demand", "ray::RayTrainWorker"),
    ],
    ids=["rollout", "distill"],
)
def test_a_label_selector_chooses_the_machines(
    trials: Trials, name: str, options: str, market: str, process: str
) -> None:
    command = [*trials.command(name, f"labels/{name}"), *options.split(), "--label-selector", f"market={market}"]
    job = trials.cluster.submit(*command)
    used = set()
    while not job.is_over():
        used |= {machine.name for machine in (trials.cluster.head, trials.cluster.worker) if machine.runs(process)}
        time.sleep(0.2)
    job.finish()
    assert used == {{"on-demand": "head", "spot": "worker"}[market]}


def test_the_table_equals_that_of_one_machine(trials: Trials) -> None:
    spec, expected = here(trials, "evaluate", EvaluateSpec, actors=0)
    trials.cluster.download(f"{PLAIN}/sweep", trials.folder / PLAIN / "sweep")
    evaluate(spec)
    trials.run_plain("evaluate")
    assert scores_difference(trials.expected["evaluate"], expected) < TABLE_TOLERANCE

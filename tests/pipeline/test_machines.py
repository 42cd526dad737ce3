"""The digits pipeline on a cluster of machines, with faults on the way: what comes out is what a laptop makes."""

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from jobs.parsing import parse
from pipeline.config.specs import DistillSpec, EvaluateSpec, RolloutSpec, Spec, TeachSpec
from pipeline.distill import distill
from pipeline.evaluate.stage import evaluate
from pipeline.rollout import rollout
from pipeline.teach import teach
from tests.pipeline.machines.cluster import cluster_of_machines
from tests.pipeline.machines.faults import PLAIN, Outcome, Trials, scores_difference, weights_difference, words_of
from tests.pipeline.machines.network import why_not

TOLERANCE = 1e-4
"""Of weights: two workers add their gradients in another order than one does in two passes."""

TABLE_TOLERANCE = 2 / 355
"""Shares of the 355 held-out images: one or two of them are judged otherwise by a classifier trained elsewhere."""

IN_TWO_PASSES = {"workers": 0, "optimizer": {"accumulation": 2}}


@pytest.fixture(scope="module")
def trials(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trials]:
    if reason := why_not():
        pytest.skip(reason)
    with cluster_of_machines() as cluster:
        yield Trials(cluster, tmp_path_factory.mktemp("downloaded"))


def here(trials: Trials, name: str, spec_type: type[Spec], **changes: object) -> tuple[Spec, Path]:
    """The spec of a stage for this process, which reads what was downloaded of its inputs; and where it writes."""
    out = trials.folder / "here" / name
    spec = parse(spec_type, words_of(name, str(trials.folder / PLAIN), str(out))[1:], "here")
    nested = {"optimizer": spec.optimizer.model_copy(update=changes.pop("optimizer"))} if "optimizer" in changes else {}
    return spec.model_copy(update={**changes, **nested}), out


def test_a_teacher_of_two_machines(trials: Trials) -> None:
    spec, expected = here(trials, "teach", TeachSpec, **IN_TWO_PASSES)
    teach(spec)
    trials.run_plain("teach")
    assert weights_difference(trials.expected["teach"], expected) < TOLERANCE
    assert trials.statuses(f"{PLAIN}/teach") == ("FINISHED",)


def disturbed(trials: Trials, fault: str, name: str, expected: Path) -> Outcome:
    """The outcome of a stage under a fault; it takes the place of the undisturbed one."""
    trials.expected[name], trials.undisturbed[name] = expected, 0.0
    return trials.run(fault, name, f"{PLAIN}/{name}")


def test_a_rollout_whose_driver_is_killed(trials: Trials) -> None:
    spec, expected = here(trials, "rollout", RolloutSpec, actors=0)
    rollout(spec)
    assert disturbed(trials, "driver", "rollout", expected).statuses == ("FINISHED",)


def test_a_student_of_two_machines_one_of_which_is_lost(trials: Trials) -> None:
    teacher = str(trials.expected["teach"])
    spec, expected = here(trials, "distill", DistillSpec, teacher=teacher, **IN_TWO_PASSES)
    distill(spec)
    outcome = disturbed(trials, "machine", "distill", expected)
    assert outcome.difference < TOLERANCE
    assert outcome.statuses == ("FINISHED",)


def test_a_sweep_that_is_stopped(trials: Trials) -> None:
    teacher = str(trials.expected["teach"])
    expected = trials.folder / "here" / "sweep"
    for steps in (1, 4):
        spec, _ = here(trials, "distill", DistillSpec, teacher=teacher, workers=0, steps=steps)
        distill(spec.model_copy(update={"out": str(expected / f"steps-{steps}-guidance-0.0")}))
    outcome = disturbed(trials, "stop", "sweep", expected)
    assert outcome.stopped[0] == "KILLED"
    assert outcome.difference < TOLERANCE
    assert set(outcome.statuses) == {"FINISHED"}
    assert trials.students(f"{PLAIN}/sweep") == ["steps-1-guidance-0.0", "steps-4-guidance-0.0"], "none twice"


@pytest.mark.parametrize(
    ("name", "options", "market", "process"),
    [
        ("rollout", "`trajectories` 512 `actors` 1", "spot", "ray::MapWorker"),
        ("distill", "`optimizer.updates` 50 `workers` 1", "on-demand", "ray::RayTrainWorker"),
    ],
    ids=["rollout", "distill"],
)
def test_work_goes_to_the_machines_of_its_label(
    trials: Trials, name: str, options: str, market: str, process: str
) -> None:
    words = [*trials.command(name, f"labels/{name}"), *options.split(), "--label-selector", f"market={market}"]
    job = trials.cluster.submit(*words)
    worked = set()
    while not job.is_over():
        worked |= {machine.name for machine in (trials.cluster.head, trials.cluster.worker) if machine.runs(process)}
        time.sleep(0.2)
    job.finish()
    assert worked == {{"on-demand": "head", "spot": "worker"}[market]}


def test_the_table_is_that_of_one_machine(trials: Trials) -> None:
    spec, expected = here(trials, "evaluate", EvaluateSpec, actors=0)
    trials.cluster.download(f"{PLAIN}/sweep", trials.folder / PLAIN / "sweep")
    evaluate(spec)
    trials.run_plain("evaluate")
    assert scores_difference(trials.expected["evaluate"], expected) < TABLE_TOLERANCE

"""Claim: a store pays for itself, because the teacher is called once and not in the training of every student.

This module compares the quality of a store's students with their total compute. It also finds how many students it
takes until the store costs no more than a teacher in the training loop. Costs are network calls on one sample, where
training on a sample counts as three calls:

    teaching = 3 b        rollout = sum of r_w e_w        training = sum of 3 c b        teacher in the loop = l e_w b

Here b is the number of training samples (updates x batch size), and c the number of network calls of a sample's loss.
The store has r_w trajectories at the student's guidance scale w, and e_w evaluations each, twice as many if w is not 0.
l is the mean length of the objective's intervals, as a fraction of the trajectory. A student's training includes the
students that it was initialised from. A teacher in the loop is assumed to start each interval from noised data, as a
forward store does. The calls of validation and of the networks of feature spaces are not counted.
"""

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from kac.networks.cost import TRAINING_CALLS, short
from kac.solvers import evaluations
from kac.study.solver_steps import MARKERS, quality_of
from kac.study.subject import ClaimResult, Inputs, Training, Trajectories, panels, png


class StudentCost(NamedTuple):
    """The network calls for a student."""

    rollout: float
    training: float
    in_the_loop: dict[str, float]  # calls of a teacher in the loop instead of a store, by trained model's folder


class ComputePoint(NamedTuple):
    """A row of the table: the quality of a model, and its cost in network calls (None: unknown)."""

    model: str
    steps: int
    distances: dict[str, float]  # Frechet distances by feature space
    teaching: float | None
    rollout: float | None
    training: float | None
    total: float | None  # without teaching if only the cost of teaching is unknown


def measure(inputs: Inputs) -> ClaimResult | str:
    """Measure the students, and the teacher at their guidance scales."""
    stored, trainings = inputs.trajectories, inputs.trainings
    if stored is None or not inputs.students:
        return "no `store`" if stored is None else "no `students`"
    subjects = inputs.student_subjects()
    if not subjects:
        return "no step count of `steps` divides the store's knots"
    teaching = training_calls(trainings[inputs.teacher.path]) or None
    known = [model for model in inputs.students if trainings[model.path]]
    costs = {model.name: student_cost(stored, model.scales, trainings[model.path]) for model in known}
    teachers, points = [], []
    for w in sorted({subject.config.guidance or 0.0 for subject in subjects}):
        teacher = inputs.teacher_subject(w)
        distances, _ = quality_of(teacher, inputs.spaces, inputs.train)
        teachers.append(ComputePoint(f"teacher w={w:g}", teacher.sampling.steps, distances, teaching, 0, 0, teaching))
    for subject in subjects:
        steps = subject.sampling.steps
        name = subject.name.removesuffix(f"@{steps}") if subject.config.is_any_step else subject.name
        distances, _ = quality_of(subject, inputs.spaces, inputs.train)
        rollout, training, _ = costs.get(name, (None, None, None))
        total = None if rollout is None or training is None else (teaching or 0) + rollout + training
        points.append(ComputePoint(name, steps, distances, teaching, rollout, training, total))
    values: dict[str, Any] = {"points": [point._asdict() for point in (*teachers, *points)]}
    metrics = {f"total_calls/{point.model}": point.total for point in points if point.total is not None}
    text = "the costs of all students are unknown"
    if known:
        store_calls = rollout_calls(stored, {w for model in known for w in model.scales})
        number = students_to_pay(store_calls, list(costs.values()))
        loops = {name: sum(cost.in_the_loop.values()) for name, cost in costs.items()}
        values |= {"rollout": store_calls, "teacher_in_the_loop": loops, "pays_from": number}
        metrics["pays_from"] = number
        in_the_loop = ", ".join(f"{short(calls)} for {name}" for name, calls in loops.items())
        text = (
            f"calls of the teacher: {short(store_calls)} for the store; in the training loop, {in_the_loop}; the store "
            f"pays for itself from {number:,} student{'s' * (number != 1)} on"
        )
    return ClaimResult(text, values, metrics, _plot(teachers, points), _table([*teachers, *points]))


def training_calls(trainings: Iterable[Training]) -> float:
    """Return the network calls of several trainings."""
    return sum(TRAINING_CALLS * training.calls * training.samples for training in trainings)


def rollout_calls(stored: Trajectories, scales: Iterable[float]) -> int:
    """Return the network calls for the store's rows at these guidance scales."""
    steps = stored.sampling.steps // (stored.knots if stored.is_forward else 1)
    return evaluations(steps, stored.sampling.solver) * sum(stored.rows[w] * (1 if w == 0 else 2) for w in scales)


def student_cost(stored: Trajectories, scales: Sequence[float], trainings: Sequence[Training]) -> StudentCost:
    """Return the cost of a student of these guidance scales. ``trainings`` includes those of its initial weights."""
    rollout = rollout_calls(stored, scales)
    trajectories = sum(stored.rows[w] for w in scales) / (stored.knots if stored.is_forward else 1)
    in_the_loop = {each.path: each.length * each.samples * rollout / trajectories for each in trainings}
    return StudentCost(rollout, training_calls(trainings), in_the_loop)


def students_to_pay(rollout: float, costs: Sequence[StudentCost]) -> int:
    """Return the smallest n for which a rollout costs at most n times the mean cost of a teacher in the loop.

    A training that several students share counts once.
    """
    in_the_loop = {path: calls for cost in costs for path, calls in cost.in_the_loop.items()}
    return math.ceil(rollout * len(costs) / sum(in_the_loop.values()))


def _total(points: Sequence[ComputePoint]) -> str:
    return "total" if points[0].teaching is not None else "total without teaching"


def _table(points: Sequence[ComputePoint]) -> str:
    """Return a Markdown table with one row per model and number of steps."""
    distances = [f"FD {space}" for space in points[0].distances]
    lines = [["model", "steps", *distances, "teaching", "rollout", "training", _total(points)]]
    lines.append(["---"] * len(lines[0]))
    for model, steps, own, *calls in points:
        cells = (f"{distance:.3g}" for distance in own.values())
        lines.append([model, str(steps), *cells, *("-" if each is None else short(each) for each in calls)])
    return (
        "Frechet distances of delivered samples to the training images, and cost in network calls. A student's "
        "training includes the students that it was initialised from.\n\n"
        + "".join(f"| {' | '.join(line)} |\n" for line in lines)
    )


def _plot(teachers: Sequence[ComputePoint], points: Sequence[ComputePoint]) -> bytes:
    """Plot one panel per feature space, with one marker per student and number of steps. Lines are teachers."""
    figure, axes = panels(1, len(teachers[0].distances))
    names = list(dict.fromkeys(point.model for point in points if point.total is not None))
    for axis, space in zip(axes, teachers[0].distances, strict=True):
        for number, teacher in enumerate(teachers):
            axis.axhline(teacher.distances[space], color="black", alpha=1 / (number + 1), label=teacher.model)
        for number, name in enumerate(names):
            own = [point for point in points if point.model == name]
            x, y = [point.total for point in own], [point.distances[space] for point in own]
            axis.plot(x, y, MARKERS[number % len(MARKERS)], color=f"C{number}", label=name)
            for *place, point in zip(x, y, own, strict=True):
                axis.annotate(f"{point.steps}", place, (4, 4), textcoords="offset points", fontsize=8)
        axis.set(xscale="log", yscale="log", xlabel=f"network calls ({_total(points)})", title=f"features: {space}")
        axis.set_ylabel("Frechet distance to training images")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=9)
    figure.suptitle("Compute: quality by total network calls. Numbers at markers: student steps")
    return png(figure)

"""Claim: a student that lands close to its teacher at the ends of its steps is close on the whole way.

arXiv 2509.21513 proves it for endpoint distillation by Groenwall's inequality. Here the discrete form is measured: with
e_k the distance of the two states at the student's knot k,

    e_{k+1} <= lambda_k e_k + delta_k,

where lambda_k is how far the teacher's flow of that interval pulls two states apart, and delta_k the error of the
student's step. With delta_k from the student's own state this is the triangle inequality and always holds
(``certain``). Distillation only sees delta_k from the teacher's state: that the inequality holds with it too is the
claim (``one_step``; ``bound`` over all steps so far).
"""

from typing import NamedTuple

import torch
from torch import Tensor

from kac.sampling import velocity_of
from kac.solvers import knot_times, solve
from kac.study.subject import Subject

COINCIDE = 1e-5
"""States that are closer than this, per coordinate, are rounding apart: they say nothing of how the flow stretches."""


class StabilityKnot(NamedTuple):
    """A knot of the student; distances are root mean squares per coordinate over all samples."""

    t: float
    error: float  # e_k, between the student's state and the teacher's
    one_step: float  # lambda e + delta of the step that ends here
    bound: float  # the same from step errors alone, one after the other: e is taken at its own bound
    certain: float  # as ``bound``, of steps that start from the student's states
    step_error: float  # delta of the step that ends here, from the teacher's state; 0 at the noise
    stretch: float  # lambda of the step that ends here, the largest of all samples; 1 at the noise

    @property
    def holds(self) -> bool:
        """Whether the inequality holds for the step that ends here (but for rounding)."""
        return self.error <= self.one_step * (1 + 1e-4) + 1e-6


@torch.inference_mode()
def stability(teacher: Subject, student: Subject) -> list[StabilityKnot]:
    """The student's knots, noise first. Both start from the same noise.

    Raises:
        ValueError: the student's steps do not divide the teacher's.
    """
    steps, factor = student.sampling.steps, teacher.sampling.steps // student.sampling.steps
    if factor * steps != teacher.sampling.steps:
        raise ValueError(f"expected a multiple of {steps} teacher's steps, found {teacher.sampling.steps}")
    squares = torch.zeros(4, steps + 1, dtype=torch.float64)  # of error, step from teacher's state, student's, restart
    stretch, values = [0.0] * (steps + 1), 0
    for x_1, label in student.starts():
        values += x_1.numel()
        _add_batch(teacher, student, x_1, label, factor, squares, stretch)
    error, from_teacher, from_student, restart = (squares / values).sqrt().tolist()
    times, bound, certain = knot_times(steps, student.sampling.knot_grid).tolist(), 0.0, 0.0
    found = [StabilityKnot(times[0], 0.0, 0.0, 0.0, 0.0, 0.0, 1.0)]
    for k in range(1, steps + 1):
        pull = stretch[k] or 1.0  # nothing was apart
        one_step = pull * error[k - 1] + from_teacher[k]
        bound = pull * bound + from_teacher[k]
        certain = pull * certain + from_student[k] + restart[k]
        found.append(StabilityKnot(times[k], error[k], one_step, bound, certain, from_teacher[k], pull))
    return found


def _add_batch(
    teacher: Subject, student: Subject, x_1: Tensor, label: Tensor, factor: int, squares: Tensor, stretch: list[float]
) -> None:
    steps = student.sampling.steps
    times = knot_times(teacher.sampling.steps, teacher.sampling.knot_grid)
    coarse = times[::factor]
    method = teacher.sampling.solver
    flow = velocity_of(teacher.network, x_1, label, teacher.sampling)
    flow_of_both = velocity_of(teacher.network, x_1, torch.cat([label, label]), teacher.sampling)
    step = velocity_of(student.network, x_1, label, student.sampling)
    there = solve(flow, x_1, times, method, keep=range(0, len(times), factor)).knots
    x = x_1
    for k in range(steps):
        inside, ends = times[k * factor : (k + 1) * factor + 1], coarse[k : k + 2]
        both = solve(flow_of_both, torch.cat([x, there[k]]), inside, method).x
        carried, again = both.chunk(2)
        stepped = solve(step, x, ends, "euler").x
        before, after = _rms_each(x - there[k]), _rms_each(carried - again)
        apart = before > COINCIDE
        if bool(apart.any()):
            stretch[k + 1] = max(stretch[k + 1], (after[apart] / before[apart]).max().item())
        gaps = (
            stepped - there[k + 1],
            solve(step, there[k], ends, "euler").x - there[k + 1],
            stepped - carried,
            again - there[k + 1],  # a solver of several steps that starts anew goes a slightly different way
        )
        squares[:, k + 1] += torch.stack([gap.double().square().sum().cpu() for gap in gaps])
        x = stepped


def _rms_each(gap: Tensor) -> Tensor:
    """[batch, *sample] -> [batch], root mean squares per coordinate."""
    return gap.flatten(1).double().square().mean(1).sqrt()

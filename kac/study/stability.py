"""Claim: a student that is close to its teacher at the end of each single step is close along the whole trajectory.

arXiv 2509.21513 proves this for endpoint distillation by Groenwall's inequality. This module measures the discrete
form. Let e_k be the distance between the student's and the teacher's states at the student's knot k. Then

    e_{k+1} <= lambda_k e_k + delta_k,

where lambda_k is the factor by which the teacher's flow separates two states from knot k to k + 1, and delta_k is the
error of the student's step. If delta_k is measured from the student's state, this is the triangle inequality, which
always holds (``certain``). Distillation only reduces the delta_k measured from the teacher's state. The claim is that
the inequality also holds with that delta_k (``one_step``). ``bound`` accumulates it over all steps so far.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from kac.sampling import velocity_of
from kac.solvers import knot_times, solve
from kac.study.subject import TIME, ClaimResult, Inputs, Subject, panels, png

COINCIDE = 1e-5
"""States closer than this per coordinate differ only by rounding, so the stretch is not measured on them."""


class StabilityKnot(NamedTuple):
    """Measurements at a knot of the student. Distances are root mean squares per coordinate over all samples."""

    t: float
    error: float  # e_k, the distance between the student's and the teacher's state
    one_step: float  # lambda e + delta for the step that ends at this knot
    bound: float  # lambda e + delta, with the previous knot's bound as e
    certain: float  # like ``bound``, but with delta from the student's states
    step_error: float  # delta of the step that ends at this knot, from the teacher's state; 0 at the first knot
    stretch: float  # lambda of the step that ends at this knot, the maximum over samples; 1 at the first knot

    @property
    def holds(self) -> bool:
        """Whether the inequality holds, up to rounding, for the step that ends at this knot."""
        return self.error <= self.one_step * (1 + 1e-4) + 1e-6


@torch.inference_mode()
def stability(teacher: Subject, student: Subject) -> list[StabilityKnot]:
    """Compare a student with its teacher at the student's knots, from noise to image. Both start from the same noise.

    The teacher takes its steps on the student's grid.

    The number of student steps must divide the number of teacher steps.
    """
    steps, method = student.sampling.steps, teacher.sampling.solver
    fine = knot_times(teacher.sampling.steps, student.sampling.knot_grid)
    factor = teacher.sampling.steps // steps
    coarse = fine[::factor]
    # Sums of squares: error, step errors from the teacher's and the student's states, error of the solver's restart.
    squares = torch.zeros(4, steps + 1, dtype=torch.float64)
    stretch, values = [0.0] * (steps + 1), 0
    for x_1, label in student.starts():
        values += x_1.numel()
        flow = velocity_of(teacher.network, x_1, label, teacher.sampling)
        flow_of_both = velocity_of(teacher.network, x_1, torch.cat([label, label]), teacher.sampling)
        step = velocity_of(student.network, x_1, label, student.sampling)
        states = solve(flow, x_1, fine, method, keep=range(0, len(fine), factor)).knots
        x = x_1
        for k in range(steps):
            inside, ends = fine[k * factor : (k + 1) * factor + 1], coarse[k : k + 2]
            both = solve(flow_of_both, torch.cat([x, states[k]]), inside, method).x
            from_student, restarted = both.chunk(2)
            stepped = solve(step, x, ends, "euler").x
            before, after = _rms_each(x - states[k]), _rms_each(from_student - restarted)
            apart = before > COINCIDE
            if bool(apart.any()):
                stretch[k + 1] = max(stretch[k + 1], (after[apart] / before[apart]).max().item())
            gaps = (
                stepped - states[k + 1],
                solve(step, states[k], ends, "euler").x - states[k + 1],
                stepped - from_student,
                restarted - states[k + 1],  # not zero, because restarting a multistep solver changes the result
            )
            squares[:, k + 1] += torch.stack([gap.double().square().sum().cpu() for gap in gaps])
            x = stepped
    return _knots(coarse.tolist(), stretch, (squares / values).sqrt())


def _knots(times: list[float], stretch: list[float], distances: Tensor) -> list[StabilityKnot]:
    """Accumulate the bounds from distances [4, knots]: errors, both kinds of step errors, solver restart errors."""
    bound, certain = 0.0, 0.0
    knots = [StabilityKnot(times[0], 0.0, 0.0, 0.0, 0.0, 0.0, 1.0)]
    error, from_teacher, from_student, restart = distances.tolist()
    for k in range(1, len(times)):
        growth = stretch[k] or 1.0  # 0 if all states coincide
        one_step = growth * error[k - 1] + from_teacher[k]
        bound = growth * bound + from_teacher[k]
        certain = growth * certain + from_student[k] + restart[k]
        knots.append(StabilityKnot(times[k], error[k], one_step, bound, certain, from_teacher[k], growth))
    return knots


def _rms_each(gap: Tensor) -> Tensor:
    """[batch, *sample] -> [batch], the root mean square over coordinates."""
    return gap.flatten(1).double().square().mean(1).sqrt()


def measure(inputs: Inputs) -> ClaimResult | str:
    """Compare every student with its teacher at the student's guidance scale."""
    if not inputs.students:
        return "no `students`"
    found: dict[str, list[StabilityKnot]] = {}
    lines: list[str] = []
    left_out: list[str] = []
    metrics: dict[str, float] = {}
    for student in inputs.student_subjects():
        name, steps = student.name, student.sampling.steps
        teacher = inputs.teacher_subject(student.config.guidance or 0.0, steps)
        if teacher.sampling.steps % steps:
            reason = f"its {steps} steps do not divide the teacher's {teacher.sampling.steps}"
            left_out.append(f"{name}: left out, because {reason}")
            continue
        knots = found[name] = stability(teacher, student)
        beyond = [f"{knot.t:g}" for knot in knots if not knot.holds]
        verdict = f"violated at t = {', '.join(beyond)}" if beyond else "holds at every knot"
        worst = max(knot.error for knot in knots)
        lines.append(f"{name}: error at most {worst:.4f}, bound at the image {knots[-1].bound:.4f}, bound {verdict}")
        metrics |= {f"largest_error/{name}": worst, f"image_error/{name}": knots[-1].error}
        metrics |= {f"image_bound/{name}": knots[-1].bound, f"knots_beyond/{name}": float(len(beyond))}
    if not found:
        return "; ".join(left_out) or "no step count of `steps` divides the store's knots"
    values = {name: [{**knot._asdict(), "holds": knot.holds} for knot in knots] for name, knots in found.items()}
    return ClaimResult("; ".join([*lines, *left_out]), values, metrics, _plot(found))


def _plot(found: Mapping[str, Sequence[StabilityKnot]]) -> bytes:
    """Plot one panel per student: its error at each knot, and the bounds."""
    columns = max(2, min(4, len(found)))  # the title is wider than one panel
    figure, axes = panels(-(-len(found) // columns), columns)
    lines = {
        "error": ("o-", "C0", "error e"),
        "bound": ("s--", "C1", "bound from the errors of single steps"),
        "one_step": ("^:", "C2", "bound from the previous knot"),
        "certain": (":", "grey", "triangle inequality"),
    }
    for axis, (name, knots) in zip(axes, found.items(), strict=False):
        later = knots[1:]  # at the first knot (pure noise) the error is 0, which has no logarithm
        for field, (style, colour, label) in lines.items():
            values = [getattr(knot, field) for knot in later]
            axis.plot([knot.t for knot in later], values, style, color=colour, label=label)
        axis.set(title=name, ylabel="RMS distance per coordinate", yscale="log", **TIME)
        axis.legend(fontsize=8)
    for axis in axes[len(found) :]:
        axis.set_visible(False)
    figure.suptitle("Stability: distance from a student to its teacher's trajectory, and its bound")
    return png(figure)

"""Endpoint distillation: a student makes M Euler steps, each landing where the teacher's many small steps land."""

from collections.abc import Callable

import torch
from torch import Tensor

from kac.guidance import GuidedVelocity, VelocityModel
from kac.solvers import Solution, solve, uniform_times


def endpoint_loss(
    model: Callable[[Tensor, Tensor, Tensor], Tensor],
    x_start: Tensor,
    x_end: Tensor,
    t_start: Tensor,
    t_end: Tensor,
    label: Tensor,
) -> Tensor:
    """|| x_start - h u_student(x_start, t_start, label) - x_end ||^2 / h^2 per coordinate, h = t_start - t_end.

    Divided by the squared step length it is a velocity error: one scale for all intervals and step counts.

    Args:
        x_start, x_end: [batch, *sample], the teacher's states at t_start and t_end.
        t_start, t_end: [batch], t_start > t_end. label: [batch].
    """
    h = (t_start - t_end).reshape(-1, *[1] * (x_start.ndim - 1))
    return (model(x_start, t_start, label) - (x_start - x_end) / h).square().mean()


@torch.no_grad()
def sample(model: VelocityModel, noise: Tensor, label: Tensor, steps: int) -> Solution:
    """Carry ``noise`` [batch, *sample] to images with the student's ``steps`` macro steps (nfe = steps)."""
    return solve(GuidedVelocity(model, 0.0).given(label), noise, uniform_times(steps), method="euler")

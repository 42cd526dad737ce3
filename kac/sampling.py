"""Images from a model, teacher or student: how it is sampled, from which noise, and the sampling itself."""

from typing import NamedTuple

import torch
from torch import Tensor

from kac import noise
from kac.checkpoint import ModelConfig
from kac.errors import DistillKacError
from kac.guidance import guide
from kac.networks import VelocityNetwork
from kac.solvers import KnotGrid, Method, Solution, knot_times, solve

TEACHER_STEPS = 100


class Sampling(NamedTuple):
    """How a model is sampled."""

    guidance: float
    steps: int
    solver: Method
    knot_grid: KnotGrid = "uniform"


def teacher_sampling(guidance: float | None = None, steps: int | None = None, solver: Method = "ab2") -> Sampling:
    """A teacher is sampled as one likes: by default without guidance, in 100 steps."""
    return Sampling(guidance or 0.0, steps or TEACHER_STEPS, solver)


def student_sampling(config: ModelConfig) -> Sampling:
    """The law of a student: one Euler step on each interval of its own grid; its guidance is built in."""
    assert config.steps is not None and config.guidance is not None
    return Sampling(0.0, config.steps, "euler", config.knot_grid)


@torch.inference_mode()
def generate(network: VelocityNetwork, x_1: Tensor, label: Tensor, sampling: Sampling) -> Solution:
    """Carry noise ``x_1`` [batch, *sample] to images [batch, *sample]."""
    velocity = guide(network, sampling.guidance).given(label)
    return solve(velocity, x_1, knot_times(sampling.steps, sampling.knot_grid), sampling.solver)


def initial_noise(
    config: ModelConfig, seed: int, ids: range, labels: tuple[int, ...] | None = None
) -> tuple[Tensor, Tensor]:
    """Noise [len(ids), *sample] and labels [len(ids)] of samples by number; given ``labels`` are repeated in turn.

    Raises:
        DistillKacError: a label that the model does not know.
    """
    x_1 = noise.noise(config.path.build(), seed, ids, config.sample_shape)
    if labels is None:
        return x_1, noise.labels(seed, ids, config.class_frequencies)
    unknown = [label for label in labels if label >= config.num_classes]
    if unknown or not labels:
        raise DistillKacError(f"--labels: expected classes 0 .. {config.num_classes - 1}, found {list(unknown)}")
    return x_1, torch.tensor([labels[i % len(labels)] for i in ids])

"""Images from a model, teacher or student: how it is sampled, from which noise, and the sampling itself."""

import time
from typing import NamedTuple

import torch
from torch import Tensor

from kac import noise
from kac.conditioning import check_labels, network_labels
from kac.guidance import GuidedVelocity, check_guidance, guide
from kac.model import Model, ModelConfig
from kac.networks import VelocityNetwork
from kac.precision import Precision
from kac.solvers import KnotGrid, Method, Solution, knot_times, solve
from kac.util.errors import ArgumentError, DivergedError
from kac.util.images import delivered

TEACHER_STEPS = 100

BATCH_SIZE = 500
"""Samples a network call, where nobody chooses: another number gives other last digits."""


class Sampling(NamedTuple):
    """How a model is sampled."""

    guidance: float
    steps: int
    solver: Method
    knot_grid: KnotGrid = "uniform"


def teacher_sampling(
    config: ModelConfig, guidance: float | None = None, steps: int | None = None, solver: Method = "ab2"
) -> Sampling:
    """How to sample a teacher: as the caller chooses; by default without guidance, in 100 steps.

    Raises:
        ArgumentError: guidance of a teacher that cannot be guided.
    """
    check_guidance(config, [guidance or 0.0])
    return Sampling(guidance or 0.0, steps or TEACHER_STEPS, solver)


def student_sampling(config: ModelConfig, steps: int | None = None, guidance: float | None = None) -> Sampling:
    """How to sample a student: one Euler step on each interval of its own grid.

    Its guidance scale is built into its weights, unless its network takes the scale as an input.

    Args:
        steps: other than its own, for a student that takes any.
        guidance: other than its own, for a student that has learned all scales of a store.

    Raises:
        ArgumentError: other steps or another scale than those that are built into it, or a scale beyond those learned.
    """
    assert config.steps is not None and config.guidance is not None
    if steps not in {None, config.steps} and not config.is_any_step:
        raise ArgumentError(f"`steps`: expected {config.steps}, which is built into this student, found {steps}")
    scales = config.guidance_scales or (config.guidance,)
    if guidance is not None and not min(scales) <= guidance <= max(scales):
        expected = f"{scales[0]}, which is built into this student" if len(scales) == 1 else _range_of(scales)
        raise ArgumentError(f"`guidance`: expected {expected}, found {guidance}")
    given = config.guidance if guidance is None else guidance
    return Sampling(given if config.takes_guidance else 0.0, steps or config.steps, "euler", config.knot_grid)


def _range_of(scales: tuple[float, ...]) -> str:
    return f"{min(scales)} .. {max(scales)}, since this student has learned {list(scales)}"


class Samples(NamedTuple):
    """What was drawn from a model."""

    images: Tensor  # [count, *sample], float32, on the CPU
    label: Tensor  # [count], as the network was given them
    nfe: int  # network evaluations an image
    seconds: float  # of the network at work


def draw(
    model: Model,
    sampling: Sampling,
    precision: Precision,
    seed: int,
    count: int,
    batch_size: int,
    labels: tuple[int, ...] | None = None,
    *,
    first: int = 0,
    raw: bool = False,
) -> Samples:
    """The samples first .. first + count - 1 of a seed as they are delivered, ``batch_size`` a network call.

    Args:
        raw: the network's own values instead, as far out of range as they are.

    Raises:
        DivergedError: values that are not finite.
        DistillKacError: as ``initial_noise``.
    """
    device, network = next(model.network.parameters()).device, precision.wrap(model.network)
    images, classes, nfe, seconds = [], [], 0, 0.0
    for start in range(first, first + count, batch_size):
        x_1, label = initial_noise(model.config, seed, range(start, min(start + batch_size, first + count)), labels)
        x_1, given = x_1.to(device), label.to(device)
        started = time.perf_counter()
        solution = generate(network, x_1, given, sampling)
        images.append(solution.x.cpu())
        seconds += time.perf_counter() - started
        classes.append(label)
        nfe = solution.nfe
    if not all(torch.isfinite(made).all() for made in images):
        raise DivergedError("expected finite images of the model, found NaN or infinity: it has diverged")
    outputs = torch.cat(images)
    return Samples(outputs if raw else delivered(outputs), torch.cat(classes), nfe, seconds)


@torch.inference_mode()
def generate(network: VelocityNetwork, x_1: Tensor, label: Tensor, sampling: Sampling) -> Solution:
    """Carry noise ``x_1`` [batch, *sample] to images [batch, *sample], without gradients."""
    return carry(network, x_1, label, sampling)


def carry(network: VelocityNetwork, x_1: Tensor, label: Tensor, sampling: Sampling) -> Solution:
    """Carry noise ``x_1`` [batch, *sample] to images [batch, *sample].

    A network that takes the end time of a step, or the guidance scale, is given it.
    """
    velocity = velocity_of(network, x_1, label, sampling)
    return solve(velocity, x_1, knot_times(sampling.steps, sampling.knot_grid), sampling.solver)


def velocity_of(network: VelocityNetwork, x_1: Tensor, label: Tensor, sampling: Sampling) -> GuidedVelocity:
    """What ``carry`` solves: the guided velocity of these labels, at the times of the sampling's grid.

    Args:
        x_1: [batch, *sample], of the type and on the device of all states.
    """
    times, takes = knot_times(sampling.steps, sampling.knot_grid), getattr(network, "takes", ())
    rounded = times.to(x_1.dtype)
    next_time = dict(zip(rounded.tolist(), rounded[1:].tolist(), strict=False))
    dtype, device = x_1.dtype, x_1.device

    def conditions(t: Tensor) -> dict[str, Tensor]:
        given = {name: next_time[t.item()] if name == "end_time" else sampling.guidance for name in takes}
        return {name: torch.tensor(value, dtype=dtype, device=device) for name, value in given.items()}

    return guide(network, 0.0 if "guidance" in takes else sampling.guidance, label, conditions)


def initial_noise(
    config: ModelConfig, seed: int, ids: range, labels: tuple[int, ...] | None = None
) -> tuple[Tensor, Tensor]:
    """Noise [len(ids), *sample] and the network's labels [len(ids)] of samples by number.

    Args:
        labels: classes, repeated in turn; default: drawn by the data's class frequencies.

    Raises:
        ArgumentError: a class that the model does not know.
    """
    x_1 = noise.noise(config.path.build(), seed, ids, config.sample_shape)
    if labels is None:
        return x_1, network_labels(config, noise.labels(seed, ids, config.class_frequencies))
    check_labels(config, labels)
    return x_1, torch.tensor([labels[i % len(labels)] for i in ids])

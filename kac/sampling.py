"""Draw images from a teacher or student: sampling options, initial noise and integration."""

import time
from typing import NamedTuple

import torch
from torch import Tensor

from kac import noise
from kac.conditioning import check_labels, network_labels
from kac.guidance import GuidedVelocity, check_guidance, guide
from kac.model import Model, ModelConfig, decoder_of
from kac.networks import VelocityNetwork
from kac.precision import Precision
from kac.solvers import KnotGrid, Solution, SolverName, knot_times, solve
from kac.util.errors import ArgumentError, DivergedError
from kac.util.images import delivered

TEACHER_STEPS = 100

BATCH_SIZE = 500
"""Default number of samples per network call. A different batch size changes the last digits of the images."""


class Sampling(NamedTuple):
    """Options for sampling a model."""

    guidance: float
    steps: int
    solver: SolverName
    knot_grid: KnotGrid = "uniform"
    time_factor: float = 1.0


def teacher_sampling(
    config: ModelConfig,
    guidance: float | None = None,
    steps: int | None = None,
    solver: SolverName = "ab2",
    knot_grid: KnotGrid = "uniform",
    time_factor: float = 1.0,
) -> Sampling:
    """Return the options for sampling a teacher. Raises ``ArgumentError`` if it does not support ``guidance``."""
    check_guidance(config, [guidance or 0.0])
    return Sampling(guidance or 0.0, steps or TEACHER_STEPS, solver, knot_grid, time_factor)


def student_sampling(config: ModelConfig, steps: int | None = None, guidance: float | None = None) -> Sampling:
    """Return the options for sampling a student with one Euler step per interval of the student's time grid.

    The guidance scale is built into the weights, unless the network takes the scale as an input.

    Args:
        steps: student steps; only an any-step student accepts a number other than its default.
        guidance: only a student trained on several guidance scales accepts a scale other than its default.

    Raises:
        ArgumentError: the student was not trained for ``steps`` or ``guidance``.
    """
    assert config.steps is not None and config.guidance is not None
    if steps not in {None, config.steps} and not config.is_any_step:
        raise ArgumentError(f"`steps` is {steps}, but this student works only with {config.steps}. Leave `steps` out.")
    scales = config.guidance_scales or (config.guidance,)
    if guidance is not None and not min(scales) <= guidance <= max(scales):
        raise ArgumentError(
            f"`guidance` is {guidance}, but this student was trained on {list(scales)}. Leave `guidance` out or "
            f"choose a value from {min(scales)} to {max(scales)}."
        )
    w = config.guidance if guidance is None else guidance
    return Sampling(w if config.takes_guidance else 0.0, steps or config.steps, "euler", config.knot_grid)


class Samples(NamedTuple):
    """Images drawn from a model."""

    images: Tensor  # [count, *sample], float32, on the CPU
    label: Tensor  # [count], as passed to the network
    nfe: int  # network evaluations per image
    seconds: float  # time spent in the network


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
    """Generate the samples ``first`` to ``first + count - 1`` of a seed, and pass them through ``delivered``.

    Args:
        batch_size: samples per network call.
        labels: as in ``initial_noise``.
        raw: return the unrounded images, without passing them through ``delivered``. Latents are decoded.

    Raises:
        DivergedError: the model generates NaN or infinity.
    """
    decode = decoder_of(model.config)
    device, network = next(model.network.parameters()).device, precision.wrap(model.network)
    batches, classes, nfe, seconds = [], [], 0, 0.0
    for start in range(first, first + count, batch_size):
        x_1, label = initial_noise(model.config, seed, range(start, min(start + batch_size, first + count)), labels)
        x_1, label_on_device = x_1.to(device), label.to(device)
        started = time.perf_counter()
        solution = generate(network, x_1, label_on_device, sampling)
        batches.append(decode(solution.x).cpu())
        seconds += time.perf_counter() - started
        classes.append(label)
        nfe = solution.nfe
    if not all(torch.isfinite(batch).all() for batch in batches):
        raise DivergedError("The model has diverged: it generates NaN or infinity. Train it with different options.")
    outputs = torch.cat(batches)
    return Samples(outputs if raw else delivered(outputs), torch.cat(classes), nfe, seconds)


def integrate(network: VelocityNetwork, x_1: Tensor, label: Tensor, sampling: Sampling) -> Solution:
    """Integrate from noise ``x_1`` [batch, *sample] to images [batch, *sample], with gradients.

    The network also receives ``end_time`` and ``guidance`` if the network takes these inputs.
    """
    velocity = velocity_of(network, x_1, label, sampling)
    return solve(velocity, x_1, knot_times(sampling.steps, sampling.knot_grid), sampling.solver)


@torch.inference_mode()
def generate(network: VelocityNetwork, x_1: Tensor, label: Tensor, sampling: Sampling) -> Solution:
    """``integrate`` without gradients."""
    return integrate(network, x_1, label, sampling)


def velocity_of(network: VelocityNetwork, x_1: Tensor, label: Tensor, sampling: Sampling) -> GuidedVelocity:
    """Return the guided velocity that ``integrate`` uses. Evaluate the velocity only on the time grid of ``sampling``.

    Args:
        x_1: [batch, *sample]. All later states must have the dtype and device of ``x_1``.
    """
    dtype, device, takes = x_1.dtype, x_1.device, getattr(network, "takes", ())
    times = knot_times(sampling.steps, sampling.knot_grid, device).to(dtype)
    guidance = torch.full((), sampling.guidance, dtype=dtype, device=device)

    def conditions(t: Tensor) -> dict[str, Tensor]:
        # The end time is the largest time before t. It is found on the device: reading t would wait for a GPU.
        return {name: (times * (times < t)).amax() if name == "end_time" else guidance for name in takes}

    w = 0.0 if "guidance" in takes else sampling.guidance
    return guide(network, w, label, conditions, sampling.time_factor)


def initial_noise(
    config: ModelConfig, seed: int, ids: range, labels: tuple[int, ...] | None = None
) -> tuple[Tensor, Tensor]:
    """Return the noise [len(ids), *sample] and the network labels [len(ids)] of the samples ``ids``.

    Args:
        labels: classes, repeated in turn; default: drawn with the class frequencies of the data.

    Raises:
        ArgumentError: ``labels`` contains a class that the model does not know.
    """
    x_1 = noise.noise(config.path.build(), seed, ids, config.sample_shape)
    if labels is None:
        return x_1, network_labels(config, noise.labels(seed, ids, config.class_frequencies))
    check_labels(config, labels)
    return x_1, torch.tensor([labels[i % len(labels)] for i in ids])

"""Images from a model folder, teacher or student: what ``sample`` and ``evaluate`` share."""

from typing import NamedTuple

import torch
from torch import Tensor

from kac import identity, student
from kac.checkpoint import Model
from kac.errors import DistillKacError
from kac.guidance import guide
from kac.solvers import Method, Solution, solve, uniform_times


class How(NamedTuple):
    """How a model is sampled."""

    guidance: float
    steps: int
    solver: Method


def how_to_sample(model: Model, guidance: float | None, steps: int | None, solver: Method, name: str) -> How:
    """A student's way is built in; a teacher's is chosen (default: no guidance, 100 steps).

    Raises:
        DistillKacError: steps or guidance given for a student that was made for others.
    """
    config = model.config
    if config.kind == "teacher":
        return How(guidance or 0.0, steps or 100, solver)
    assert config.steps is not None and config.guidance is not None
    for option, asked, built_in in (("steps", steps, config.steps), ("guidance", guidance, config.guidance)):
        if asked is not None and asked != built_in:
            raise DistillKacError(
                f"--{option}: expected {built_in}, which is built into the student {name}, found {asked}"
            )
    return How(config.guidance, config.steps, "euler")


@torch.inference_mode()
def generate(model: Model, noise: Tensor, label: Tensor, how: How) -> Solution:
    """Carry ``noise`` [batch, *sample] to images [batch, *sample]."""
    if model.config.kind == "student":
        return student.sample(model.network, noise, label, how.steps)
    return solve(guide(model.network, how.guidance).given(label), noise, uniform_times(how.steps), how.solver)


def starts(model: Model, seed: int, ids: range, labels: tuple[int, ...] | None = None) -> tuple[Tensor, Tensor]:
    """Noise [len(ids), *sample] and labels [len(ids)] of samples by identity; given ``labels`` are repeated in turn.

    Raises:
        DistillKacError: a label that the model does not know.
    """
    config = model.config
    noise = identity.noise(config.path.build(), seed, ids, config.sample_shape)
    if labels is None:
        return noise, identity.labels(seed, ids, config.class_frequencies)
    unknown = [label for label in labels if label >= config.num_classes]
    if unknown or not labels:
        raise DistillKacError(f"--labels: expected classes 0 .. {config.num_classes - 1}, found {list(unknown)}")
    return noise, torch.tensor([labels[i % len(labels)] for i in ids])

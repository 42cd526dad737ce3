"""A model's conditioning, and the labels that are passed to its network.

``ModelConfig.conditioning`` records which labels the network saw in training. Every stage that calls a network
converts sample labels with ``network_labels``, and calls ``guidance_problem`` before it applies guidance.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from kac.model import ModelConfig
from kac.networks import Conditioning, NetworkConfig
from kac.util.errors import ArgumentError

NO_NULL_LABEL = "this network has no null label (it was trained only with class labels)"


def learned_conditioning(network: NetworkConfig, label_dropout: float) -> Conditioning:
    """Return the conditioning of a teacher trained with the fraction ``label_dropout`` of its labels dropped."""
    if network.conditioning == "none" or label_dropout == 1:
        return "none"
    return "classes" if label_dropout == 0 else network.conditioning


def network_labels(model: ModelConfig, label: Tensor) -> Tensor:
    """Return the labels [batch] to pass to the network: ``label``, or the null label if the model is unconditional."""
    return torch.full_like(label, model.num_classes) if model.conditioning == "none" else label


def known_classes(model: ModelConfig) -> tuple[int, ...]:
    """Return the classes that the network saw in training, or an empty tuple if the model is unconditional."""
    if model.conditioning == "none":
        return ()
    return tuple(label for label, frequency in enumerate(model.class_frequencies) if frequency > 0)


def check_labels(
    model: ModelConfig, labels: Sequence[int], option: str = "`labels`", any_class: str | None = None
) -> None:
    """Raise ``ArgumentError`` if ``labels`` is empty or contains unknown classes, or if the model is unconditional.

    Args:
        option: name of the labels in the error message.
        any_class: option value that stands for any class; None if the option has no such value.
    """
    known = known_classes(model)
    if not known:
        advice = f"Leave {option} out" if any_class is None else f"Give {any_class}"
        raise ArgumentError(f"{option}: this model is unconditional (trained without class labels). {advice}.")
    unknown = sorted(set(labels) - set(known))
    if unknown or not labels:
        problem = f"contains unknown classes {unknown[:8]}" if unknown else "is empty"
        rest = " (other classes have no training images)" if len(known) < model.num_classes else ""
        alternative = "" if any_class is None else f", or use {any_class} for any class"
        raise ArgumentError(f"{option} {problem}. Choose from {_ranges(known)}{rest}{alternative}.")


def guidance_problem(model: ModelConfig) -> str:
    """Return the reason why a teacher cannot be guided, or an empty string if guidance is possible."""
    if model.has_guide:
        return ""
    if model.conditioning == "none":
        return "this teacher is unconditional (trained without class labels)"
    if not model.network.has_null_label:
        return NO_NULL_LABEL
    if model.conditioning == "classes":
        return "this teacher has never seen the null label (trained without label dropout)"
    return "this teacher's training data have only one class" if len(known_classes(model)) == 1 else ""


def _ranges(numbers: tuple[int, ...]) -> str:
    """Format ascending numbers as ranges, such as "0 .. 3, 7". After eight ranges, write an ellipsis."""
    present = set(numbers)
    starts = [number for number in numbers if number - 1 not in present]
    ends = [number for number in numbers if number + 1 not in present]
    ranges = [str(a) if a == b else f"{a} .. {b}" for a, b in zip(starts, ends, strict=True)]
    return ", ".join(ranges[:8] + ["..."] * (len(ranges) > 8))

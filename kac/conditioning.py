"""The conditioning of a model and the labels passed to its network.

``ModelConfig.conditioning`` records which labels the network saw in training. Every stage that calls a network maps
the labels of samples with ``network_labels``, and checks ``guidance_problem`` before it applies guidance.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from kac.model import ModelConfig
from kac.networks import Conditioning, NetworkConfig
from kac.util.errors import ArgumentError

NO_NULL_LABEL = "this network has no null label (it was trained only with class labels)"


def learned_conditioning(network: NetworkConfig, label_dropout: float) -> Conditioning:
    """Return the conditioning of a teacher that is trained with this fraction of its labels dropped."""
    if network.conditioning == "none" or label_dropout == 1:
        return "none"
    return "classes" if label_dropout == 0 else network.conditioning


def network_labels(model: ModelConfig, label: Tensor) -> Tensor:
    """Return the labels [batch] to pass to the network: ``label``, or the null label if the model is unconditional."""
    return torch.full_like(label, model.num_classes) if model.conditioning == "none" else label


def known_classes(model: ModelConfig) -> tuple[int, ...]:
    """Return the classes that the network saw in training; no classes for an unconditional model."""
    if model.conditioning == "none":
        return ()
    return tuple(label for label, frequency in enumerate(model.class_frequencies) if frequency > 0)


def check_labels(
    model: ModelConfig, labels: Sequence[int], option: str = "`labels`", any_class: str | None = None
) -> None:
    """Raise ``ArgumentError`` if ``labels`` is empty or contains unknown classes, or the model is unconditional.

    Args:
        option: name of the labels in the error message.
        any_class: value of the option that means any class; None: the option has no such value.
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
    """Return the reason why a teacher cannot be guided; an empty string if it can be guided."""
    if model.conditioning == "none":
        return "this teacher is unconditional (trained without class labels)"
    if not model.network.has_null_label:
        return NO_NULL_LABEL
    if model.conditioning == "classes":
        return "this teacher has never seen the null label (trained without label dropout)"
    return "the training data of this teacher have only one class" if len(known_classes(model)) == 1 else ""


def _ranges(numbers: tuple[int, ...]) -> str:
    """Format ascending numbers as ranges, such as "0 .. 3, 7"; at most eight ranges, then an ellipsis."""
    present = set(numbers)
    starts = [number for number in numbers if number - 1 not in present]
    ends = [number for number in numbers if number + 1 not in present]
    ranges = [str(a) if a == b else f"{a} .. {b}" for a, b in zip(starts, ends, strict=True)]
    return ", ".join(ranges[:8] + ["..."] * (len(ranges) > 8))

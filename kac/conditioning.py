"""What a model was conditioned on, and the labels that its network is given.

A model records in ``ModelConfig.conditioning`` what its network saw in training. Every stage that calls a network maps
the labels of its samples with ``network_labels``, and asks ``why_no_guidance`` before it guides.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from kac.model import ModelConfig
from kac.networks import Conditioning, NetworkConfig
from kac.util.errors import ArgumentError

NO_NULL_LABEL = "this network has no null label (it knows classes only)"


def learned_conditioning(network: NetworkConfig, label_dropout: float) -> Conditioning:
    """What a teacher is conditioned on that is trained with this share of its labels dropped."""
    if network.conditioning == "none" or label_dropout == 1:
        return "none"
    return "classes" if label_dropout == 0 else network.conditioning


def network_labels(model: ModelConfig, label: Tensor) -> Tensor:
    """The labels that the network is given for samples of these classes [batch]: the null label if it knows none."""
    return torch.full_like(label, model.num_classes) if model.conditioning == "none" else label


def known_classes(model: ModelConfig) -> tuple[int, ...]:
    """The classes that the network has seen in training; none of an unconditional model."""
    if model.conditioning == "none":
        return ()
    return tuple(label for label, share in enumerate(model.class_frequencies) if share > 0)


def check_labels(
    model: ModelConfig, labels: Sequence[int], option: str = "`labels`", any_class: str | None = None
) -> None:
    """Refuse classes that the network has not seen in training.

    Args:
        option: what gave them. any_class: the label that stands for any class; None: there is none.

    Raises:
        ArgumentError: the message names them.
    """
    known = known_classes(model)
    if not known:
        advice = f"Leave {option} out" if any_class is None else f"Give {any_class}"
        raise ArgumentError(f"{option}: this model is unconditional: it was trained without class labels. {advice}.")
    unknown = sorted(set(labels) - set(known))
    if unknown or not labels:
        rest = " (the others have no training images)" if len(known) < model.num_classes else ""
        alternative = "" if any_class is None else f", or {any_class} for any"
        raise ArgumentError(f"{option}: expected classes {_ranges(known)}{rest}{alternative}, found {unknown[:8]}")


def why_no_guidance(model: ModelConfig) -> str:
    """Why guidance of a teacher means nothing; empty: it can be guided."""
    if model.conditioning == "none":
        return "this teacher is unconditional (it was trained without class labels)"
    if not model.network.has_null_label:
        return NO_NULL_LABEL
    if model.conditioning == "classes":
        return "this teacher has never seen the null label (it was trained without label dropout)"
    return "the data of this teacher have one class" if len(known_classes(model)) == 1 else ""


def _ranges(numbers: tuple[int, ...]) -> str:
    """Ascending numbers, neighbours as a range: 0 .. 3, 7; after eight ranges an ellipsis."""
    present = set(numbers)
    starts = [number for number in numbers if number - 1 not in present]
    ends = [number for number in numbers if number + 1 not in present]
    ranges = [str(a) if a == b else f"{a} .. {b}" for a, b in zip(starts, ends, strict=True)]
    return ", ".join([*ranges[:8], *(["..."] if len(ranges) > 8 else [])])

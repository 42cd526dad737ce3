"""Weights that others trained, as those of a network of this project."""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from kac.errors import CheckpointError, one_line
from kac.networks.network import NetworkConfig, build_network
from kac.networks.openai import OUR_CLASSES, from_openai, is_openai
from kac.networks.outside import Outside, OutsideConfig
from kac.networks.unet import UNetConfig
from kac.networks.velocity import NetworkModule
from kac.options import OptionError

WRAPPERS = ("module.", "_orig_mod.")
"""What data-parallel, averaged and compiled modules put before the names of their weights."""

AVERAGED_UPDATES = "n_averaged"
"""What PyTorch's averaged module has beside the weights."""


def adopt(
    network: NetworkModule, config: NetworkConfig, sample_shape: tuple[int, ...], weights: Mapping[str, Tensor]
) -> str:
    """Load the weights of a U-Net of OpenAI or of diffusers, of a module from outside, or of this project.

    Args:
        network: one of ``config`` for samples of ``sample_shape``, freshly built.

    Returns:
        What they are and what is to be known of them, in words.

    Raises:
        OptionError: options that do not go with such weights.
        CheckpointError: weights are missing, left over or of another shape.
    """
    target, names = _target(network)
    expected = target.state_dict()
    found, told = _unwrapped(weights, expected, names), []
    if isinstance(config, UNetConfig):
        if is_openai(found):
            heads = f"{config.head_channels} channels a head" if config.head_channels else "one head"
            told = [f"U-Net of OpenAI, with {heads} in attention, which its weights do not show"]
            found = from_openai(found, config, sample_shape[1], expected)
        taken = _with_all_classes(found.get(OUR_CLASSES), expected[OUR_CLASSES])
        found, told = {**found, OUR_CLASSES: taken.rows}, [*told, taken.told]
    kind = config.module if isinstance(config, OutsideConfig) else f"this {config.kind}"
    if problems := _misfits(found, expected):
        raise CheckpointError(
            f"expected the weights of {kind}, found {', '.join(problems[:3])} ({len(problems)} in all): "
            "check the options of --network, and --data"
        )
    target.load_state_dict(found)
    return "; ".join(told) or f"weights of {kind}"


def try_out(network: NetworkModule, config: NetworkConfig, sample_shape: tuple[int, ...], num_classes: int) -> None:
    """Call a network of ``config`` on two random samples; one from outside also once it has been built anew.

    Raises:
        CheckpointError: it fails, gives values that are not finite or of another shape, or others when built anew.
    """
    velocity = _velocity(network, sample_shape, num_classes)
    if not isinstance(network, Outside):
        return
    again = build_network(config, sample_shape, num_classes)
    again.load_state_dict(network.state_dict())
    if not torch.allclose(velocity, _velocity(again, sample_shape, num_classes), rtol=1e-3, atol=1e-4):
        raise CheckpointError(
            f"expected {network.name} to give the same velocities whenever it is built and given its weights, found "
            "others: it draws random numbers that are not among its weights: make them buffers"
        )


@torch.inference_mode()
def _velocity(network: NetworkModule, sample_shape: tuple[int, ...], num_classes: int) -> Tensor:
    random = torch.Generator().manual_seed(0)
    x, t = torch.randn(2, *sample_shape, generator=random), torch.tensor([0.3, 1.0])
    second = num_classes - 1 if network.null_label is None else network.null_label
    try:
        velocity: Tensor = network.eval()(x, t, torch.tensor([0, second]))
    except OptionError:
        raise
    except Exception as error:
        found = f"{type(error).__name__}: {one_line(error)}"
        raise CheckpointError(f"expected a velocity for samples of {list(sample_shape)}, found {found}") from error
    if velocity.shape != x.shape or not bool(velocity.isfinite().all()):
        found = "NaN or infinity" if velocity.shape == x.shape else f"shape {list(velocity.shape)}"
        raise CheckpointError(f"expected finite velocities of shape {list(x.shape)}, found {found}")
    return velocity


def _target(network: NetworkModule) -> tuple[nn.Module, tuple[str, ...]]:
    """The module that the weights are of, and what names of weights may have before its own."""
    if isinstance(network, Outside):
        return network.inner, WRAPPERS
    if network.diffusers_name:
        return network.get_submodule(network.diffusers_name), (*WRAPPERS, f"{network.diffusers_name}.")
    return network, WRAPPERS


def _unwrapped(
    weights: Mapping[str, Tensor], expected: Mapping[str, Tensor], prefixes: tuple[str, ...]
) -> dict[str, Tensor]:
    """The weights without what wrappers have added to them; a module may itself have a part called "module"."""
    found = {name: value for name, value in weights.items() if name != AVERAGED_UPDATES or name in expected}
    while not found.keys() <= expected.keys():
        prefix = next((prefix for prefix in prefixes if all(name.startswith(prefix) for name in found)), None)
        if prefix is None:
            break
        found = {name.removeprefix(prefix): value for name, value in found.items()}
    return found


class _Classes(NamedTuple):
    rows: Tensor  # [num_classes + 1, width]
    told: str


def _with_all_classes(found: Tensor | None, expected: Tensor) -> _Classes:
    """The embedding of classes with a row for each and one for "no class": rows that are not there are zeros."""
    if found is None:
        return _Classes(
            torch.zeros_like(expected), "without classes: every label is the same, and guidance does nothing"
        )
    if len(found) == len(expected) - 1:
        null = found.new_zeros(1, *found.shape[1:])
        return _Classes(
            torch.cat([found, null]), f"{len(found)} classes and no null label: it has not learned guidance"
        )
    if len(found) != len(expected):
        raise CheckpointError(
            f"expected {len(expected) - 1} classes, as --data has, with a null label or without, found {len(found)}"
        )
    return _Classes(found, f"{len(found) - 1} classes and a null label")


def _misfits(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> list[str]:
    problems = [f"{name} missing" for name in expected if name not in found]
    problems += [f"{name} left over" for name in found if name not in expected]
    both = [name for name in expected if name in found and found[name].shape != expected[name].shape]
    return problems + [f"{name} of shape {list(found[name].shape)}, not {list(expected[name].shape)}" for name in both]

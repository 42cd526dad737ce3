"""Load weights that others trained into a network of this project.

A file may hold several networks, averaged weights and optimizer states, each under its own prefix. ``adopt`` finds the
weights by the names that the network expects, under any prefix.
"""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from kac.networks.inferred_options import differing_options
from kac.networks.network import NetworkConfig, build_network
from kac.networks.openai import OUR_CLASSES, from_openai, is_openai, openai_names
from kac.networks.outside import Outside, OutsideConfig
from kac.networks.unet import UNetConfig
from kac.networks.velocity import Conditioning, NetworkModule
from kac.networks.weight_files import WRAPPERS, WeightsFile, choose_key, find_prefixes, remove_prefix
from kac.util.errors import ArgumentError, CheckpointError, DistillKacError
from kac.util.imports import describe_exception
from kac.util.text import shorten

MOST_PREFIXES = 200
"""The most prefixes to try. Generic names such as ``0.weight`` occur under many."""

MOST_PROBLEMS = 3
"""The most weights that a message names."""


class Adopted(NamedTuple):
    """The weights of a file that were loaded."""

    key: str  # their prefix; empty if they have none
    description: str
    conditioning: Conditioning


class _Fit(NamedTuple):
    """Weights that fit the network."""

    source: dict[str, Tensor]  # under their own names, without the prefix
    weights: dict[str, Tensor]  # under the names of the network
    description: str
    conditioning: Conditioning


def adopt(
    network: NetworkModule,
    config: NetworkConfig,
    sample_shape: tuple[int, ...],
    file: WeightsFile,
    key: str | None = None,
) -> Adopted:
    """Find and load the weights of ``network``.

    The file may come from OpenAI's U-Net, diffusers, a module of kind ``outside``, or this project.

    Args:
        network: freshly built from ``config`` for samples of ``sample_shape``.
        key: the prefix of the weights, or its first part; default: the only weights that fit, or their average.

    Raises:
        ArgumentError: the options contradict the weights.
        CheckpointError: no weights fit, or several do.
    """
    target = _target(network)
    expected = target.state_dict()
    wanted = {*expected, *(openai_names(config, sample_shape[1], expected) if isinstance(config, UNetConfig) else ())}
    key = None if key is None else WRAPPERS.sub("", f"{key}.").rstrip(".")
    # Prefixes below the key come first. The others are needed too: a list of averages may take its names from them.
    found = sorted(find_prefixes(file.named, wanted), key=lambda prefix: not _is_below(prefix, key))
    prefixes = found[:MOST_PREFIXES]
    fits: dict[str, _Fit] = {}
    failures: dict[str, DistillKacError] = {}

    def attempt(prefix: str, source: dict[str, Tensor]) -> None:
        try:
            fits[prefix] = _fit(source, config, sample_shape, expected)
        except (CheckpointError, ArgumentError) as error:
            failures[prefix] = error

    # Longer prefixes come first: weights that fit below a prefix are another model, not part of the one around it.
    for prefix in sorted(prefixes, key=len, reverse=True):
        others = tuple(other for other in fits if other.startswith(prefix))
        own = (name for name in file.named if name.startswith(prefix) and not name.startswith(others))
        attempt(prefix, {name.removeprefix(prefix): file.named[name] for name in own})
    sources = [fit.source for fit in fits.values()]
    for entry, tensors in file.unnamed.items():
        averaged = _name_list(tensors, sources, target)
        if averaged is not None:
            attempt(f"{entry}.", averaged)
    candidates = {prefix.rstrip("."): fit for prefix, fit in fits.items() if _is_below(prefix, key)}
    if not candidates:
        nearest = next((prefix for prefix in prefixes if _is_below(prefix, key)), None)
        if nearest is None:
            raise _no_common_names(file, key, config, expected)
        raise _does_not_fit(file, nearest, failures[nearest], config, sample_shape, expected)
    chosen = choose_key(sorted(candidates))
    fit = candidates[chosen]
    target.load_state_dict(fit.weights)
    loaded = {f"{chosen}.{name}" if chosen else name for name in fit.source}
    unused = file.describe_entries([name for name in file.named if name not in loaded], without=chosen)
    description = f"{fit.description}; also in the file: {unused}" if unused else fit.description
    return Adopted(chosen, description, fit.conditioning)


def try_out(network: NetworkModule, config: NetworkConfig, sample_shape: tuple[int, ...], num_classes: int) -> None:
    """Check that ``network`` returns velocities, and that an ``outside`` network is the same when it is rebuilt.

    Raises:
        CheckpointError: a call fails, a velocity is not finite or has another shape, or a rebuilt network differs.
    """
    velocity = _velocity(network, sample_shape, num_classes)
    if not isinstance(network, Outside):
        return
    rebuilt = build_network(config, sample_shape, num_classes)
    rebuilt.load_state_dict(network.state_dict())
    if not torch.allclose(velocity, _velocity(rebuilt, sample_shape, num_classes), rtol=1e-3, atol=1e-4):
        raise CheckpointError(
            f"{network.name} returns other velocities when it is rebuilt with the same weights, so it draws random "
            "numbers that are not among its weights. Register them as buffers."
        )


@torch.inference_mode()
def _velocity(network: NetworkModule, sample_shape: tuple[int, ...], num_classes: int) -> Tensor:
    """Return the velocity at two random samples."""
    random = torch.Generator().manual_seed(0)
    x, t = torch.randn(2, *sample_shape, generator=random), torch.tensor([0.3, 1.0])
    second = num_classes - 1 if network.null_label is None else network.null_label
    try:
        velocity: Tensor = network.eval()(x, t, torch.tensor([0, second]))
    except ArgumentError:
        raise
    except Exception as error:
        raise CheckpointError(
            f"the network fails on samples of shape {list(sample_shape)} ({describe_exception(error)})."
        ) from error
    if velocity.shape != x.shape:
        raise CheckpointError(
            f"the network returns velocities of shape {list(velocity.shape)} for samples of shape {list(x.shape)}."
        )
    if not bool(velocity.isfinite().all()):
        raise CheckpointError("the network returns NaN or infinity. Check its weights and `network.time_scale`.")
    return velocity


def _target(network: NetworkModule) -> nn.Module:
    """Return the module whose weights are loaded."""
    if isinstance(network, Outside):
        return network.inner
    return network.get_submodule(network.diffusers_name) if network.diffusers_name else network


def _is_below(prefix: str, key: str | None) -> bool:
    """Whether a prefix is ``key`` or below it. None accepts every prefix; "" accepts only the empty one."""
    return key is None or f"{prefix.rstrip('.')}.".startswith(f"{key}.")


def _fit(
    source: dict[str, Tensor], config: NetworkConfig, sample_shape: tuple[int, ...], expected: Mapping[str, Tensor]
) -> _Fit:
    """Return the weights under the names of the network.

    Raises:
        ArgumentError: the options contradict the weights.
        CheckpointError: weights are missing, unexpected or of another shape.
    """
    weights, facts, conditioning = source, [], config.conditioning
    if isinstance(config, UNetConfig):
        if is_openai(weights):
            heads = f"{config.head_channels} channels per head" if config.head_channels else "one head"
            facts = [f"U-Net of OpenAI, assuming {heads} in attention (not visible in the weights)"]
            weights = from_openai(weights, config, sample_shape[1], expected)
        classes = _complete_classes(weights.get(OUR_CLASSES), expected[OUR_CLASSES])
        weights, conditioning = {**weights, OUR_CLASSES: classes.rows}, classes.conditioning
        facts.append(classes.description)
    if problems := _find_problems(weights, expected):
        raise CheckpointError(shorten(problems, MOST_PROBLEMS))
    return _Fit(source, weights, "; ".join(facts) or f"weights of {_kind(config)}", conditioning)


def _name_list(tensors: list[Tensor], sources: list[dict[str, Tensor]], target: nn.Module) -> dict[str, Tensor] | None:
    """Return a list of averaged parameters under their names in the first source with the same shapes.

    Without sources, the names come from ``target``. Buffers come from the source. Returns None if no source matches.
    """
    own: dict[str, Tensor] = dict(target.named_parameters())
    first_name = {id(value): name for name, value in own.items()}
    shared = {name: first_name[id(value)] for name, value in target.named_parameters(remove_duplicate=False)}
    without_classes = {name: value for name, value in own.items() if name != OUR_CLASSES}
    for source in sources or [own, without_classes]:
        names = [name for name in source if name in own] if own.keys() & source.keys() else list(source)
        if [source[name].shape for name in names] == [value.shape for value in tensors]:
            averaged = dict(zip(names, tensors, strict=True))
            duplicates = {name: averaged[first] for name, first in shared.items() if first in averaged}
            return {**source, **averaged, **duplicates}
    return None


class _Classes(NamedTuple):
    rows: Tensor  # [num_classes + 1, width]
    description: str
    conditioning: Conditioning


def _complete_classes(rows: Tensor | None, expected: Tensor) -> _Classes:
    """Return a class embedding with a row per class and one for "no class". Missing rows are zeros."""
    if rows is None:
        return _Classes(torch.zeros_like(expected), "without classes: an unconditional teacher, no guidance", "none")
    if len(rows) == len(expected) - 1:
        null = rows.new_zeros(1, *rows.shape[1:])
        description = f"{len(rows)} classes and no null label: no guidance"
        return _Classes(torch.cat([rows, null]), description, "classes")
    if len(rows) != len(expected):
        raise CheckpointError(f"{OUR_CLASSES} has shape {list(rows.shape)} instead of {list(expected.shape)}")
    return _Classes(rows, f"{len(rows) - 1} classes and a null label", "classes_and_null")


def _find_problems(weights: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> list[str]:
    problems = [f"{name} is missing" for name in expected if name not in weights]
    problems += [f"{name} is unexpected" for name in weights if name not in expected]
    for name in (name for name in expected if name in weights):
        shape, expected_shape = list(weights[name].shape), list(expected[name].shape)
        if shape != expected_shape:
            problems.append(f"{name} has shape {shape} instead of {expected_shape}")
    return problems


def _kind(config: NetworkConfig) -> str:
    return config.module if isinstance(config, OutsideConfig) else f"a {config.kind}"


def _no_common_names(
    file: WeightsFile, key: str | None, config: NetworkConfig, expected: Mapping[str, Tensor]
) -> CheckpointError:
    """Return the error for a file without any name of the network."""
    name, value = next(iter(expected.items()))
    where, advice = ("", "the `network` that was trained") if key is None else (f" under `key` {key}", "another `key`")
    return CheckpointError(
        f"no weights of {_kind(config)} found{where}. The file holds {file.describe()}. The network has "
        f"{len(expected)} tensors, such as {name} {list(value.shape)}. Choose {advice}."
    )


def _does_not_fit(
    file: WeightsFile,
    prefix: str,
    failure: DistillKacError,
    config: NetworkConfig,
    sample_shape: tuple[int, ...],
    expected: Mapping[str, Tensor],
) -> DistillKacError:
    """Return the error for the weights that fit best. It names the options that differ, or else the weights."""
    if isinstance(failure, ArgumentError):
        return failure
    where = f"the weights under {prefix.rstrip('.')}" if prefix else "the weights"
    options = differing_options(config, remove_prefix(file.named, prefix), sample_shape, expected)
    if options:
        actual = ", ".join(options)
        return CheckpointError(
            f"{where} belong to {_kind(config)} with {actual}. Choose `network` and `data` to match."
        )
    return CheckpointError(
        f"{where} do not fit {_kind(config)}: {str(failure).rstrip('.')}. The file holds {file.describe()}. Choose "
        "the `network` and `data` of the training, or other weights with `key`."
    )

"""Weights that others trained, as those of a network of this project.

A file may hold several networks, averages and optimizer states, each under a prefix of its own. The weights of the
wanted network are found by the names that it expects, whatever stands before them.
"""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from kac.networks.network import NetworkConfig, build_network
from kac.networks.openai import OUR_CLASSES, from_openai, is_openai, openai_names
from kac.networks.outside import Outside, OutsideConfig
from kac.networks.shown import differing_options
from kac.networks.unet import UNetConfig
from kac.networks.velocity import Conditioning, NetworkModule
from kac.networks.weight_files import WRAPPERS, WeightsFile, below, choose, prefixes
from kac.util.errors import ArgumentError, CheckpointError, DistillKacError, one_line

MOST_TRIED = 200
"""Prefixes that are tried. Generic names such as ``0.weight`` are found in many places."""

MOST_NAMED = 3


class Adopted(NamedTuple):
    """Which weights of a file were loaded, and what they are."""

    key: str  # their prefix; empty: they have none
    told: str
    conditioning: Conditioning


class _Fit(NamedTuple):
    """Weights that fit the network."""

    source: dict[str, Tensor]  # under their own names, without the prefix
    weights: dict[str, Tensor]  # under the names of the network
    told: str
    conditioning: Conditioning


def adopt(
    network: NetworkModule,
    config: NetworkConfig,
    sample_shape: tuple[int, ...],
    file: WeightsFile,
    key: str | None = None,
) -> Adopted:
    """Find and load the weights of a U-Net of OpenAI or diffusers, a module from outside, or a network of this project.

    Args:
        network: one of ``config`` for samples of ``sample_shape``, freshly built.
        key: the prefix of the weights, or its beginning; default: the only weights that fit, or the average of them.

    Raises:
        ArgumentError: options that do not go with such weights.
        CheckpointError: no weights fit, or several do.
    """
    target = _target(network)
    expected = target.state_dict()
    wanted = {*expected, *(openai_names(config, sample_shape[1], expected) if isinstance(config, UNetConfig) else ())}
    key = None if key is None else WRAPPERS.sub("", f"{key}.").rstrip(".")
    # Those below the key first; the others may have the names for a list of averages there.
    found = sorted(prefixes(file.named, wanted), key=lambda prefix: not _is_below(prefix, key))
    tried = found[:MOST_TRIED]
    fits: dict[str, _Fit] = {}
    failures: dict[str, DistillKacError] = {}

    def attempt(prefix: str, source: dict[str, Tensor]) -> None:
        try:
            fits[prefix] = _fit(source, config, sample_shape, expected)
        except (CheckpointError, ArgumentError) as error:
            failures[prefix] = error

    # Longer prefixes first: what fits below one of them is another model, and no part of the model around it.
    for prefix in sorted(tried, key=len, reverse=True):
        others = tuple(other for other in fits if other.startswith(prefix))
        mine = (name for name in file.named if name.startswith(prefix) and not name.startswith(others))
        attempt(prefix, {name.removeprefix(prefix): file.named[name] for name in mine})
    sources = [fit.source for fit in fits.values()]
    for entry, tensors in file.unnamed.items():
        averaged = _named(tensors, sources, target)
        if averaged is not None:
            attempt(f"{entry}.", averaged)
    asked = {prefix.rstrip("."): fit for prefix, fit in fits.items() if _is_below(prefix, key)}
    if not asked:
        best = next((prefix for prefix in tried if _is_below(prefix, key)), None)
        if best is None:
            raise _no_names_in_common(file, key, config, expected)
        raise _misfit(file, best, failures[best], config, sample_shape, expected)
    chosen = choose(sorted(asked))
    fit = asked[chosen]
    target.load_state_dict(fit.weights)
    taken = {f"{chosen}.{name}" if chosen else name for name in fit.source}
    also = file.describe_entries([name for name in file.named if name not in taken], without=chosen)
    return Adopted(chosen, f"{fit.told}; also in the file: {also}" if also else fit.told, fit.conditioning)


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
    except ArgumentError:
        raise
    except Exception as error:
        found = f"{type(error).__name__}: {one_line(error)}"
        raise CheckpointError(f"expected a velocity for samples of {list(sample_shape)}, found {found}") from error
    if velocity.shape != x.shape or not bool(velocity.isfinite().all()):
        found = "NaN or infinity" if velocity.shape == x.shape else f"shape {list(velocity.shape)}"
        raise CheckpointError(f"expected finite velocities of shape {list(x.shape)}, found {found}")
    return velocity


def _target(network: NetworkModule) -> nn.Module:
    """The module that the weights are of."""
    if isinstance(network, Outside):
        return network.inner
    return network.get_submodule(network.diffusers_name) if network.diffusers_name else network


def _is_below(prefix: str, key: str | None) -> bool:
    """Whether a prefix is ``key``, or below it; all are if it is None, and only the empty one if it is empty."""
    return key is None or f"{prefix.rstrip('.')}.".startswith(f"{key}.")


def _fit(
    source: dict[str, Tensor], config: NetworkConfig, sample_shape: tuple[int, ...], expected: Mapping[str, Tensor]
) -> _Fit:
    """The weights under the names of the network; raises ``CheckpointError`` or ``ArgumentError`` unless they fit."""
    found, told, conditioning = source, [], config.conditioning
    if isinstance(config, UNetConfig):
        if is_openai(found):
            heads = f"{config.head_channels} channels a head" if config.head_channels else "one head"
            told = [f"U-Net of OpenAI, with {heads} in attention, which its weights do not show"]
            found = from_openai(found, config, sample_shape[1], expected)
        classes = _with_all_classes(found.get(OUR_CLASSES), expected[OUR_CLASSES])
        found, conditioning = {**found, OUR_CLASSES: classes.rows}, classes.conditioning
        told.append(classes.told)
    if problems := _misfits(found, expected):
        raise CheckpointError(f"{', '.join(problems[:MOST_NAMED])} ({len(problems)} in all)")
    return _Fit(source, found, "; ".join(told) or f"weights of {_kind(config)}", conditioning)


def _named(tensors: list[Tensor], sources: list[dict[str, Tensor]], target: nn.Module) -> dict[str, Tensor] | None:
    """A list of averaged parameters under the names that they have in one of ``sources``; None: in none of them.

    Without sources the names are those of ``target``. Buffers are taken from the source.
    """
    own: dict[str, Tensor] = dict(target.named_parameters())
    first_name = {id(value): name for name, value in own.items()}
    shared = {name: first_name[id(value)] for name, value in target.named_parameters(remove_duplicate=False)}
    without_classes = {name: value for name, value in own.items() if name != OUR_CLASSES}
    for source in sources or [own, without_classes]:
        names = [name for name in source if name in own] if own.keys() & source.keys() else list(source)
        if [source[name].shape for name in names] == [value.shape for value in tensors]:
            averaged = dict(zip(names, tensors, strict=True))
            again = {name: averaged[first] for name, first in shared.items() if first in averaged}
            return {**source, **averaged, **again}
    return None


class _Classes(NamedTuple):
    rows: Tensor  # [num_classes + 1, width]
    told: str
    conditioning: Conditioning


def _with_all_classes(found: Tensor | None, expected: Tensor) -> _Classes:
    """The embedding of classes with a row for each and one for "no class": rows that are not there are zeros."""
    if found is None:
        return _Classes(torch.zeros_like(expected), "without classes: an unconditional teacher, no guidance", "none")
    if len(found) == len(expected) - 1:
        null = found.new_zeros(1, *found.shape[1:])
        told = f"{len(found)} classes and no null label: no guidance"
        return _Classes(torch.cat([found, null]), told, "classes")
    if len(found) != len(expected):
        raise CheckpointError(f"{OUR_CLASSES} of shape {list(found.shape)}, not {list(expected.shape)}")
    return _Classes(found, f"{len(found) - 1} classes and a null label", "classes_and_null")


def _misfits(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> list[str]:
    problems = [f"{name} missing" for name in expected if name not in found]
    problems += [f"{name} left over" for name in found if name not in expected]
    both = [name for name in expected if name in found and found[name].shape != expected[name].shape]
    return problems + [f"{name} of shape {list(found[name].shape)}, not {list(expected[name].shape)}" for name in both]


def _kind(config: NetworkConfig) -> str:
    return config.module if isinstance(config, OutsideConfig) else f"a {config.kind}"


def _no_names_in_common(
    file: WeightsFile, key: str | None, config: NetworkConfig, expected: Mapping[str, Tensor]
) -> CheckpointError:
    """The refusal of a file of which no name is one of the network's."""
    name, value = next(iter(expected.items()))
    where, advice = ("", "the `network` that was trained") if key is None else (f" under `key` {key}", "another `key`")
    return CheckpointError(
        f"no weights of {_kind(config)} found{where}. The file holds {file.describe()}. Expected {len(expected)} "
        f"tensors, such as {name} {list(value.shape)}. Choose {advice}"
    )


def _misfit(
    file: WeightsFile,
    prefix: str,
    failure: DistillKacError,
    config: NetworkConfig,
    sample_shape: tuple[int, ...],
    expected: Mapping[str, Tensor],
) -> DistillKacError:
    """The refusal of the weights that come nearest: the options that they show, or else what does not fit."""
    if isinstance(failure, ArgumentError):
        return failure
    where = f"the weights under {prefix.rstrip('.')}" if prefix else "the weights"
    options = differing_options(config, below(file.named, prefix), sample_shape, expected)
    if options:
        found = ", ".join(options)
        return CheckpointError(f"{where} are of {_kind(config)} with {found}. Choose `network` and `data` to match")
    return CheckpointError(
        f"{where} do not fit {_kind(config)}: {failure}. The file holds {file.describe()}. Choose the `network` and "
        "`data` that they were trained with, or other weights with `key`"
    )

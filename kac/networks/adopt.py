"""Load third-party weights into a network of this project.

A file may contain several networks, averaged weights and optimizer states, each under its own prefix. ``adopt`` looks
for the tensor names that the network expects, under any prefix.
"""

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from kac.networks import NetworkConfig, build_network
from kac.networks.dit import DiTConfig
from kac.networks.mlp import MLPConfig
from kac.networks.openai import OPENAI_NAMES, from_openai, is_openai
from kac.networks.outside import Outside, OutsideConfig
from kac.networks.unet import UNetConfig
from kac.networks.velocity import Conditioning, NetworkModule
from kac.networks.weight_files import WRAPPERS, WeightsFile, choose_key, find_prefixes
from kac.util.errors import ArgumentError, CheckpointError, DistillKacError
from kac.util.imports import describe_exception
from kac.util.text import shorten

MOST_PREFIXES = 200
"""Maximum number of prefixes to try. Generic names such as ``0.weight`` occur under many prefixes."""

CLASSES = "class_embedding.weight"
"""Name of a U-Net's class embedding. A file may lack the embedding, or only its row for the null label."""

Weights = Mapping[str, Tensor]


class Adopted(NamedTuple):
    """A description of the weights that were loaded from a file."""

    key: str  # the prefix of the weights in the file; may be empty
    description: str
    conditioning: Conditioning


class _Fit(NamedTuple):
    source: dict[str, Tensor]  # named as in the file, without the prefix
    weights: dict[str, Tensor]  # named as in the network
    description: str
    conditioning: Conditioning


def adopt(
    network: NetworkModule,
    config: NetworkConfig,
    sample_shape: tuple[int, ...],
    file: WeightsFile,
    key: str | None = None,
) -> Adopted:
    """Find weights for ``network`` in a file and load them.

    The weights may belong to OpenAI's U-Net, diffusers, a module of kind ``outside``, or this project.

    Args:
        network: freshly built from ``config`` for samples of ``sample_shape``.
        key: prefix of the weights, or its first part; default: the only weights that fit, or the only averaged weights.

    Raises:
        ArgumentError: the options contradict the weights.
        CheckpointError: no weights fit, or several sets of weights fit.
    """
    target = network.inner if isinstance(network, Outside) else network.get_submodule(network.diffusers_name or "")
    expected = target.state_dict()
    known = {*expected, *(OPENAI_NAMES if isinstance(config, UNetConfig) else ())}
    key = None if key is None else WRAPPERS.sub("", f"{key}.").rstrip(".")

    def is_below_key(prefix: str) -> bool:
        return key is None or f"{prefix.rstrip('.')}.".startswith(f"{key}.")

    # Try prefixes below the key first. Other prefixes are tried only to supply names for an unnamed list of averages.
    prefixes = sorted(find_prefixes(file.named, known), key=lambda prefix: not is_below_key(prefix))[:MOST_PREFIXES]
    fits: dict[str, _Fit] = {}
    failures: dict[str, DistillKacError] = {}

    def attempt(prefix: str, source: dict[str, Tensor]) -> None:
        try:
            fits[prefix] = _fit(source, config, expected)
        except (CheckpointError, ArgumentError) as error:
            failures[prefix] = error

    # Try longer prefixes first: weights that form a complete model do not belong to the model that encloses them.
    for prefix in sorted(prefixes, key=len, reverse=True):
        others = tuple(other for other in fits if other.startswith(prefix))
        own = (name for name in file.named if name.startswith(prefix) and not name.startswith(others))
        attempt(prefix, {name.removeprefix(prefix): file.named[name] for name in own})
    sources = [fit.source for fit in fits.values()]
    for entry, tensors in file.unnamed.items():
        averaged = _name_list(tensors, sources, target)
        if averaged is not None:
            attempt(f"{entry}.", averaged)
    candidates = {prefix.rstrip("."): fit for prefix, fit in fits.items() if is_below_key(prefix)}
    if not candidates:
        nearest = next(filter(is_below_key, prefixes), None)
        if nearest is None:
            raise _without_weights(file, key, config, expected)
        raise _misfit(file, nearest, failures[nearest], config, sample_shape, expected)
    chosen = choose_key(sorted(candidates))
    fit = candidates[chosen]
    target.load_state_dict(fit.weights)
    loaded = {f"{chosen}.{name}" if chosen else name for name in fit.source}
    unused = file.describe_entries([name for name in file.named if name not in loaded], without=chosen)
    description = f"{fit.description}; also in the file: {unused}" if unused else fit.description
    return Adopted(chosen, description, fit.conditioning)


def _without_weights(file: WeightsFile, key: str | None, config: NetworkConfig, expected: Weights) -> CheckpointError:
    where, advice = ("", "the `network` that was trained") if key is None else (f" under `key` {key}", "another `key`")
    name, value = next(iter(expected.items()))
    return CheckpointError(
        f"no weights of {_kind(config)} found{where}. The file contains {file.describe()}. The network has "
        f"{len(expected)} tensors, such as {name} {list(value.shape)}. Choose {advice}."
    )


def _misfit(
    file: WeightsFile,
    prefix: str,
    failure: DistillKacError,
    config: NetworkConfig,
    sample_shape: tuple[int, ...],
    expected: Weights,
) -> DistillKacError:
    """Return the error for the most similar weights. The error names the options or tensors that differ."""
    if isinstance(failure, ArgumentError):
        return failure
    where = f"the weights under {prefix.rstrip('.')}" if prefix else "the weights"
    source = {name.removeprefix(prefix): value for name, value in file.named.items() if name.startswith(prefix)}
    try:
        inferred = _infer_options(config, source, sample_shape, expected)
    except (KeyError, IndexError, ValueError, CheckpointError):  # a tensor that would reveal an option is missing
        inferred = []
    options = [f"{name} {_text(here)} (given: {_text(given)})" for name, here, given in inferred if here != given]
    if options:
        return CheckpointError(
            f"{where} belong to {_kind(config)} with {', '.join(options)}. Choose `network` and `data` to match."
        )
    return CheckpointError(
        f"{where} do not fit {_kind(config)}: {str(failure).rstrip('.')}. The file contains {file.describe()}. Choose "
        "the `network` and `data` of the training run, or select different weights with `key`."
    )


def _text(value: Any) -> str:
    return (" ".join(map(str, value)) or "without a value") if isinstance(value, tuple) else str(value)


def _kind(config: NetworkConfig) -> str:
    return config.module if isinstance(config, OutsideConfig) else f"a {config.kind}"


def try_out(network: NetworkModule, config: NetworkConfig, sample_shape: tuple[int, ...], num_classes: int) -> None:
    """Raise ``CheckpointError`` if ``network`` returns no velocities, or different velocities when it is rebuilt."""
    velocity = _velocity(network, sample_shape, num_classes)
    if not isinstance(network, Outside):
        return
    rebuilt = build_network(config, sample_shape, num_classes)
    rebuilt.load_state_dict(network.state_dict())
    if not torch.allclose(velocity, _velocity(rebuilt, sample_shape, num_classes), rtol=1e-3, atol=1e-4):
        raise CheckpointError(
            f"{network.name} returns different velocities when it is rebuilt with the same weights, so it depends on "
            "random values that its weights do not include. Register these values as buffers."
        )


@torch.inference_mode()
def _velocity(network: NetworkModule, sample_shape: tuple[int, ...], num_classes: int) -> Tensor:
    """Return the velocities at two random samples."""
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


def _fit(source: dict[str, Tensor], config: NetworkConfig, expected: Weights) -> _Fit:
    """Return the weights, under the network's names. Raises an error if the options or the weights do not fit."""
    weights, description, conditioning = source, f"weights of {_kind(config)}", config.conditioning
    if isinstance(config, UNetConfig):
        origin = ""
        if is_openai(weights):
            heads = f"{config.head_channels} channels per head" if config.head_channels else "one head"
            origin = f"OpenAI U-Net, assuming {heads} in attention (not visible in the weights); "
            weights = from_openai(weights, config)
        rows, all_rows = weights.get(CLASSES), expected[CLASSES]
        if rows is None:
            rows, conditioning = torch.zeros_like(all_rows), "none"
            description = "without classes: an unconditional teacher, no guidance"
        elif len(rows) == len(all_rows) - 1:
            description, conditioning = f"{len(rows)} classes and no null label: no guidance", "classes"
            rows = torch.cat([rows, rows.new_zeros(1, *rows.shape[1:])])
        else:
            description = f"{len(rows) - 1} classes and a null label"
        weights, description = {**weights, CLASSES: rows}, origin + description
    problems = [f"{name} is missing" for name in expected if name not in weights]
    problems += [f"{name} is unexpected" for name in weights if name not in expected]
    for name in (name for name in expected if name in weights):
        shape, expected_shape = list(weights[name].shape), list(expected[name].shape)
        if shape != expected_shape:
            problems.append(f"{name} has shape {shape} instead of {expected_shape}")
    if problems:
        raise CheckpointError(shorten(problems, 3))
    return _Fit(source, weights, description, conditioning)


def _name_list(tensors: list[Tensor], sources: list[dict[str, Tensor]], target: nn.Module) -> dict[str, Tensor] | None:
    """Name a list of averaged parameters as in the first source whose parameters have the same shapes.

    Buffers come from this source. If ``sources`` is empty, ``target`` provides the names. Returns None if none matches.
    """
    own: dict[str, Tensor] = dict(target.named_parameters())
    first_name = {id(value): name for name, value in own.items()}
    shared = {name: first_name[id(value)] for name, value in target.named_parameters(remove_duplicate=False)}
    without_classes = {name: value for name, value in own.items() if name != CLASSES}
    for source in sources or [own, without_classes]:
        names = [name for name in source if name in own] if own.keys() & source.keys() else list(source)
        if [source[name].shape for name in names] == [value.shape for value in tensors]:
            averaged = dict(zip(names, tensors, strict=True))
            duplicates = {name: averaged[first] for name, first in shared.items() if first in averaged}
            return {**source, **averaged, **duplicates}
    return None


def _infer_options(
    config: NetworkConfig, weights: Weights, sample_shape: tuple[int, ...], expected: Weights
) -> list[tuple[str, Any, Any]]:
    """Return the options that can be inferred from weights, each with its value in the weights and in the config."""

    def count(pattern: str) -> int:
        return 1 + max(int(match[1]) for name in weights if (match := re.match(pattern, name)))

    if isinstance(config, MLPConfig):
        table = "label.weight"
        width, size = weights["enter.weight"].shape
        options: list[tuple[str, Any, Any]] = [
            ("`network.width`", width, config.width),
            ("`network.depth`", count(r"blocks\.(\d+)\."), config.depth),
            ("values per sample (`data`):", size, expected["enter.weight"].shape[1]),
        ]
    elif isinstance(config, DiTConfig):
        table = "transformer_blocks.0.norm1.emb.class_embedder.embedding_table.weight"
        width, inputs, patch, _ = weights["pos_embed.proj.weight"].shape
        options = [
            ("`network.heads` x `network.head_channels`", width, config.heads * config.head_channels),
            ("`network.depth`", count(r"transformer_blocks\.(\d+)\."), config.depth),
            ("`network.patch`", patch, config.patch),
            ("`data.channels`", inputs, sample_shape[0]),
        ]
    elif isinstance(config, UNetConfig):
        table = CLASSES
        weights = from_openai(weights, config) if is_openai(weights) else weights
        levels, side = range(count(r"down_blocks\.(\d+)\.")), sample_shape[1] // config.patch
        channels = tuple(len(weights[f"down_blocks.{level}.resnets.0.conv1.weight"]) for level in levels)
        attention = tuple(side // 2**i for i in levels if f"down_blocks.{i}.attentions.0.to_q.weight" in weights)
        scale_shift = len(weights["down_blocks.0.resnets.0.time_emb_proj.weight"]) == 2 * channels[0]
        options = [
            ("`network.channels`", channels, config.channels),
            ("`network.blocks`", count(r"down_blocks\.0\.resnets\.(\d+)\."), config.blocks),
            ("`network.attention`", attention, tuple(sorted(config.attention, reverse=True))),
            ("`network.scale_shift`", scale_shift, config.scale_shift),
            (
                "`data.channels`" if config.patch == 1 else "`data.channels` x `network.patch` squared",
                weights["conv_in.weight"].shape[1],
                expected["conv_in.weight"].shape[1],
            ),
        ]
    else:
        return []
    rows, all_rows = len(weights.get(table, expected[table])), len(expected[table])
    if table != CLASSES or rows != all_rows - 1:
        options.append(("labels (the classes of `data`, and 'no class'):", rows, all_rows))
    return options

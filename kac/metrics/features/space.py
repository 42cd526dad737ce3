"""Feature spaces, opened by the values of the option ``features``."""

import contextlib
import hashlib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from kac.data import Dataset
from kac.metrics.features.calls import call_network, check_widths, run_network, try_out
from kac.util import files
from kac.util.errors import ArgumentError
from kac.util.fingerprint import fingerprint
from kac.util.images import is_image
from kac.util.imports import IMPORT_PATH, describe_exception

BATCH_SIZE = 250
WIDEST = 32
"""Larger images are averaged down to this many pixels per side for ``pixels`` and ``classifier``."""

TORCHSCRIPT = (".pt", ".ts")
OWN = ("pixels", "pooled", "classifier")
"""This project's own spaces. All other networks are tried on real images before any work."""

KINDS = (*OWN, "lite0", "inception")


@dataclass(frozen=True)
class FeatureSpace:
    """A trained network from delivered samples to features."""

    name: str  # part of the names of metrics
    fingerprint: str  # of the network; part of the names of cached features
    network: nn.Module  # [batch, *sample] float32 in [-1, 1] -> [batch, width]
    facts: dict[str, float]  # printed and stored, such as the classifier's held-out accuracy
    given: str  # the value of the option

    @property
    def is_cheap(self) -> bool:
        """Whether computing the features is as fast as reading them from the cache."""
        return self.given in {"pixels", "pooled"}

    @torch.inference_mode()
    def __call__(self, samples: Tensor) -> Tensor:
        """[batch, *sample] -> [batch, width] float32, both on the CPU.

        Raises:
            ArgumentError: the network fails, or its output is not features.
        """
        batches = torch.split(samples, BATCH_SIZE)
        if self.given in OWN:
            parts = [run_network(self.network, batch).float().cpu() for batch in batches]
        else:
            parts = [call_network(self.option, self.network, batch) for batch in batches]
            check_widths(self.option, *(part.shape[1] for part in parts))
        return torch.cat(parts)

    @property
    def option(self) -> str:
        """The argument and its value, for error messages."""
        return f"`features` {self.given}"


def open_space(given: str, data: Dataset, device: torch.device | str = "cpu") -> FeatureSpace:
    """Open a feature space. The classifier is trained first if it is not in the cache.

    Args:
        given: one of ``KINDS``, a TorchScript file (.pt or .ts; a path or s3:// URI), or an import path
            ``package.module:factory`` of a function without arguments that returns an ``nn.Module``.

    Raises:
        ArgumentError: the name is unknown, a package or file is missing, or the space does not fit the data.
    """
    from kac.metrics.features import classifier, pretrained

    check_fits(given, data)
    openers: dict[str, Callable[[], tuple[nn.Module, dict[str, float], str]]] = {
        "pixels": lambda: (Pixels(), {}, ""),
        "pooled": lambda: (Pooled(), {}, ""),
        "classifier": lambda: classifier.open_classifier(data),
        "lite0": lambda: (pretrained.lite0(), {}, ""),
        "inception": lambda: (pretrained.inception(), {}, ""),
    }
    if given in openers:
        network, facts, content = openers[given]()
    elif given.endswith(TORCHSCRIPT):
        network, facts, content = pretrained.torchscript(given), {}, ""
    else:
        network, facts, content = pretrained.imported(given), {}, ""
    identity = fingerprint({**space_identity(given, data), "content": content})
    return FeatureSpace(space_name(given), identity, _prepare(given, network, device), facts, given)


def try_space(given: str, data: Dataset, device: torch.device | str = "cpu") -> None:
    """Open a space and try its network on a few real images, unless it is one of this project's own spaces.

    Raises:
        ArgumentError: as ``open_space``, or the network does not work on these images.
    """
    if given not in OWN:
        space = open_space(given, data, device)
        try_out(space.option, space.network, data)


def check_fits(given: str, data: Dataset) -> None:
    """Check that a space fits the data, without opening it.

    Raises:
        ArgumentError: the space needs images, larger images, or several classes.
    """
    shape = data.description.sample_shape
    if given in {"pooled", "lite0", "inception"} and not is_image(shape):
        raise ArgumentError(f"`features` {given} needs images, and the data has samples of shape {shape}.")
    if given == "pooled" and min(shape[1:]) < Pooled.SIDE:
        raise ArgumentError(
            f"`features` pooled needs at least {Pooled.SIDE} pixels per side, and the images have shape {shape}."
        )
    if given == "classifier" and data.description.num_classes < 2:
        raise ArgumentError("`features` classifier needs several classes, and the data has one. Choose other features.")


def _prepare(given: str, network: nn.Module, device: torch.device | str) -> nn.Module:
    """Put the network in evaluation mode and move it to the device."""
    try:
        # Modules from torch.export have no modes: they reject eval() and run as exported.
        with contextlib.suppress(NotImplementedError):
            network.eval()
        return network.to(device)
    except Exception as error:
        if given in OWN:
            raise
        raise ArgumentError(
            f"`features` {given}: the network cannot be moved to the {torch.device(device).type}: "
            f"{describe_exception(error)}. Save it on the CPU, with all its weights."
        ) from error


def space_identity(given: str, data: Dataset) -> dict[str, str]:
    """Return a space's identity without opening it: its name, with the hash of its file or training data."""
    if given.endswith(TORCHSCRIPT):
        return {"space": given.rsplit("/", 1)[-1], "sha256": _file_sha256(given)}
    return {"space": given, "data": data.description.sha256} if given == "classifier" else {"space": given}


def space_name(given: str) -> str:
    """Return a space's name in metrics: its kind, its file's name without the ending, or its factory's name."""
    bare = given.rsplit("/", 1)[-1].rsplit(":", 1)[-1]
    for ending in TORCHSCRIPT:
        bare = bare.removesuffix(ending)
    return re.sub(r"[^0-9a-zA-Z]+", "_", bare).strip("_")


def check_names(features: Sequence[str]) -> None:
    """Check the values of ``features`` without opening the spaces.

    Raises:
        ValueError: a name is unknown or occurs twice, or a network has the name ``pixels``.
    """
    for given in features:
        if given not in KINDS and not given.endswith(TORCHSCRIPT) and not IMPORT_PATH.fullmatch(given):
            raise ValueError(
                f"`features` has {given!r}, which is unknown. Choose {', '.join(KINDS)}, FILE.pt or "
                "package.module:factory."
            )
    names = [space_name(given) for given in features]
    for given, name in zip(features, names, strict=True):
        if not name or (name == "pixels" and given != "pixels"):
            raise ValueError(f"`features` has {given!r}, whose name in metrics would be {name!r}. Rename the network.")
    if len(set(names)) < len(names):
        raise ValueError(f"`features` has spaces with the same name: {', '.join(names)}. Rename or remove one.")


def averaged_down(samples: Tensor, widest: int = WIDEST) -> Tensor:
    """Average images down to at most ``widest`` pixels per side; return other samples unchanged."""
    if not is_image(tuple(samples.shape[1:])) or max(samples.shape[2:]) <= widest:
        return samples
    height, width = (min(side, widest) for side in samples.shape[2:])
    return nn.functional.adaptive_avg_pool2d(samples, (height, width))


class Pixels(nn.Module):
    """The flattened sample. Images above 32 x 32 are averaged down first, to keep the covariance small."""

    def forward(self, samples: Tensor) -> Tensor:
        """[batch, *sample] -> [batch, width]."""
        return averaged_down(samples).flatten(1)


class Pooled(nn.Module):
    """The means of blocks of 4 x 4 pixels. Incomplete blocks at the edges are ignored."""

    SIDE = 4

    def forward(self, samples: Tensor) -> Tensor:
        """[batch, channels, height, width] -> [batch, channels * (height // 4) * (width // 4)]."""
        return nn.functional.avg_pool2d(samples, self.SIDE).flatten(1)


def _file_sha256(path: str) -> str:
    try:
        return hashlib.sha256(files.read_bytes(path)).hexdigest()
    except (FileNotFoundError, NotADirectoryError):
        raise ArgumentError(f"`features` {path} does not exist. Give a TorchScript file.") from None

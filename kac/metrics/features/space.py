"""What a feature space is, and how it is opened by the name that ``features`` gives it."""

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
from kac.util.errors import ArgumentError, one_line
from kac.util.fingerprint import fingerprint
from kac.util.images import is_image
from kac.util.imports import IMPORT_PATH

BATCH_SIZE = 250
WIDEST = 32
"""Pixels and the classifier see larger images averaged down to this many pixels a side."""

TORCHSCRIPT = (".pt", ".ts")
OWN = ("pixels", "pooled", "classifier")
"""Networks of this project; all others are tried on real images before any work."""

KINDS = (*OWN, "lite0", "inception")


@dataclass(frozen=True)
class FeatureSpace:
    """A network without training left to do: delivered samples to features."""

    name: str  # as it stands in the names of metrics
    fingerprint: str  # of what it computes: features under this name are never another network's
    network: nn.Module  # [batch, *sample] float32 in [-1, 1] -> [batch, width]
    facts: dict[str, float]  # printed and recorded: the classifier's held-out accuracy
    given: str  # the value of `features`

    @property
    def is_cheap(self) -> bool:
        """Whether computing the features costs no more than reading them."""
        return self.given in {"pixels", "pooled"}

    @torch.inference_mode()
    def __call__(self, samples: Tensor) -> Tensor:
        """[batch, *sample] -> [batch, width] float32, both on the CPU.

        Raises:
            ArgumentError: the network fails or returns something else.
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
        """The option and its value, which errors name."""
        return f"`features` {self.given}"


def open_space(given: str, data: Dataset, device: torch.device | str = "cpu") -> FeatureSpace:
    """The space that ``features`` calls so; the classifier is trained first if the cache has none for this data.

    Args:
        given: one of ``KINDS``, a TorchScript file (.pt, .ts; a path or s3:// URI), or an import path
            ``package.module:factory`` of a function without arguments that returns an ``nn.Module``.

    Raises:
        ArgumentError: an unknown name, a package or file that is missing, or a space that does not fit the data.
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
    name = fingerprint({**space_identity(given, data), "content": content})
    return FeatureSpace(space_name(given), name, _placed(given, network, device), facts, given)


def try_space(given: str, data: Dataset, device: torch.device | str = "cpu") -> None:
    """Open a space whose network others made, and call the network on a few real images.

    Raises:
        ArgumentError: as ``open_space``, or the network does not work on these images.
    """
    if given not in OWN:
        space = open_space(given, data, device)
        try_out(space.option, space.network, data)


def check_fits(given: str, data: Dataset) -> None:
    """Refuse a space that does not fit the data, without opening it.

    Raises:
        ArgumentError: it needs larger images, images at all, or several classes.
    """
    shape = data.description.sample_shape
    if given in {"pooled", "lite0", "inception"} and not is_image(shape):
        raise ArgumentError(f"`features` {given}: expected images, found samples of {shape}")
    if given == "pooled" and min(shape[1:]) < Pooled.SIDE:
        raise ArgumentError(
            f"`features` pooled: expected images of at least {Pooled.SIDE} pixels a side, found {shape}"
        )
    if given == "classifier" and data.description.num_classes < 2:
        raise ArgumentError("`features` classifier: expected data of several classes, found one: choose other features")


def _placed(given: str, network: nn.Module, device: torch.device | str) -> nn.Module:
    """The network in evaluation mode on the device."""
    try:
        # What torch.export saved has no modes: it refuses eval() and computes as it was exported.
        with contextlib.suppress(NotImplementedError):
            network.eval()
        return network.to(device)
    except Exception as error:
        if given in OWN:
            raise
        raise ArgumentError(
            f"`features` {given}: the network cannot be moved to the {torch.device(device).type}: "
            f"{type(error).__name__}: {one_line(error)}. Save it on the CPU, with all its weights."
        ) from error


def space_identity(given: str, data: Dataset) -> dict[str, str]:
    """What is known of a space without opening it: its name, and the content of its file or of the data it learns."""
    if given.endswith(TORCHSCRIPT):
        return {"space": given.rsplit("/", 1)[-1], "sha256": _file_sha256(given)}
    return {"space": given, "data": data.description.sha256} if given == "classifier" else {"space": given}


def space_name(given: str) -> str:
    """What metrics in this space are called after: a kind, a file's name without its ending, a factory's name."""
    bare = given.rsplit("/", 1)[-1].rsplit(":", 1)[-1]
    for ending in TORCHSCRIPT:
        bare = bare.removesuffix(ending)
    return re.sub(r"[^0-9a-zA-Z]+", "_", bare).strip("_")


def check_names(features: Sequence[str]) -> None:
    """Refuse what cannot be a feature space by its name alone.

    Raises:
        ValueError: an unknown name, one that is there twice, or a network called ``pixels``.
    """
    for given in features:
        if given not in KINDS and not given.endswith(TORCHSCRIPT) and not IMPORT_PATH.fullmatch(given):
            raise ValueError(f"expected {', '.join(KINDS)}, FILE.pt or package.module:factory, found {given!r}")
    names = [space_name(given) for given in features]
    for given, name in zip(features, names, strict=True):
        if not name or (name == "pixels" and given != "pixels"):
            raise ValueError(f"expected a name other than {name!r}, which no other space may have, found {given!r}")
    if len(set(names)) < len(names):
        raise ValueError(f"expected spaces of different names, found {', '.join(names)}")


def averaged_down(samples: Tensor, widest: int = WIDEST) -> Tensor:
    """Images wider or higher than ``widest`` averaged over areas down to that; other samples as they are."""
    if not is_image(tuple(samples.shape[1:])) or max(samples.shape[2:]) <= widest:
        return samples
    height, width = (min(side, widest) for side in samples.shape[2:])
    return nn.functional.adaptive_avg_pool2d(samples, (height, width))


class Pixels(nn.Module):
    """The flattened sample itself; images beyond 32 x 32 are averaged down, or their covariance would be too wide."""

    def forward(self, samples: Tensor) -> Tensor:
        """[batch, *sample] -> [batch, width]."""
        return averaged_down(samples).flatten(1)


class Pooled(nn.Module):
    """The means of squares of 4x4 pixels: what an image is from afar. What is left over at the edges is not seen."""

    SIDE = 4

    def forward(self, samples: Tensor) -> Tensor:
        """[batch, channels, height, width] -> [batch, channels * (height // 4) * (width // 4)]."""
        return nn.functional.avg_pool2d(samples, self.SIDE).flatten(1)


def _file_sha256(path: str) -> str:
    try:
        return hashlib.sha256(files.read_bytes(path)).hexdigest()
    except (FileNotFoundError, NotADirectoryError):
        raise ArgumentError(f"`features`: expected a TorchScript file, found none at {path}") from None

"""What a feature space is, and how it is opened by the name that ``--features`` gives it."""

import hashlib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from kac import files
from kac.data import Dataset
from kac.fingerprint import fingerprint
from kac.images import is_image
from kac.imported import IMPORT_PATH
from kac.options import OptionError

BATCH_SIZE = 250
WIDEST = 32
"""Pixels and the classifier see larger images averaged down to this many pixels a side."""

TORCHSCRIPT = (".pt", ".ts")
KINDS = ("pixels", "pooled", "classifier", "lite0", "inception")


@dataclass(frozen=True)
class FeatureSpace:
    """A network without training left to do: delivered samples to features."""

    name: str  # as it stands in the names of metrics
    fingerprint: str  # of what it computes: features under this name are never another network's
    network: nn.Module  # [batch, *sample] float32 in [-1, 1] -> [batch, width]
    facts: dict[str, float]  # printed and recorded: the classifier's held-out accuracy

    @property
    def is_cheap(self) -> bool:
        """Whether computing the features costs no more than reading them."""
        return self.name in {"pixels", "pooled"}

    @torch.inference_mode()
    def __call__(self, samples: Tensor) -> Tensor:
        """[batch, *sample] -> [batch, width] float32, both on the CPU.

        Raises:
            OptionError: the network gives something else.
        """
        device = next((p.device for p in self.network.parameters()), torch.device("cpu"))
        parts = [self.network(part.to(device)) for part in torch.split(samples, BATCH_SIZE)]
        if any(not isinstance(part, Tensor) or part.ndim != 2 for part in parts):
            found = list(getattr(parts[0], "shape", ())) or type(parts[0]).__name__
            raise OptionError(f"--features {self.name}: expected features of shape [batch, width], found {found}")
        return torch.cat(parts).float().cpu()


def open_space(given: str, data: Dataset, device: torch.device | str = "cpu") -> FeatureSpace:
    """The space that ``--features`` calls so; the classifier is trained first if the cache has none for this data.

    Args:
        given: one of ``KINDS``, a TorchScript file (.pt, .ts; a path or s3:// URI), or an import path
            ``package.module:factory`` of a function without arguments that returns an ``nn.Module``.

    Raises:
        OptionError: an unknown name, a package or file that is missing, or a space that does not fit the data.
    """
    from kac.metrics.features import classifier, pretrained

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
    shape = data.description.sample_shape
    if given in {"pooled", "lite0", "inception"} and not is_image(shape):
        raise OptionError(f"--features {given}: expected images, found samples of {shape}")
    if given == "pooled" and min(shape[1:]) < Pooled.SIDE:
        raise OptionError(f"--features pooled: expected images of at least {Pooled.SIDE} pixels a side, found {shape}")
    name = fingerprint({**space_identity(given, data), "content": content})
    return FeatureSpace(space_name(given), name, network.eval().to(device), facts)


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
        ValueError: an unknown name, or one that is there twice.
    """
    for given in features:
        if given not in KINDS and not given.endswith(TORCHSCRIPT) and not IMPORT_PATH.fullmatch(given):
            raise ValueError(f"expected {', '.join(KINDS)}, FILE.pt or package.module:factory, found {given!r}")
    names = [space_name(given) for given in features]
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
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
        raise OptionError(f"--features: expected a TorchScript file, found none at {path}") from None

"""Feature spaces, which the option ``features`` selects, and checks of the user's own feature networks."""

import contextlib
import hashlib
import itertools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kac.data import Dataset
from kac.util import files
from kac.util.errors import ArgumentError, DistillKacError, one_line
from kac.util.fingerprint import fingerprint
from kac.util.images import delivered, is_image
from kac.util.imports import IMPORT_PATH, build, describe_exception

BATCH_SIZE, TRAINING_ROWS, TRIAL_ROWS = 250, 1000, 16
"""Samples per network call, training images per part, and training images on which a network is tried."""

WIDEST = 32
"""The spaces ``pixels`` and ``classifier`` average larger images down to this many pixels per side."""

TORCHSCRIPT = (".pt", ".ts")
OWN = ("pixels", "pooled", "classifier")
"""This project's own spaces. All other spaces' networks are tried on training images before an evaluation starts."""

KINDS = (*OWN, "lite0", "inception")
MAX_WIDTH, MAX_VALUE = 16_384, 1e6
"""Limits of features: a covariance matrix of this width takes 2 GiB, and the cube of this value fits in float32."""

SAME = 0.02
"""The largest relative difference that half precision or a different batch size may cause in features."""


@dataclass(frozen=True)
class FeatureSpace:
    """A network that maps delivered samples to features."""

    name: str  # part of metric names
    fingerprint: str  # identifies the network; part of the names of cached features
    network: nn.Module  # [batch, *sample] float32 in [-1, 1] -> [batch, width]
    facts: dict[str, float]  # numbers to print and store, such as the classifier's held-out accuracy
    given: str  # the option's value

    @property
    def is_cheap(self) -> bool:
        """Whether computing the features is as fast as reading them from the cache."""
        return self.given in {"pixels", "pooled"}

    @property
    def option(self) -> str:
        """The argument and its value, for error messages."""
        return f"`features` {self.given}"

    @torch.inference_mode()
    def __call__(self, samples: Tensor) -> Tensor:
        """[batch, *sample] -> [batch, width] float32, both on the CPU.

        Raises:
            ArgumentError: the network fails or returns invalid features.
        """
        call = self._run if self.given in OWN else self.checked
        parts = [call(batch).float().cpu() for batch in torch.split(samples, BATCH_SIZE)]
        self.check_widths(*(part.shape[1] for part in parts))
        return torch.cat(parts)

    def of_training_images(self, data: Dataset) -> Iterator[Tensor]:
        """Yield the features of all training images in parts [rows, width], in the data set's order."""
        for ids in torch.split(torch.arange(len(data.train)), TRAINING_ROWS):
            yield self(delivered(data.train.rows(ids).images))

    def checked(self, samples: Tensor) -> Tensor:
        """Return the features of one batch, in float32 on the CPU. Raises ``ArgumentError`` like ``__call__``."""
        try:
            return check_features(self.option, self._run(samples), len(samples))
        except DistillKacError:
            raise
        except Exception as error:
            # TorchScript raises a RuntimeError whose text has the network's error on one line, between tracebacks.
            lines = re.findall(r"^[\w.]*Error: .*", str(error), re.MULTILINE)
            reason = one_line(lines[0]) if lines else describe_exception(error)
            raise ArgumentError(
                f"{self.option}: the network failed on samples of shape {list(samples.shape)}: {reason}. It should "
                "take float32 samples in [-1, 1] in batches of any size. Call network.eval() before saving it."
            ) from error

    def check_widths(self, *widths: int) -> None:
        """Raise ``ArgumentError`` if the features of several batches have different widths."""
        if len(set(widths)) > 1:
            different = " and ".join(map(str, sorted(set(widths))))
            raise ArgumentError(
                f"{self.option}: the network returned {different} features per sample in different batches. "
                "Return the same width for every batch."
            )

    def _run(self, samples: Tensor) -> Any:
        tensors = itertools.chain(self.network.parameters(), self.network.buffers())
        device = next((tensor.device for tensor in tensors), torch.device("cpu"))
        if device.type == "cuda":  # otherwise, features would depend on the precision of the last sampled model
            torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
        return self.network(samples.to(device, copy=True))  # a copy, because the network could change it in place


def open_space(given: str, data: Dataset, device: torch.device | str = "cpu") -> FeatureSpace:
    """Open a feature space. The classifier is trained first if it is not in the cache.

    Args:
        given: one of ``KINDS``, a TorchScript file (.pt or .ts; a path or s3:// URI), or an import path
            ``package.module:factory`` of a function without arguments that returns an ``nn.Module``.

    Raises:
        ArgumentError: the name is unknown, a package or file is missing, or the space does not fit the data.
    """
    from kac.metrics import classifier, pretrained

    check_fits(given, data)
    facts: dict[str, float] = {}
    content = ""
    builders = {"pixels": Pixels, "pooled": Pooled, "lite0": pretrained.lite0, "inception": pretrained.inception}
    network: nn.Module
    if given == "classifier":
        network, facts, content = classifier.open_classifier(data)
    elif given in builders:
        network = builders[given]()
    elif given.endswith(TORCHSCRIPT):
        network = pretrained.torchscript(given)
    else:
        network = build("`features`", given, nn.Module, needs_annotation=False)
    identity = fingerprint({**space_identity(given, data), "content": content})
    try:
        with contextlib.suppress(NotImplementedError):  # modules from torch.export do not support eval()
            network.eval()
        return FeatureSpace(space_name(given), identity, network.to(device), facts, given)
    except Exception as error:
        if given in OWN:
            raise
        raise ArgumentError(
            f"`features` {given}: the network cannot be moved to the {torch.device(device).type}: "
            f"{describe_exception(error)}. Save it on the CPU, with all its weights."
        ) from error


def try_space(given: str, data: Dataset, device: torch.device | str = "cpu") -> None:
    """Open a space, and try its network on a batch of training images and on a single image.

    Raises:
        ArgumentError: the space cannot be opened, the network fails or returns invalid features, or a sample's
            features depend on the other samples in its batch.
    """
    space = open_space(given, data, device)
    ids = torch.linspace(0, len(data.train) - 1, min(TRIAL_ROWS, len(data.train))).long()
    samples = delivered(data.train.rows(ids).images)
    with torch.inference_mode():
        together, single = space.checked(samples), space.checked(samples[:1])
    space.check_widths(together.shape[1], single.shape[1])
    if float((single - together[:1]).norm()) > SAME * float(together[:1].norm()):
        raise ArgumentError(
            f"{space.option}: a sample's features are random or depend on the other samples in its batch. Call "
            "network.eval() before saving the network."
        )
    is_constant = torch.allclose(together, together[:1].expand_as(together), rtol=1e-6, atol=0)
    if is_constant and not torch.equal(samples, samples[:1].expand_as(samples)):
        raise ArgumentError(
            f"{space.option}: the network returned the same features for {len(samples)} different samples. Use a "
            "network that depends on its input."
        )


def check_features(option: str, output: object, count: int) -> Tensor:
    """Check a network's output, and return it as float32 [count, width] on the CPU.

    Args:
        option: the argument and its value, for error messages, such as ```features` net.pt``.

    Raises:
        ArgumentError: the output is not a dense tensor with one row of finite real numbers per sample.
    """
    found = f"an object of type {type(output).__name__}"
    shape: tuple[int, ...] = ()
    if isinstance(output, Tensor):
        found = f"a {output.dtype} tensor of layout {output.layout} and shape {list(output.shape)}"
        if output.is_floating_point() and output.layout == torch.strided:
            shape = tuple(output.shape)
    if not (isinstance(output, Tensor) and len(shape) == 2 and shape[0] == count and 0 < shape[1] <= MAX_WIDTH):
        raise ArgumentError(
            f"{option}: the network returned {found} for {count} samples. Return one dense tensor of floats "
            f"[{count}, width], with a width of 1 to {MAX_WIDTH:,}."
        )
    features = output.detach().float().cpu()
    largest = float(features.abs().max())
    if not largest <= MAX_VALUE:
        raise ArgumentError(
            f"{option}: the network returned features up to {largest:.0e} for {count} samples. Return features without "
            f"NaN and of at most {MAX_VALUE:.0e}."
        )
    return features


def check_fits(given: str, data: Dataset) -> None:
    """Check that a space fits the data, without opening the space.

    Raises:
        ArgumentError: the space needs images, larger images or several classes, which the data lacks.
    """
    shape = data.description.sample_shape
    if given in {"pooled", "lite0", "inception"} and not is_image(shape):
        raise ArgumentError(f"`features` {given} needs images, but the data has samples of shape {shape}.")
    if given == "pooled" and min(shape[1:]) < Pooled.SIDE:
        raise ArgumentError(
            f"`features` pooled needs at least {Pooled.SIDE} pixels per side, but the images have shape {shape}."
        )
    if given == "classifier" and data.description.num_classes < 2:
        raise ArgumentError("`features` classifier needs several classes, but the data has one. Choose other features.")


def space_identity(given: str, data: Dataset) -> dict[str, str]:
    """Return a space's identity without opening the space: its name, and the hash of any file or training data."""
    if not given.endswith(TORCHSCRIPT):
        return {"space": given, **({"data": data.description.sha256} if given == "classifier" else {})}
    try:
        return {"space": given.rsplit("/", 1)[-1], "sha256": hashlib.sha256(files.read_bytes(given)).hexdigest()}
    except (FileNotFoundError, NotADirectoryError):
        raise ArgumentError(f"`features` {given} does not exist. Give a TorchScript file.") from None


def space_name(given: str) -> str:
    """Return a space's name in metrics: its kind, its file name without the extension, or its factory's name."""
    bare = given.rsplit("/", 1)[-1].rsplit(":", 1)[-1]
    for ending in TORCHSCRIPT:
        bare = bare.removesuffix(ending)
    return re.sub(r"[^0-9a-zA-Z]+", "_", bare).strip("_")


def check_names(features: Sequence[str]) -> None:
    """Check the values of ``features`` without opening the spaces.

    Raises:
        ValueError: a name is unknown or occurs twice, or a network has the name ``pixels``.
    """
    names = [space_name(given) for given in features]
    for given, name in zip(features, names, strict=True):
        if given not in KINDS and not given.endswith(TORCHSCRIPT) and not IMPORT_PATH.fullmatch(given):
            raise ValueError(
                f"`features` has the unknown value {given!r}. Choose {', '.join(KINDS)}, FILE.pt or "
                "package.module:factory."
            )
        if name in {"", "pixels"} and given != "pixels":
            raise ValueError(f"`features` has {given!r}, so its metrics would be named {name!r}. Rename the network.")
    if len(set(names)) < len(names):
        raise ValueError(f"`features` has spaces with the same name: {', '.join(names)}. Rename or remove one of them.")


def averaged_down(samples: Tensor, widest: int = WIDEST) -> Tensor:
    """Average images down to at most ``widest`` pixels per side. Return other samples unchanged."""
    if not is_image(tuple(samples.shape[1:])) or max(samples.shape[2:]) <= widest:
        return samples
    height, width = (min(side, widest) for side in samples.shape[2:])
    return nn.functional.adaptive_avg_pool2d(samples, (height, width))


class Pixels(nn.Module):
    """The flattened sample. Images larger than 32 x 32 are averaged down first, to keep the covariance matrix small."""

    def forward(self, samples: Tensor) -> Tensor:
        """[batch, *sample] -> [batch, width]."""
        return averaged_down(samples).flatten(1)


class Pooled(nn.Module):
    """The means of blocks of 4 x 4 pixels. Incomplete blocks at the edges are ignored."""

    SIDE = 4

    def forward(self, samples: Tensor) -> Tensor:
        """[batch, channels, height, width] -> [batch, channels * (height // 4) * (width // 4)]."""
        return nn.functional.avg_pool2d(samples, self.SIDE).flatten(1)

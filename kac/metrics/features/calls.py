"""Calls of feature networks that others made: what they must return, and a trial on real images before the work."""

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from kac.data import Dataset
from kac.util.errors import ArgumentError, DistillKacError, one_line
from kac.util.images import delivered, is_image, to_bytes

TRIAL_ROWS = 16
"""Training images that a network is tried on."""

MAX_WIDTH = 16_384
"""Features wider than this are refused: one covariance matrix takes 2 GiB at this width."""

MAX_VALUE = 1e6
"""The cubes in the kernel distance leave the range of float32 a little above this value."""

SAME = 0.02
"""Relative difference that half precision and other batch sizes may cause."""

Change = tuple[str, Callable[[Tensor], Tensor]]


class NetworkFailed(ArgumentError):
    """A feature network raised an exception of its own."""


def run_network(network: nn.Module, samples: Tensor) -> Any:
    """The network's output for a copy of the samples, which it may change, on the network's device."""
    tensors = itertools.chain(network.parameters(), network.buffers())
    device = next((tensor.device for tensor in tensors), torch.device("cpu"))
    return network(samples.to(device, copy=True))


def call_network(option: str, network: nn.Module, samples: Tensor) -> Tensor:
    """The features [batch, width] of samples [batch, *sample], float32 on the CPU.

    Args:
        option: what errors name, such as ``features net.pt``.

    Raises:
        NetworkFailed: the network raised an exception.
        ArgumentError: the network returned something other than one row of finite features per sample.
    """
    try:
        found = run_network(network, samples)
        return check_features(option, found, len(samples))
    except DistillKacError:
        raise
    except Exception as error:
        raise NetworkFailed(
            f"{option}: the network failed on {_describe(samples)}: {_cause(error)}. "
            "It gets float32 samples in [-1, 1] and must return float32 features [batch, width]."
        ) from error


def check_features(option: str, found: object, count: int) -> Tensor:
    """``found`` as float32 [count, width] on the CPU.

    Raises:
        ArgumentError: it is anything but a tensor of one row of finite real numbers per sample.
    """

    def refuse(what: str, advice: str) -> ArgumentError:
        return ArgumentError(f"{option}: the network returned {what} for {count} samples. {advice}")

    if not isinstance(found, Tensor):
        raise refuse(_describe_object(found), "Wrap it in a module that returns one tensor [batch, width].")
    if not found.is_floating_point():
        raise refuse(f"{_name(found.dtype)} features", "Return real floating-point features, such as float32.")
    if found.layout != torch.strided:
        raise refuse("a sparse tensor", "Return a dense one: features.to_dense().")
    shape = list(found.shape)
    if found.ndim < 2:
        raise refuse(f"shape {shape}", "Return [batch, width] for a batch of one too, without squeeze().")
    if found.ndim > 2:
        raise refuse(f"shape {shape}", "Pool or flatten it to [batch, width], for example features.flatten(1).")
    if len(found) != count:
        raise refuse(f"shape {shape}", f"Return one row per sample: [{count}, width].")
    if not 1 <= found.shape[1] <= MAX_WIDTH:
        raise refuse(f"shape {shape}", f"Return between 1 and {MAX_WIDTH:,} features per sample: pool them.")
    features = found.detach().float().cpu()
    if not bool(features.isfinite().all()):
        rows = int((~features.isfinite()).any(1).sum())
        raise refuse(f"NaN or infinity in {rows} rows", "Return finite features.")
    if float(features.abs().max()) > MAX_VALUE:
        raise refuse(f"values up to {float(features.abs().max()):.0e}", f"Scale them to less than {MAX_VALUE:.0e}.")
    return features


def check_widths(option: str, *widths: int) -> None:
    """Refuse features of several widths.

    Raises:
        ArgumentError: not all widths are equal.
    """
    if len(set(widths)) > 1:
        found = " and ".join(str(width) for width in sorted(set(widths))[:2])
        raise ArgumentError(
            f"{option}: the network returned {found} features per sample in different batches. "
            "Return the same width for every batch."
        )


def try_out(option: str, network: nn.Module, data: Dataset) -> None:
    """Call a network on a few training images, together and one of them by itself.

    Raises:
        ArgumentError: it fails, returns no features, or its features do not depend on the image only.
    """
    ids = torch.linspace(0, len(data.train) - 1, min(TRIAL_ROWS, len(data.train))).long()
    samples = delivered(data.train.rows(ids).images)
    with torch.inference_mode():
        try:
            together = call_network(option, network, samples)
        except NetworkFailed as error:
            raise ArgumentError(" ".join([str(error), *_advice(network, samples)])) from error
        try:
            single = call_network(option, network, samples[:1])
        except NetworkFailed as error:
            raise ArgumentError(
                f"{error} It works on {len(samples)} samples at once. If it is in training mode, call network.eval() "
                "before you save it."
            ) from error
    check_widths(option, together.shape[1], single.shape[1])
    if float((single - together[:1]).norm()) > SAME * float(together[:1].norm()):
        raise ArgumentError(
            f"{option}: the network returned other features for a sample by itself than in a batch of {len(samples)}. "
            "They are random or depend on the batch. Call network.eval() before you save it."
        )
    is_constant = torch.allclose(together, together[:1].expand_as(together), rtol=1e-6, atol=0)
    if is_constant and not torch.equal(samples, samples[:1].expand_as(samples)):
        raise ArgumentError(
            f"{option}: the network returned the same features for {len(samples)} different samples. "
            "Distances between such features mean nothing. Use a network that depends on its input."
        )


def _advice(network: nn.Module, samples: Tensor) -> Iterator[str]:
    """What to do, found by calling the failing network on changed samples; nothing if no change helps."""
    if _works(network, samples):  # what failed was the check of its output
        return
    if len(samples) > 1 and _works(network, samples[:1]):
        yield f"It works on one sample, but not on {len(samples)}. Save it for batches of any size."
        return
    for changes in _changes(tuple(samples.shape[1:])):
        changed = samples[:2]
        for _, change in changes:
            changed = change(changed)
        if _works(network, changed):
            yield (
                f"It works on {' and '.join(name for name, _ in changes)}, so wrap it in a module that converts the "
                "samples first."
            )
            return


def _changes(shape: tuple[int, ...]) -> list[list[Change]]:
    """Ways to change samples of this shape, the ways with the fewest changes first."""
    values: list[Change] = [
        ("values in [0, 1]", lambda x: (x + 1) / 2),
        ("float16 values", lambda x: x.half()),
        ("float64 values", lambda x: x.double()),
    ]
    layouts: list[Change] = []
    sizes: list[Change] = []
    if is_image(shape):
        values.insert(1, ("uint8 values in 0 .. 255", to_bytes))
        if shape[0] == 1:
            layouts.append(("3 channels (the images have 1)", lambda x: x.expand(-1, 3, -1, -1)))
        layouts.append(("flattened images", lambda x: x.flatten(1)))
        sizes = [_resize(side, shape) for side in (32, 64, 224, 299) if side > min(shape[1:])]
    ways = [
        [change for change in way if change is not None]
        for way in itertools.product([None, *sizes], [None, *layouts], [None, *values])
    ]
    return sorted(filter(None, ways), key=len)


def _resize(side: int, shape: tuple[int, ...]) -> Change:
    name = f"{side} x {side} pixels (the images have {shape[1]} x {shape[2]})"
    return name, lambda x: nn.functional.interpolate(x, (side, side), mode="bilinear", antialias=True)


def _works(network: nn.Module, samples: Tensor) -> bool:
    try:
        run_network(network, samples)
    except Exception:  # noqa: BLE001 - the network is another's and raises what it likes
        return False
    return True


def _cause(error: Exception) -> str:
    """The type and text of a foreign exception.

    TorchScript's text has its traceback first, in indented lines below headings, then what the network raised.
    """
    lines = [line for line in str(error).splitlines() if line.strip()]
    if lines and "TorchScript interpreter" in lines[0]:
        raised = [line for line in lines[1:] if not line.startswith((" ", "Traceback of TorchScript"))]
        return one_line(raised[0] if raised else lines[-1]).removeprefix("builtins.").rstrip(".")
    name = type(error).__name__
    return f"{name}: {one_line(error)}".rstrip(".") if lines else name


def _describe(samples: Tensor) -> str:
    return f"{len(samples)} samples of shape {list(samples.shape[1:])}"


def _describe_object(found: object) -> str:
    if isinstance(found, dict):
        return one_line(f"a dict with the keys {', '.join(map(str, found))}")
    if isinstance(found, tuple | list):
        return f"a {type(found).__name__} of {len(found)} values"
    return "None" if found is None else f"an object of type {type(found).__name__}"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")

"""Calls to users' feature networks: a check of their output, and a trial on real images before the work."""

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from kac.data import Dataset
from kac.util.errors import ArgumentError, DistillKacError, one_line
from kac.util.images import delivered, is_image, to_bytes

TRIAL_ROWS = 16
"""The number of training images used to try a network."""

MAX_WIDTH = 16_384
"""Features wider than this are refused: one covariance matrix takes 2 GiB at this width."""

MAX_VALUE = 1e6
"""The cubes in the kernel distance leave the range of float32 a little above this value."""

SAME = 0.02
"""The largest relative difference that half precision or another batch size may cause."""

Conversion = tuple[str, Callable[[Tensor], Tensor]]


class NetworkFailed(ArgumentError):
    """A feature network raised an exception."""


def run_network(network: nn.Module, samples: Tensor) -> Any:
    """Call the network on its device, with a copy of the samples, because it could change them in place."""
    tensors = itertools.chain(network.parameters(), network.buffers())
    device = next((tensor.device for tensor in tensors), torch.device("cpu"))
    return network(samples.to(device, copy=True))


def call_network(option: str, network: nn.Module, samples: Tensor) -> Tensor:
    """Return the features [batch, width] of samples [batch, *sample], in float32 on the CPU.

    Args:
        option: the argument and its value, for error messages: ```features` net.pt``.

    Raises:
        NetworkFailed: the network raised an exception.
        ArgumentError: the network returned something other than one row of finite features per sample.
    """
    try:
        output = run_network(network, samples)
        return check_features(option, output, len(samples))
    except DistillKacError:
        raise
    except Exception as error:
        raise NetworkFailed(
            f"{option}: the network failed on {_describe_samples(samples)}: {_describe_exception(error)}. "
            "Its input is float32 samples in [-1, 1], and it must return float32 features [batch, width]."
        ) from error


def check_features(option: str, output: object, count: int) -> Tensor:
    """Check a network's output, and return it as float32 [count, width] on the CPU.

    Raises:
        ArgumentError: the output is not a tensor with one row of finite real numbers per sample.
    """

    def wrong(what: str, advice: str) -> ArgumentError:
        return ArgumentError(f"{option}: the network returned {what} for {count} samples. {advice}")

    if not isinstance(output, Tensor):
        raise wrong(_describe_object(output), "Wrap it in a module that returns one tensor [batch, width].")
    if not output.is_floating_point():
        raise wrong(
            f"{str(output.dtype).removeprefix('torch.')} features",
            "Return real floating-point features, such as float32.",
        )
    if output.layout != torch.strided:
        raise wrong("a sparse tensor", "Return a dense tensor: features.to_dense().")
    shape = list(output.shape)
    if output.ndim < 2:
        raise wrong(f"shape {shape}", "Return [batch, width], also for a batch of one: do not call squeeze().")
    if output.ndim > 2:
        raise wrong(f"shape {shape}", "Pool or flatten it to [batch, width], for example features.flatten(1).")
    if len(output) != count:
        raise wrong(f"shape {shape}", f"Return one row per sample: [{count}, width].")
    if not 1 <= output.shape[1] <= MAX_WIDTH:
        raise wrong(f"shape {shape}", f"Return 1 to {MAX_WIDTH:,} features per sample, for example by pooling.")
    features = output.detach().float().cpu()
    if not bool(features.isfinite().all()):
        rows = int((~features.isfinite()).any(1).sum())
        raise wrong(f"NaN or infinity in {rows} rows", "Return finite features.")
    if float(features.abs().max()) > MAX_VALUE:
        raise wrong(f"values up to {float(features.abs().max()):.0e}", f"Scale the features below {MAX_VALUE:.0e}.")
    return features


def check_widths(option: str, *widths: int) -> None:
    """Check that the features of all batches have the same width.

    Raises:
        ArgumentError: the widths differ.
    """
    if len(set(widths)) > 1:
        different = " and ".join(str(width) for width in sorted(set(widths))[:2])
        raise ArgumentError(
            f"{option}: the network returned {different} features per sample in different batches. "
            "Return the same width for every batch."
        )


def try_out(option: str, network: nn.Module, data: Dataset) -> None:
    """Try a network on a batch of training images and on a single image.

    Raises:
        ArgumentError: the network fails, its output is not features, or a sample's features depend on its batch.
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
                "before saving it."
            ) from error
    check_widths(option, together.shape[1], single.shape[1])
    if float((single - together[:1]).norm()) > SAME * float(together[:1].norm()):
        raise ArgumentError(
            f"{option}: the network returned different features for a sample in a batch of 1 and in a batch of "
            f"{len(samples)}. The features are random or depend on the batch. Call network.eval() before saving it."
        )
    is_constant = torch.allclose(together, together[:1].expand_as(together), rtol=1e-6, atol=0)
    if is_constant and not torch.equal(samples, samples[:1].expand_as(samples)):
        raise ArgumentError(
            f"{option}: the network returned the same features for {len(samples)} different samples. "
            "Distances between constant features are meaningless. Use a network that depends on its input."
        )


def _advice(network: nn.Module, samples: Tensor) -> Iterator[str]:
    """Yield advice, found by calling the failing network on converted samples; nothing if no conversion helps."""
    if _works(network, samples):  # its output failed the check
        return
    if len(samples) > 1 and _works(network, samples[:1]):
        yield f"It works on one sample, but not on {len(samples)}. Save it so that it accepts batches of any size."
        return
    for conversions in _conversions(tuple(samples.shape[1:])):
        converted = samples[:2]
        for _, convert in conversions:
            converted = convert(converted)
        if _works(network, converted):
            yield (
                f"It works on {' and '.join(name for name, _ in conversions)}, so wrap it in a module that converts "
                "the samples first."
            )
            return


def _conversions(shape: tuple[int, ...]) -> list[list[Conversion]]:
    """Return combinations of conversions for samples of this shape, those with the fewest conversions first."""
    values: list[Conversion] = [
        ("values in [0, 1]", lambda x: (x + 1) / 2),
        ("float16 values", lambda x: x.half()),
        ("float64 values", lambda x: x.double()),
    ]
    layouts: list[Conversion] = []
    sizes: list[Conversion] = []
    if is_image(shape):
        values.insert(1, ("uint8 values in 0 .. 255", to_bytes))
        if shape[0] == 1:
            layouts.append(("3 channels (the images have 1)", lambda x: x.expand(-1, 3, -1, -1)))
        layouts.append(("flattened images", lambda x: x.flatten(1)))
        sizes = [_resize(side, shape) for side in (32, 64, 224, 299) if side > min(shape[1:])]
    combinations = [
        [conversion for conversion in combination if conversion is not None]
        for combination in itertools.product([None, *sizes], [None, *layouts], [None, *values])
    ]
    return sorted(filter(None, combinations), key=len)


def _resize(side: int, shape: tuple[int, ...]) -> Conversion:
    name = f"{side} x {side} pixels (the images have {shape[1]} x {shape[2]})"
    return name, lambda x: nn.functional.interpolate(x, (side, side), mode="bilinear", antialias=True)


def _works(network: nn.Module, samples: Tensor) -> bool:
    try:
        run_network(network, samples)
    except Exception:  # noqa: BLE001 - a user's network can raise anything
        return False
    return True


def _describe_exception(error: Exception) -> str:
    """Return the type and text of a network's exception.

    TorchScript's text starts with a traceback, in indented lines below headings. The network's exception follows.
    """
    lines = [line for line in str(error).splitlines() if line.strip()]
    if lines and "TorchScript interpreter" in lines[0]:
        raised = [line for line in lines[1:] if not line.startswith((" ", "Traceback of TorchScript"))]
        return one_line(raised[0] if raised else lines[-1]).removeprefix("builtins.").rstrip(".")
    name = type(error).__name__
    return f"{name}: {one_line(error)}".rstrip(".") if lines else name


def _describe_samples(samples: Tensor) -> str:
    return f"{len(samples)} samples of shape {list(samples.shape[1:])}"


def _describe_object(output: object) -> str:
    if isinstance(output, dict):
        return one_line(f"a dict with the keys {', '.join(map(str, output))}")
    if isinstance(output, tuple | list):
        return f"a {type(output).__name__} of {len(output)} values"
    return "None" if output is None else f"an object of type {type(output).__name__}"

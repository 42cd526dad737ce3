"""Precision, memory format and compilation of networks in training, rollout and sampling."""

from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from kac.networks import VelocityNetwork
from kac.util.errors import ArgumentError
from kac.util.fingerprint import unhashed
from kac.util.options import Options


class Precision(Options):
    """How a network computes. The weights, inputs and outputs are always float32."""

    dtype: Literal["float32", "tf32", "bfloat16", "auto"] = Field(
        "float32",
        description="data type of the network's arithmetic; tf32: float32 on a GPU's tensor cores; "
        "auto: bfloat16 on a GPU, else float32",
    )
    compile: bool | None = unhashed(None, "compile the network with torch.compile; default: only on a GPU")
    memory_format: Literal["auto", "contiguous", "channels_last"] = unhashed(
        "auto", "memory layout of images; auto: channels_last for convolutions on a GPU, else contiguous"
    )

    def settled(self, on_gpu: bool) -> "Precision":
        """Return a copy with the dtype ``auto`` replaced by bfloat16 or float32. Fingerprints use this copy.

        Raises:
            ArgumentError: the dtype is ``tf32``, but there is no GPU.
        """
        if self.dtype == "tf32" and not on_gpu:
            raise ArgumentError("`precision.dtype` tf32 needs a GPU. Choose float32, bfloat16 or auto.")
        dtype = ("bfloat16" if on_gpu else "float32") if self.dtype == "auto" else self.dtype
        return self.model_copy(update={"dtype": dtype})

    def resolved(self, gpu: bool, convolutions: bool = True) -> "Precision":
        """Return a copy with automatic values chosen for the device and for a network with or without convolutions."""
        automatic = "channels_last" if gpu and convolutions else "contiguous"
        return Precision(
            dtype=self.settled(gpu).dtype,
            compile=gpu if self.compile is None else self.compile,
            memory_format=automatic if self.memory_format == "auto" else self.memory_format,
        )

    def _resolved_for(self, network: nn.Module) -> "Precision":
        convolutions = any(parameter.ndim == 4 for parameter in network.parameters())
        return self.resolved(_is_on_gpu(network), convolutions)

    def set_memory_format(self, network: nn.Module) -> None:
        """Convert the weights to the memory format. Call this before creating an optimizer or an EMA of the weights."""
        if self._resolved_for(network).memory_format == "channels_last":
            network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def wrap(self, network: nn.Module) -> VelocityNetwork:
        """Return a callable with the network's signature and null label that computes in this precision."""
        self.set_memory_format(network)
        resolved = self._resolved_for(network)
        is_plain = resolved == Precision(compile=False, memory_format="contiguous") and hasattr(network, "null_label")
        # On a GPU, float32 needs a wrapper too, because PyTorch convolutions use tf32 by default.
        return network if is_plain and not _is_on_gpu(network) else _Wrapped(network, resolved)  # type: ignore[return-value]

    def __str__(self) -> str:
        """Describe resolved values briefly, such as "bfloat16, channels_last, compiled"."""
        return f"{self.dtype}, {self.memory_format}, {'compiled' if self.compile else 'not compiled'}"


def _is_on_gpu(network: nn.Module) -> bool:
    return any(parameter.is_cuda for parameter in network.parameters())


class _Wrapped:
    def __init__(self, network: nn.Module, precision: Precision) -> None:
        plain: Any = getattr(network, "module", network)  # the network inside DistributedDataParallel
        self.null_label, self.takes = plain.null_label, getattr(plain, "takes", ())
        guide = getattr(plain, "guide", None)
        self.guide = None if guide is None else _Wrapped(guide, precision)
        self.dtype = torch.bfloat16 if precision.dtype == "bfloat16" else torch.float32
        self.tf32 = precision.dtype == "tf32"
        channels_last = precision.memory_format == "channels_last"
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format
        self.call: Any = torch.compile(network) if precision.compile else network

    def __call__(self, x: Tensor, t: Tensor, label: Tensor, **conditions: Tensor) -> Tensor:
        if x.is_cuda:
            # Set the flags at every call, because networks differ. Do not reset them: the backward pass needs them too.
            torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = self.tf32
        if x.ndim == 4:
            x = x.contiguous(memory_format=self.memory_format)
        with torch.autocast(x.device.type, dtype=self.dtype, enabled=self.dtype != torch.float32):
            velocity: Tensor = self.call(x, t, label, **conditions)
        return velocity.float()

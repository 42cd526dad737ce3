"""How a network is called: its precision, memory format and compilation, in training, rollout and sampling alike."""

from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from kac.fingerprint import unhashed
from kac.networks import VelocityNetwork
from kac.options import Options


class Precision(Options):
    """How a network is called. The weights, and what goes in and out, stay float32."""

    dtype: Literal["float32", "bfloat16"] = Field("float32", description="type that the network computes in (autocast)")
    compile: bool = unhashed(False, "compile the network with torch.compile")
    memory_format: Literal["contiguous", "channels_last"] = unhashed("contiguous", "layout of images in the network")

    def wrap(self, network: nn.Module) -> VelocityNetwork:
        """``network`` in this precision, with the same signature, null label, parameters and gradients."""
        is_plain = self == Precision() and hasattr(network, "null_label")
        return network if is_plain else _Wrapped(network, self)  # type: ignore[return-value]


class _Wrapped:
    def __init__(self, network: nn.Module, precision: Precision) -> None:
        plain: Any = getattr(network, "module", network)  # of a data-parallel one
        self.null_label, self.takes = plain.null_label, getattr(plain, "takes", ())
        self.dtype = getattr(torch, precision.dtype)
        self.memory_format = torch.contiguous_format
        if precision.memory_format == "channels_last":
            self.memory_format = torch.channels_last
            network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.call: Any = torch.compile(network) if precision.compile else network

    def __call__(self, x: Tensor, t: Tensor, label: Tensor, **conditions: Tensor) -> Tensor:
        if x.ndim == 4:
            x = x.contiguous(memory_format=self.memory_format)
        with torch.autocast(x.device.type, dtype=self.dtype, enabled=self.dtype != torch.float32):
            velocity: Tensor = self.call(x, t, label, **conditions)
        return velocity.float()

"""User modules for networks of kind ``outside``."""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class Field(nn.Module):
    """A velocity that depends on x [batch, *sample], t [batch] and label [batch].

    Its constructor reads the value of a tensor, it has a weight under two names, and it has an integer buffer.
    """

    def __init__(self, size: int = 2, classes: int = 3, scale: float = 1.0) -> None:
        super().__init__()
        self.linear = nn.Linear(size + 1, size)
        self.twin = self.linear
        self.classes = nn.Embedding(classes, size)
        self.register_buffer("version", torch.tensor(7))
        self.scale = scale if torch.ones(1).item() else 0.0

    def forward(self, x: Tensor, t: Tensor, label: Tensor) -> Tensor:
        assert (t.dtype, t.shape) == (torch.float32, (len(x),))
        flat = torch.cat([x.flatten(1), t[:, None]], dim=1)
        return (self.scale * (self.twin(flat) + self.classes(label))).reshape(x.shape)


class Blind(nn.Module):
    """A velocity field without labels."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.weight * x * t.reshape(-1, *[1] * (x.ndim - 1))


class Output(NamedTuple):
    sample: Tensor


class Returns(nn.Module):
    """Returns the kind of output that ``kind`` names."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.weight = kind, nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor, t: Tensor, label: Tensor) -> Any:
        velocity = self.weight * x
        if self.kind == "raises":
            raise RuntimeError("broken\nmodule")
        return {
            "tensor": velocity,
            "tuple": (velocity, t),
            "output": Output(velocity),
            "empty": (),
            "nothing": None,
            "flat": velocity.flatten(),
            "infinite": velocity / 0,
        }[self.kind]


class Fourier(nn.Module):
    """Random frequencies, which are part of the state dict if ``is_kept``."""

    def __init__(self, is_kept: bool) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 2)
        self.register_buffer("frequencies", torch.randn(2, 4), persistent=is_kept)

    def forward(self, x: Tensor, t: Tensor, label: Tensor) -> Tensor:
        return self.linear((x @ self.frequencies).sin())


class Attending(nn.Module):
    """Attention over the pixels of [batch, channels, height, width], with PyTorch's own module."""

    def __init__(self, channels: int = 8) -> None:
        super().__init__()
        self.enter, self.leave = nn.Linear(1, channels), nn.Linear(channels, 1)
        self.attention = nn.MultiheadAttention(channels, 2, batch_first=True)

    def forward(self, x: Tensor, t: Tensor, label: Tensor) -> Tensor:
        hidden = self.enter(x.flatten(1)[..., None])
        return self.leave(self.attention(hidden, hidden, hidden, need_weights=False)[0]).reshape(x.shape)


def annotated(size: int = 2) -> nn.Module:
    return Field(size)


def annotated_late(size: int = 2) -> "Field":
    return Field(size)


def not_annotated(size: int = 2):
    raise AssertionError("never called")


def wrongly_annotated() -> nn.Module:
    return "a text"


def without_parameters() -> nn.Module:
    return nn.Identity()


A_NUMBER = 3

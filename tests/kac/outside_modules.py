"""Modules that others might have written, for networks of kind ``outside``."""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class Field(nn.Module):
    """x [batch, *sample], t [batch], label [batch] -> a velocity that depends on all of them.

    It looks at a number as it is built, keeps a weight under two names and counts its calls in an integer.
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
    """Knows no labels."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.weight * x * t.reshape(-1, *[1] * (x.ndim - 1))


class Output(NamedTuple):
    sample: Tensor


class Odd(nn.Module):
    """Gives ``kind``."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.weight = kind, nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor, t: Tensor, label: Tensor) -> Any:
        made = self.weight * x
        if self.kind == "raises":
            raise RuntimeError("expected\nsomething else")
        return {
            "tensor": made,
            "tuple": (made, t),
            "output": Output(made),
            "empty": (),
            "nothing": None,
            "flat": made.flatten(),
            "infinite": made / 0,
        }[self.kind]


class Fourier(nn.Module):
    """Random frequencies, in the state dict or not."""

    def __init__(self, is_kept: bool) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 2)
        self.register_buffer("frequencies", torch.randn(2, 4), persistent=is_kept)

    def forward(self, x: Tensor, t: Tensor, label: Tensor) -> Tensor:
        return self.linear((x @ self.frequencies).sin())


class Attending(nn.Module):
    """Attention over the places of [batch, channels, height, width], by PyTorch's own functions."""

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


def falsely_annotated() -> nn.Module:
    return "a text"


def without_parameters() -> nn.Module:
    return nn.Identity()


A_NUMBER = 3

"""Feature networks that fail on grey images or return invalid features, each for a different reason."""

import torch
from torch import Tensor, nn


class ForeignError(Exception):
    """An exception class of the user's module."""


class Rows(nn.Module):
    """Returns correct features."""

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1)[:, :5] + x.flatten(1).mean(1, keepdim=True)


class ThreeChannels(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(3, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.convolution(x).mean((2, 3))


class Bytes(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        if x.dtype != torch.uint8:
            raise ValueError("uint8 please")
        return x.float().flatten(1)


class ThreeChannelsOfBytes(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        if x.dtype != torch.uint8 or x.shape[1] != 3:
            raise ValueError("uint8 RGB please")
        return x.float().flatten(1)


class Large(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(1, 4, 31)

    def forward(self, x: Tensor) -> Tensor:
        return self.convolution(x).mean((2, 3))


class Flat(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(64, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)


class DoubleWeights(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(64, 4).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x.flatten(1))


class OneAtATime(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.reshape(1, 64)


class NeedsABatch(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(64)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.batch_norm(x.flatten(1), None, None, training=True)


class NotANumber(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1) / 0.0


class OneRow(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1).mean(0, keepdim=True)


class ChangingWidth(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1)[:, : x.shape[0] + 1]


class Squeezed(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1).squeeze()


class Integers(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return (x.flatten(1) * 100).long()


class Complex(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.fft.fft(x.flatten(1))


class Truths(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1) > 0


class Sparse(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1).to_sparse()


class Pair(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x.flatten(1), x.flatten(1)


class Dictionary(nn.Module):
    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"pooled": x.flatten(1), "logits": x.flatten(1)}


class Listing(nn.Module):
    def forward(self, x: Tensor) -> list[float]:
        return [1.0, 2.0]


class Nothing(nn.Module):
    def forward(self, x: Tensor) -> None:
        return None


class Vector(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1).mean(1)


class Sequence(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(2)


class Maps(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x


class NoWidth(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1)[:, :0]


class TooWide(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1).repeat(1, 400)


class TooLarge(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1) * 1e12


class Constant(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.ones(x.shape[0], 5)


class Dropping(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.dropout(x.flatten(1), 0.5, True)


class TrainingMode(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.batch_norm(x, None, None, training=True).flatten(1)


class ElsewhereConstants(nn.Module):
    """Has constants on another device, like a network traced on a device that this machine lacks."""

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1) + torch.ones(64, device="meta")


class Raising(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        raise ForeignError("line one\nline two")


class Silent(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        raise ForeignError


class TwoInputs(nn.Module):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return x.flatten(1) + y


class Later(nn.Module):
    """Works on the trial's batches but fails on larger batches."""

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[0] > 100:
            raise ValueError("more than I can take")
        return x.flatten(1)


class LaterNaN(nn.Module):
    """Returns NaN only for larger batches."""

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1) * (0.0 / 0.0 if x.shape[0] > 100 else 1.0)


class LaterWider(nn.Module):
    """Returns features of a different width for larger batches."""

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1)[:, : 1 if x.shape[0] == 250 else 2]


class Thin(nn.Module):
    """Returns one feature."""

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1).mean(1, keepdim=True)


class Wide(nn.Module):
    """Returns more features than the tests have samples."""

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1).repeat(1, 8).half()


class Changing(nn.Module):
    """Changes its input in place."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mul_(0.5).flatten(1)


def exported() -> nn.Module:
    """Export ``Rows`` for batches of any size. The result rejects ``eval()``."""
    dynamic = {"x": {0: torch.export.Dim("batch")}}
    return torch.export.export(Rows(), (torch.rand(2, 1, 8, 8),), dynamic_shapes=dynamic).module()


def exported_three_channels() -> nn.Module:
    """Export ``ThreeChannels``. The result checks the shape of its input."""
    dynamic = {"x": {0: torch.export.Dim("batch")}}
    return torch.export.export(ThreeChannels().eval(), (torch.rand(2, 3, 8, 8),), dynamic_shapes=dynamic).module()


def without_weights() -> nn.Module:
    """Return a module whose weights were never loaded."""
    with torch.device("meta"):
        return ThreeChannels()

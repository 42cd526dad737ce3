"""Networks with known flows, used to test the measurement of the claims."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from kac.data import DataConfig
from kac.model import ModelConfig, teacher_config
from kac.networks import MLPConfig
from kac.path import PathConfig
from kac.sampling import Sampling
from kac.study.subject import Subject


class Field(nn.Module):
    """A velocity u(x, t), the same for all labels."""

    takes = ()

    def __init__(self, u: Callable[[Tensor, Tensor], Tensor], null_label: int | None = None) -> None:
        super().__init__()
        self.u, self.null_label = u, null_label

    def forward(self, x: Tensor, t: Tensor, label: Tensor, **conditions: Tensor) -> Tensor:
        return self.u(x, t)


def config(kind: str = "moons", **options: Any) -> ModelConfig:
    return teacher_config(MLPConfig(width=8, depth=1), PathConfig(), DataConfig(kind=kind)).model_copy(update=options)


def subject(network: Any, sampling: Sampling, name: str = "teacher", **options: Any) -> Subject:
    """Return a subject that starts from 50 noise points of the moons, in batches of 20."""
    values = {"config": config(), "seed": 3, "count": 50, "batch_size": 20, **options}
    return Subject(name=name, network=network, sampling=sampling, **values)

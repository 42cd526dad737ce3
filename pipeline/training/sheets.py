"""Sample sheets: images of the averaged network during training, always from the same noise."""

from dataclasses import dataclass, field

from kac.conditioning import known_classes
from kac.model import Model, ModelConfig
from kac.networks import NetworkModule
from kac.precision import Precision
from kac.sampling import Sampling, draw, student_sampling, teacher_sampling

COUNT = 40
TEACHER_STEPS = 20
"""Solver steps of a teacher: enough to see what it has learned."""

SEED = 1_000_003


@dataclass(frozen=True)
class Sheets:
    """How often sample sheets are drawn, and of which model.

    Attributes:
        every: updates between two sheets; None draws none.
        config: of the model in training. Required if ``every`` is set.
    """

    every: int | None = None
    config: ModelConfig | None = None
    precision: Precision = field(default_factory=Precision)

    def are_due(self, update: int) -> bool:
        """Whether to draw a sheet after this update."""
        return self.every is not None and update % self.every == 0

    def draw(self, network: NetworkModule) -> bytes:
        """Return a sheet of samples as PNG, with the classes in turn. A student takes its own steps.

        Raises:
            DistillKacError: the network has diverged.
        """
        from pipeline.report.pictures import sheet

        assert self.config is not None
        labels = known_classes(self.config)[:COUNT] or None
        precision = self.precision.model_copy(update={"compile": False})  # compiling does not pay off for a few calls
        model, sampling = Model(network, self.config), sampling_of(self.config)
        return sheet(draw(model, sampling, precision, SEED, COUNT, COUNT, labels).images.numpy())


def sampling_of(config: ModelConfig) -> Sampling:
    """How to sample a model during its training."""
    return student_sampling(config) if config.kind == "student" else teacher_sampling(config, steps=TEACHER_STEPS)

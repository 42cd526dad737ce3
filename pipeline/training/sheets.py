"""Sheets of samples while a training runs: the averaged weights, always from the same noise."""

from dataclasses import dataclass, field

from kac.conditioning import known_classes
from kac.model import Model, ModelConfig
from kac.networks import NetworkModule
from kac.precision import Precision
from kac.sampling import Sampling, draw, student_sampling, teacher_sampling

COUNT = 40
TEACHER_STEPS = 20
"""Solver steps: enough to see what a teacher has learned."""

SEED = 1_000_003


@dataclass(frozen=True)
class Sheets:
    """What is drawn, and how often.

    Attributes:
        every: updates between two sheets; None: there are none.
        config: of the model that the training makes.
    """

    every: int | None = None
    config: ModelConfig | None = None
    precision: Precision = field(default_factory=Precision)

    def are_due(self, update: int) -> bool:
        """Whether there is one after so many updates."""
        return self.every is not None and update % self.every == 0

    def draw(self, network: NetworkModule) -> bytes:
        """A sheet of the classes in turn, PNG; a student takes its own steps.

        Raises:
            DistillKacError: the network has diverged.
        """
        from pipeline.report.pictures import sheet

        assert self.config is not None
        labels = known_classes(self.config)[:COUNT] or None
        precision = self.precision.model_copy(update={"compile": False})  # for a few calls it would not pay
        model, sampling = Model(network, self.config), sampling_of(self.config)
        return sheet(draw(model, sampling, precision, SEED, COUNT, COUNT, labels).images.numpy())


def sampling_of(config: ModelConfig) -> Sampling:
    """How a model is sampled in the middle of its training."""
    return student_sampling(config) if config.kind == "student" else teacher_sampling(config, steps=TEACHER_STEPS)

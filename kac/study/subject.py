"""A study's inputs, the models that it samples, and the result and picture of a claim."""

import functools
import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor

from kac.data import Dataset
from kac.guidance import check_guidance
from kac.metrics.features import FeatureSpace, open_space
from kac.metrics.statistics import Moments, Statistics
from kac.model import ModelConfig, load_model
from kac.networks import Condition, VelocityNetwork
from kac.precision import Precision
from kac.sampling import TEACHER_STEPS, Sampling, initial_noise, student_sampling, teacher_sampling
from kac.util.device import default_device

TIME = {"xlabel": "t, from noise (1) to data (0)", "xlim": (1.03, -0.03)}
"""Settings of a time axis."""


@dataclass(frozen=True)
class Subject:
    """A model that is studied. All subjects of a study start from the same uniform random numbers and labels."""

    name: str
    network: VelocityNetwork
    config: ModelConfig
    sampling: Sampling
    seed: int
    count: int
    batch_size: int

    def starts(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the noise [batch, *sample] and labels [batch] of all samples, on the default device."""
        for first in range(0, self.count, self.batch_size):
            ids = range(first, min(first + self.batch_size, self.count))
            x_1, label = initial_noise(self.config, self.seed, ids)
            yield x_1.to(default_device()), label.to(default_device())


class Watched:
    """A wrapper that passes each of a network's velocities, before guidance, to a callback."""

    def __init__(self, network: VelocityNetwork, see: Callable[[Tensor, Tensor, Tensor], None]) -> None:
        self.network, self.see = network, see
        self.null_label: int | None = network.null_label
        self.takes: tuple[Condition, ...] = getattr(network, "takes", ())
        self.guide: VelocityNetwork | None = getattr(network, "guide", None)

    def __call__(self, x: Tensor, t: Tensor, label: Tensor, **conditions: Tensor) -> Tensor:
        """Call the network, pass the velocity to ``see(x, t, u)``, and return it."""
        u = self.network(x, t, label, **conditions)
        self.see(x, t, u)
        return u


class StudyModel(NamedTuple):
    """A model folder and its config."""

    name: str
    path: str
    config: ModelConfig

    @property
    def scales(self) -> tuple[float, ...]:
        """The guidance scales at which a student can be sampled."""
        return self.config.guidance_scales if self.config.takes_guidance else (self.config.guidance or 0.0,)


class Training(NamedTuple):
    """How a model was trained."""

    path: str  # model folder
    samples: int  # updates x batch size
    calls: float = 1.0  # network calls of a sample's loss
    length: float = 0.0  # mean length of a student's intervals, as a fraction of the trajectory


class Trajectories(NamedTuple):
    """Stored trajectories of the teacher at one guidance scale."""

    sampling: Sampling
    is_forward: bool  # whether the store has noised data instead of the teacher's trajectories
    knots: int
    knot_columns: Sequence[str]  # from noise to image
    read: Callable[[Sequence[str]], dict[str, Tensor]]  # reads columns by name: label, kinetic_energy or a knot column
    rows: Mapping[float, int]  # number of rows by guidance scale, of all scales


@dataclass(frozen=True, eq=False)  # compared by identity, so that functions of the inputs can be cached
class Inputs:
    """The models, trajectories and data of a study. Networks are loaded on first use."""

    teacher: StudyModel
    students: Sequence[StudyModel]
    rivals: Sequence[StudyModel]  # teachers that differ from the teacher only in path and seed
    trajectories: Trajectories | None
    data: Dataset  # what the teacher was trained on: images or latents
    images: Dataset
    samples: int  # number of samples per model
    steps: Sequence[int]  # step counts of any-step students
    precision: Precision
    seed: int
    batch_size: int
    trainings: Mapping[str, Sequence[Training]]  # of a model and its initial weights, by folder; empty if unknown

    @functools.cached_property
    def pixels(self) -> FeatureSpace:
        """The feature space of pixels."""
        return open_space("pixels", self.images)

    @functools.cached_property
    def spaces(self) -> list[FeatureSpace]:
        """The feature spaces: pixels, and the classifier's features if there are several classes."""
        has_classes = self.teacher.config.num_classes > 1
        return [self.pixels, *([open_space("classifier", self.images, default_device())] if has_classes else [])]

    @functools.cached_property
    def train(self) -> dict[str, Moments]:
        """The moments of the training images, by feature space."""
        return {space.name: Statistics.of(space.of_training_images(self.images)).moments for space in self.spaces}

    def teacher_subject(self, guidance: float = 0.0, steps: int = 1) -> Subject:
        """Return the teacher. Its number of solver steps is a multiple of ``steps``, unless the store sets it."""
        return self._subject(self.teacher, self._teacher_sampling(guidance, steps))

    def teachers(self) -> list[Subject]:
        """Return the teacher and the rivals, with the same sampling settings and no guidance."""
        return [self._subject(model, self._teacher_sampling(0.0, 1)) for model in (self.teacher, *self.rivals)]

    def student_subjects(self, guidance: float | None = None) -> list[Subject]:
        """Return the students. An any-step student occurs once per step count.

        Args:
            guidance: keep only students that can be sampled at this scale. If None, keep all, each at its own scale.
        """
        knots = self.trajectories.knots if self.trajectories else TEACHER_STEPS
        dividing = [steps for steps in sorted(set(self.steps)) if knots % steps == 0]
        subjects = []
        for model in self.students:
            config = model.config
            if guidance is None or guidance in model.scales:
                for steps in dividing if config.is_any_step else [None]:
                    suffix = f"@{steps}" if config.is_any_step else ""
                    subjects.append(self._subject(model, student_sampling(config, steps, guidance), suffix))
        return subjects

    def _teacher_sampling(self, guidance: float, steps: int) -> Sampling:
        if self.trajectories is None:
            return teacher_sampling(self.teacher.config, guidance, -(-TEACHER_STEPS // steps) * steps)
        check_guidance(self.teacher.config, [guidance])
        return self.trajectories.sampling._replace(guidance=guidance)

    def _subject(self, model: StudyModel, sampling: Sampling, suffix: str = "") -> Subject:
        network, name = self._load(model.path), model.name + suffix
        return Subject(name, network, model.config, sampling, self.seed, self.samples, self.batch_size)

    @functools.cached_property
    def _load(self) -> Callable[[str], VelocityNetwork]:
        """A function that loads each network once, and compiles it once if ``precision.compile`` is set."""
        return functools.cache(lambda path: self.precision.wrap(load_model(path, default_device()).network))


@dataclass(frozen=True)
class ClaimResult:
    """The measurements of a claim."""

    text: str  # the result in one line
    values: dict[str, Any]  # the measured values for JSON, keyed by model if there are several models
    metrics: dict[str, float]  # named MEASURE/MODEL or MEASURE
    picture: bytes = field(repr=False)  # PNG
    table: str = ""  # Markdown


def panels(rows: int, columns: int, width: float = 5.5) -> tuple[Any, list[Any]]:
    """Return a figure and its axes, row by row."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width * columns, 4.5 * rows), layout="constrained")
    return figure, list(figure.subplots(rows, columns, squeeze=False).flat)


def png(figure: Any) -> bytes:
    """Return the figure as PNG."""
    sink = io.BytesIO()
    figure.savefig(sink, format="png", dpi=110)
    return sink.getvalue()

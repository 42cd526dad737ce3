"""Validation during training: metrics and sample sheets of the averaged network, always from the same noise."""

from dataclasses import dataclass, field
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor, nn

from kac.conditioning import known_classes
from kac.data import DataConfig, LabelledImages, describe_dataset, open_dataset
from kac.losses.refinement import energy_distance, mean_distance
from kac.metrics import Metric
from kac.model import DATA_CHANGED, Model, ModelConfig, deliver
from kac.networks import NetworkModule
from kac.networks.cost import TRAINING_CALLS
from kac.precision import Precision
from kac.sampling import BATCH_SIZE, Sampling, draw, generate, student_sampling, teacher_sampling
from kac.util.errors import DistillKacError
from kac.util.images import delivered
from kac.util.log import log
from pipeline import store
from pipeline.config import OptimizerConfig
from pipeline.store.layout import LABEL
from pipeline.tracking import declare

MIN_SAMPLES, MAX_SAMPLES, REAL_IMAGES, SHEET_SAMPLES = 256, 2048, 2048, 40
SEED = 1_000_003

TEACHER_STEPS = 20
"""Number of solver steps used to sample a teacher. This many are enough to show what it has learned."""

MAX_CALLS_SHARE = 0.05
"""Maximum share of the network calls that validation may use. It limits the number of samples per validation."""

MIN_UPDATES = 50
"""Minimum number of updates between two validations, by default."""

UNIT_IMAGES = 1000
"""The energy distance is reported relative to that of two sets of this many real images. This unit does not depend on
the number of samples, so trials with different batch sizes can be compared."""

ENERGY_DISTANCE, ENDPOINT_ERROR = "validation/energy_distance", "validation/endpoint_error"

declare(
    Metric(
        ENERGY_DISTANCE,
        "energy distance between samples and held-out images, divided by the energy distance between two sets of "
        f"{UNIT_IMAGES:,} real images; 1 means that the samples are as close as real images; over pixels and class "
        "labels (only pixels for an unconditional model)",
        better="lower",
    ),
    Metric(ENDPOINT_ERROR, "root mean square distance to the teacher's images from held-out noise", better="lower"),
)


class HeldOut(NamedTuple):
    """The last rows of a store, which are held out from training the student."""

    store: str
    scales: tuple[float, ...]  # guidance scales
    rows: int  # per guidance scale


@dataclass(frozen=True)
class Validation:
    """What to measure and draw during training, and how often.

    Attributes:
        every: updates between two validations; 0 means never. None means a tenth of all updates, but at least
            ``MIN_UPDATES``, or never if one validation takes more network calls than training itself.
        config: the config of the model being trained.
        held_out: the held-out rows of a student's store.
        sheet_updates: updates between two sheets of samples; None means never.
    """

    every: int | None
    config: ModelConfig
    optimizer: OptimizerConfig
    precision: Precision = field(default_factory=Precision)
    held_out: HeldOut | None = None
    sheet_updates: int | None = None

    def is_due(self, update: int) -> bool:
        """Whether to validate after this update. The last update is always validated."""
        every = self._interval
        return every > 0 and (update % every == 0 or update == self.optimizer.updates)

    @property
    def samples(self) -> int:
        """The number of samples to draw per validation, within ``MAX_CALLS_SHARE`` if possible."""
        affordable = int(MAX_CALLS_SHARE * self._training_calls(self._interval) / self._sampling.steps)
        return min(MAX_SAMPLES, max(MIN_SAMPLES, affordable))

    @property
    def _interval(self) -> int:
        updates = self.optimizer.updates
        if self.every is not None:
            return self.every
        is_cheaper = MIN_SAMPLES * self._sampling.steps <= self._training_calls(updates)
        return max(MIN_UPDATES, updates // 10) if is_cheaper else 0

    def _training_calls(self, updates: int) -> int:
        return TRAINING_CALLS * self.optimizer.batch_size * min(updates, self.optimizer.updates)

    @property
    def _sampling(self) -> Sampling:
        is_student = self.config.kind == "student"
        return student_sampling(self.config) if is_student else teacher_sampling(self.config, steps=TEACHER_STEPS)

    def draw_sheet(self, network: NetworkModule) -> bytes:
        """Return a PNG sheet of samples, class by class. Raises ``DistillKacError`` if the network has diverged."""
        from pipeline.report.pictures import sheet

        model, labels = Model(network, self.config), known_classes(self.config)[:SHEET_SAMPLES] or None
        samples = draw(model, self._sampling, self.precision, SEED, SHEET_SAMPLES, SHEET_SAMPLES, labels)
        return sheet(samples.images.numpy())

    def measure(self, network: NetworkModule) -> dict[str, float]:
        """Return metrics by name. A metric is left out if its images or rows are not available.

        Raises:
            DistillKacError: the network has diverged.
        """
        metrics = {}
        if (real := _real_images(self.config.data, self.config.data_sha256)) is not None:
            metrics[ENERGY_DISTANCE] = self._energy_distance(network, real)
        if self.held_out is not None and self.held_out.rows:
            metrics[ENDPOINT_ERROR] = self._endpoint_error(network, self.held_out)
        return metrics

    def _energy_distance(self, network: NetworkModule, real: LabelledImages) -> float:
        """The energy distance between samples and held-out images, relative to two sets of real images.

        Two sets of n real images have a distance of 2 s / n on average, where s is the mean distance between two real
        images. ``energy_distance`` estimates the excess over this value.
        """
        config, count = self.config, self.samples
        samples = draw(Model(network, config), self._sampling, self.precision, SEED, count, BATCH_SIZE)
        images = delivered(real.images).flatten(1)
        unit = mean_distance(images)

        def points(images: Tensor, label: Tensor) -> Tensor:
            classes = nn.functional.one_hot(label, config.num_classes + 1) / 2**0.5  # different classes: distance 1
            return torch.cat([images.flatten(1) / unit, classes * bool(known_classes(config))], 1)

        real_points = points(images, real.labels)
        excess = energy_distance(points(samples.images, samples.label), real_points)
        return float(1 + excess / (2 * mean_distance(real_points) / UNIT_IMAGES))

    def _endpoint_error(self, network: NetworkModule, held_out: HeldOut) -> float:
        """The endpoint error of delivered images, averaged over the guidance scales."""
        device, wrapped = next(network.parameters()).device, self.precision.wrap(network)
        errors = []
        for w, (noise, image, label) in zip(
            held_out.scales, _rows(held_out, min(self.samples, BATCH_SIZE)), strict=True
        ):
            sampling = student_sampling(self.config, guidance=w)
            made = generate(wrapped, noise.to(device), label.to(device), sampling).x
            errors.append((deliver(self.config, made) - deliver(self.config, image.to(device))).square().mean().sqrt())
        return float(torch.stack(errors).mean())


@lru_cache(maxsize=1)
def _rows(held_out: HeldOut, most: int) -> list[tuple[Tensor, Tensor, Tensor]]:
    """The noise, the teacher's image and the label of the last ``most`` held-out rows, per guidance scale."""
    source = store.open(held_out.store)
    noise, *_, image = source.identity.knot_columns
    parts = [source.last(min(held_out.rows, most), w, [LABEL, noise, image]) for w in held_out.scales]
    return [(columns[noise].float(), columns[image].float(), columns[LABEL].long()) for columns in parts]


@lru_cache(maxsize=1)
def _real_images(config: DataConfig, sha256: str) -> LabelledImages | None:
    """Held-out images, or None if the data is missing or has changed, because training a student does not need it."""
    try:
        if describe_dataset(config).sha256 != sha256:
            raise DistillKacError(DATA_CHANGED)
        split = open_dataset(config.images).held_out
    except (DistillKacError, OSError) as error:
        log.info(f"validation: no energy distance, because the teacher's data cannot be read: {error}")
        return None
    order = torch.randperm(len(split), generator=torch.Generator().manual_seed(SEED))
    return split.rows(order[:REAL_IMAGES])

"""Validation while a training runs: what the averaged weights are worth, always from the same noise."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from kac.conditioning import known_classes
from kac.data import DataConfig, LabelledImages, open_dataset
from kac.losses.refinement import open_spaces, refinement_loss
from kac.metrics import Metric
from kac.model import DATA_CHANGED, Model, ModelConfig
from kac.networks import NetworkModule
from kac.networks.cost import TRAINING_CALLS
from kac.precision import Precision
from kac.sampling import draw, generate, student_sampling
from kac.util.errors import DistillKacError
from kac.util.images import delivered
from kac.util.log import log
from pipeline import store
from pipeline.config.specs import OptimizerConfig
from pipeline.store.layout import LABEL
from pipeline.tracking import declare
from pipeline.training.sheets import SEED, sampling_of

FEWEST_SAMPLES, MOST_SAMPLES, REAL_IMAGES = 64, 512, 2048

MOST_SHARE = 0.05
"""Of the network calls of a training, for validations: where they would be more, fewer samples are drawn."""

FEWEST_UPDATES = 50
"""Between two validations, by default."""

ENERGY_DISTANCE, ENDPOINT_ERROR = "validation/energy_distance", "validation/endpoint_error"

declare(
    Metric(
        ENERGY_DISTANCE,
        "energy distance of a few samples to held-out images, pixels with class (without, if the model is "
        "unconditional), the unbiased estimate (0 or below: no difference can be seen)",
        better="lower",
    ),
    Metric(ENDPOINT_ERROR, "root mean square distance to the teacher's images of held-out noise", better="lower"),
)


class HeldOut(NamedTuple):
    """The last rows of a store, which the student does not learn."""

    store: str
    scales: tuple[float, ...]  # of guidance
    rows: int  # of each


@dataclass(frozen=True)
class Validation:
    """What is measured, and how often.

    Attributes:
        every: updates between two validations; None: a tenth of all, at least ``FEWEST_UPDATES``, but no validation if
            one takes more network calls than the training; 0: there are none.
        config: of the model that the training makes.
        optimizer: of the training.
        held_out: of a student's store.
    """

    every: int | None
    config: ModelConfig
    optimizer: OptimizerConfig
    precision: Precision = field(default_factory=Precision)
    held_out: HeldOut | None = None

    def is_due(self, update: int) -> bool:
        """Whether there is a validation after so many updates; the last weights are always measured."""
        every = self._interval
        return every > 0 and (update % every == 0 or update == self.optimizer.updates)

    @property
    def samples(self) -> int:
        """How many are drawn: as many as cost no more than ``MOST_SHARE`` of the updates since the last time."""
        trained = self._calls_an_update * min(self._interval, self.optimizer.updates)
        return min(MOST_SAMPLES, max(FEWEST_SAMPLES, int(MOST_SHARE * trained / sampling_of(self.config).steps)))

    @property
    def _interval(self) -> int:
        updates = self.optimizer.updates
        if self.every is not None:
            return self.every
        is_cheaper = FEWEST_SAMPLES * sampling_of(self.config).steps <= updates * self._calls_an_update
        return max(FEWEST_UPDATES, updates // 10) if is_cheaper else 0

    @property
    def _calls_an_update(self) -> int:
        return TRAINING_CALLS * self.optimizer.batch_size

    def measure(self, network: NetworkModule) -> dict[str, float]:
        """The metrics of a network in evaluation mode, by name; those whose inputs there are.

        Raises:
            DistillKacError: the network has diverged.
        """
        # For a few calls compiling would not pay.
        precision = self.precision.model_copy(update={"compile": False})
        found = {}
        if (real := _real_images(self.config.data, self.config.data_sha256)) is not None:
            found[ENERGY_DISTANCE] = self._energy_distance(network, precision, real)
        if self.held_out is not None and self.held_out.rows:
            found[ENDPOINT_ERROR] = self._endpoint_error(network, precision, self.held_out)
        return found

    def _energy_distance(self, network: NetworkModule, precision: Precision, real: LabelledImages) -> float:
        """Of delivered samples and images, in units of the mean distance between images."""
        config = self.config
        made = draw(Model(network, config), sampling_of(config), precision, SEED, self.samples, self.samples)
        spaces = open_spaces(("pixels",), open_dataset(config.data), torch.device("cpu"))
        images = delivered(real.images)
        label = made.label if known_classes(config) else None
        return float(refinement_loss(made.images, label, images, real.labels, spaces, 1.0, config.num_classes))

    def _endpoint_error(self, network: NetworkModule, precision: Precision, held_out: HeldOut) -> float:
        """The mean over scales; delivered images are compared."""
        device, wrapped = next(network.parameters()).device, precision.wrap(network)
        errors = []
        for w, rows in zip(held_out.scales, _rows(held_out, self.samples), strict=True):
            sampling = student_sampling(self.config, guidance=w)
            made = generate(wrapped, rows.noise.to(device), rows.label.to(device), sampling).x.cpu()
            errors.append((delivered(made) - delivered(rows.image)).square().mean().sqrt())
        return float(torch.stack(errors).mean())


class _Rows(NamedTuple):
    """Ends of trajectories."""

    noise: Tensor  # [rows, *sample]
    image: Tensor  # [rows, *sample], the teacher's
    label: Tensor  # [rows]


@lru_cache(maxsize=1)
def _rows(held_out: HeldOut, most: int) -> tuple[_Rows, ...]:
    """The held-out rows of each scale, or the ``most`` last ones."""
    source = store.open(held_out.store)
    first, *_, last = source.identity.knot_columns

    def ends() -> Iterator[_Rows]:
        for w in held_out.scales:
            columns = source.last(min(held_out.rows, most), w, [LABEL, first, last])
            yield _Rows(columns[first].float(), columns[last].float(), columns[LABEL].long())

    return tuple(ends())


@lru_cache(maxsize=1)
def _real_images(config: DataConfig, sha256: str) -> LabelledImages | None:
    """Held-out images; None if the data are not here, or have changed, which a student does not mind."""
    try:
        data = open_dataset(config)
        if data.description.sha256 != sha256:
            raise DistillKacError(DATA_CHANGED)
        split = data.held_out
    except (DistillKacError, OSError) as error:
        log.info(f"validation: no energy distance, since the data of the teacher cannot be read: {error}")
        return None
    order = torch.randperm(len(split), generator=torch.Generator().manual_seed(SEED))
    return split.rows(order[:REAL_IMAGES])

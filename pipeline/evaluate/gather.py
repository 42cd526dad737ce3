"""Turns chunks of the cache into the inputs of metrics: statistics of features, and sums over samples."""

from collections.abc import Iterator, Sequence
from statistics import median

from torch import Tensor

from kac.conditioning import known_classes
from kac.data import DataConfig, open_dataset
from kac.metrics import Evaluated, Reference, Statistics
from kac.metrics.features import FeatureSpace, check_widths, open_space
from kac.metrics.features.classifier import Classifier
from kac.metrics.quality import MEMORISATION_ROWS, PIXELS
from kac.metrics.statistics import KEPT_ROWS
from kac.util import files
from kac.util.cache import cache_folder
from kac.util.fingerprint import fingerprint
from pipeline.evaluate.sources import ModelSamples, RealImages, Source, chunks, features, images_in_parts


def real_images(data: DataConfig, samples: int) -> tuple[RealImages, RealImages]:
    """All training images, and at most ``samples`` held-out images."""
    description = open_dataset(data).description
    train = RealImages(data, description.sha256, "train", description.train)
    return train, RealImages(data, description.sha256, "held_out", min(samples, description.held_out))


def unfinished_reference(train: RealImages, spaces: Sequence[FeatureSpace]) -> list[FeatureSpace]:
    """The spaces whose statistics of the training images are not in the cache."""
    return [space for space in spaces if not files.exists(_statistics_path(train, space))]


def reference_of(train: RealImages, held_out: RealImages, spaces: Sequence[FeatureSpace], samples: int) -> Reference:
    """The real images that samples are compared with, from chunks in the cache.

    Args:
        samples: the number of samples per model.
    """
    dataset = open_dataset(train.data)
    pixels = open_space(PIXELS, dataset)

    def train_pixels() -> Iterator[Tensor]:
        return (pixels(part) for part in images_in_parts(dataset))

    shown = pixels(held_out.rows(range(min(held_out.count, MEMORISATION_ROWS))).images)
    statistics = {space.name: _train_statistics(train, space) for space in with_pixels(spaces, pixels)}
    return Reference(statistics, shown, train_pixels, held_out.count if held_out.count < samples else None)


def with_pixels(spaces: Sequence[FeatureSpace], pixels: FeatureSpace) -> list[FeatureSpace]:
    """``spaces`` with pixels first; some metrics always need pixels."""
    return [pixels, *(space for space in spaces if space.name != PIXELS)]


def gather(
    source: Source,
    spaces: Sequence[FeatureSpace],
    reference: Reference,
    teacher: ModelSamples | None = None,
    teacher_metrics: dict[str, float] | None = None,
) -> Evaluated:
    """Read the chunks of a source from the cache.

    Args:
        spaces: must include pixels.
        teacher: of a student, its teacher's samples from the same noise.
        teacher_metrics: the metrics of these samples.
    """
    statistics: dict[str, Statistics] = {}
    is_model = isinstance(source, ModelSamples)
    has_classes = not isinstance(source, ModelSamples) or bool(known_classes(source.config))
    classifiers = {
        space.name: space.network for space in spaces if isinstance(space.network, Classifier) and has_classes
    }
    right, squares, values, nfe, speeds = 0, 0.0, 0, 0, []
    for chunk in chunks(source):
        rows = source.rows(chunk.ids)
        nfe = rows.nfe
        speeds += [len(chunk.ids) / rows.seconds] if rows.seconds else []
        for space in spaces:
            vectors = features(chunk, space, rows.images)
            check_widths(space.option, vectors.shape[1], reference.width(space.name))
            statistics.setdefault(space.name, Statistics(vectors.shape[1], reference.floor_count or 0)).add(vectors)
            if space.name in classifiers:
                right += int((classifiers[space.name].labels(vectors) == rows.label).sum())
        if teacher is not None:
            gap = rows.images - teacher.rows(chunk.ids).images
            squares, values = squares + float(gap.double().square().sum()), values + gap.numel()
    return Evaluated(
        statistics,
        reference,
        label_agreement=right / source.count if classifiers else None,
        endpoint_error=(squares / values) ** 0.5 if values else None,
        nfe=nfe if is_model else None,
        speed=median(speeds) if is_model else None,  # the first chunk may include compilation
        teacher=teacher_metrics,
    )


def _train_statistics(train: RealImages, space: FeatureSpace) -> Statistics:
    path = _statistics_path(train, space)
    try:
        return Statistics.from_bytes(files.read_bytes(path), train.count)
    except FileNotFoundError:
        pass
    statistics: Statistics | None = None
    for chunk in chunks(train):
        vectors = features(chunk, space, train.rows(chunk.ids).images)
        statistics = statistics or Statistics(vectors.shape[1])
        check_widths(space.option, vectors.shape[1], statistics.width)
        statistics.add(vectors)
    assert statistics is not None
    files.write_bytes(path, statistics.to_bytes())
    return statistics


def _statistics_path(train: RealImages, space: FeatureSpace) -> str:
    name = fingerprint({"images": train.fingerprint, "space": space.fingerprint, "kept": KEPT_ROWS})
    return files.join(cache_folder("reference"), f"{name}.safetensors")

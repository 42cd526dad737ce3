"""From chunks in the cache to what metrics need: statistics of features that stream by, and sums over samples."""

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
    """All training images, and as many held-out ones as a model's ``samples``, if there are so many."""
    known = open_dataset(data).description
    train = RealImages(data, known.sha256, "train", known.train)
    return train, RealImages(data, known.sha256, "held_out", min(samples, known.held_out))


def unfinished_reference(train: RealImages, spaces: Sequence[FeatureSpace]) -> list[FeatureSpace]:
    """The spaces in which the training images' statistics are not in the cache."""
    return [space for space in spaces if not files.exists(_statistics_path(train, space))]


def reference_of(train: RealImages, held_out: RealImages, spaces: Sequence[FeatureSpace], samples: int) -> Reference:
    """What samples are judged by; the chunks that it needs have been made.

    Args:
        samples: a model's.
    """
    dataset = open_dataset(train.data)
    pixels = open_space(PIXELS, dataset)

    def train_pixels() -> Iterator[Tensor]:
        return (pixels(part) for part in images_in_parts(dataset))

    shown = pixels(held_out.rows(range(min(held_out.count, MEMORISATION_ROWS))).images)
    statistics = {space.name: _train_statistics(train, space) for space in with_pixels(spaces, pixels)}
    return Reference(statistics, shown, train_pixels, held_out.count if held_out.count < samples else None)


def with_pixels(spaces: Sequence[FeatureSpace], pixels: FeatureSpace) -> list[FeatureSpace]:
    """``spaces`` and the pixels, which some metrics always need."""
    return [pixels, *(space for space in spaces if space.name != PIXELS)]


def gather(
    source: Source,
    spaces: Sequence[FeatureSpace],
    reference: Reference,
    teacher: ModelSamples | None = None,
    teacher_metrics: dict[str, float] | None = None,
) -> Evaluated:
    """Read a source's chunks, which have been made.

    Args:
        spaces: the pixels among them. teacher: a student's, of the same noise; teacher_metrics: its.
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
            made = features(chunk, space, rows.images)
            check_widths(space.option, made.shape[1], reference.width(space.name))
            statistics.setdefault(space.name, Statistics(made.shape[1], reference.floor_count or 0)).add(made)
            if space.name in classifiers:
                right += int((classifiers[space.name].labels(made) == rows.label).sum())
        if teacher is not None:
            gap = rows.images - teacher.rows(chunk.ids).images
            squares, values = squares + float(gap.double().square().sum()), values + gap.numel()
    return Evaluated(
        statistics,
        reference,
        label_agreement=right / source.count if classifiers else None,
        endpoint_error=(squares / values) ** 0.5 if values else None,
        nfe=nfe if is_model else None,
        speed=median(speeds) if is_model else None,  # the first chunk of a process may wait for the compiler
        teacher=teacher_metrics,
    )


def _train_statistics(train: RealImages, space: FeatureSpace) -> Statistics:
    path = _statistics_path(train, space)
    try:
        return Statistics.from_bytes(files.read_bytes(path), train.count)
    except FileNotFoundError:
        pass
    made: Statistics | None = None
    for chunk in chunks(train):
        rows = features(chunk, space, train.rows(chunk.ids).images)
        made = made or Statistics(rows.shape[1])
        check_widths(space.option, rows.shape[1], made.width)
        made.add(rows)
    assert made is not None
    files.write_bytes(path, made.to_bytes())
    return made


def _statistics_path(train: RealImages, space: FeatureSpace) -> str:
    name = fingerprint({"images": train.fingerprint, "space": space.fingerprint, "kept": KEPT_ROWS})
    return files.join(cache_folder("reference"), f"{name}.safetensors")

"""Scores: the rows of an evaluation, their record and their table."""

import json
import math
from collections.abc import Sequence
from typing import Any

from pydantic import Field

from kac.data.class_names import list_classes
from kac.metrics import Metric, QualityMetric, quality_metrics
from kac.util import files
from kac.util.errors import DistillKacError
from kac.util.options import Options

EVALUATION_FILE = "evaluation.json"
REAL = "real"


class Score(Options):
    """One row of the table."""

    name: str
    kind: str  # teacher, student, or REAL: held-out images
    steps: int | None  # None: real images
    guidance: float | None
    count: int  # samples of each noise seed
    metrics: dict[str, float]  # those that apply; of several noise seeds the mean
    half_widths: dict[str, float] = Field({}, description="of the 95 % interval of the mean, with several noise seeds")
    fingerprint: str
    refined_in: tuple[str, ...] = Field((), description="spaces in which it was brought to the training images")
    any_step: str = Field("", description="the any-step student of which this is a row, by its folder's name")
    folder: str = Field("", description="of the model")
    prefix: str = Field("", description="of its metrics in its model's run: empty for the model's own steps and scale")


class Record(Options):
    """What ``evaluation.json`` holds."""

    fingerprint: str
    samples: int
    seeds: tuple[int, ...]
    features: tuple[str, ...]  # the names of the spaces
    facts: dict[str, dict[str, float]]  # of the spaces
    real: dict[str, Any]  # the data: kind, train, held_out, sha256
    floor_count: int | None  # held-out images, if these are fewer than the samples
    kept_rows: int  # at most so many rows of each set in metrics of nearest neighbours, kernels and slices
    scores: tuple[Score, ...]
    shown_labels: tuple[int, ...] = Field((), description="labels of the columns of the picture of samples")

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the classes by number; empty: they have none, or an older version wrote the record."""
        return tuple(self.real.get("class_names", ()))

    def metrics(self) -> dict[str, QualityMetric]:
        """The metrics of this evaluation."""
        return quality_metrics(self.features, self.floor_count)


def read_record(out: str) -> Record:
    """The record of an evaluation's folder.

    Raises:
        DistillKacError: it is of an older version, which judged raw values.
    """
    path = files.join(out, EVALUATION_FILE)
    values = json.loads(files.read_bytes(path))
    if "features" not in values:
        raise DistillKacError(
            f"{path}: expected scores of delivered images, found those of an older version: choose another `out`"
        )
    return Record(**values)


def mean_score(scores: Sequence[Score]) -> Score:
    """One score of those that the same model has with different noise seeds."""
    first, count = scores[0], len(scores)
    if count == 1:
        return first
    from scipy.stats import t  # type: ignore[import-untyped]

    means, half_widths = {}, {}
    for name in first.metrics:
        values = [score.metrics[name] for score in scores if name in score.metrics]
        means[name] = math.fsum(values) / len(values)
        variance = sum((value - means[name]) ** 2 for value in values) / (count - 1)
        half_widths[name] = float(t.ppf(0.975, count - 1)) * math.sqrt(variance / count)
    return first.model_copy(update={"metrics": means, "half_widths": half_widths})


def columns(record: Record) -> list[QualityMetric]:
    """The metrics that have a column, those that no row has left out."""
    metrics = record.metrics().values()
    return [m for m in metrics if m.heading and any(m.name in score.metrics for score in record.scores)]


def head(record: Record) -> list[str]:
    """The headings of the table."""
    return ["model", "steps", "w", "count", *(metric.heading for metric in columns(record))]


def row(record: Record, score: Score) -> list[str]:
    """The cells of a score under ``head``."""
    steps = "" if score.steps is None else str(score.steps)
    guidance = "" if score.guidance is None else f"{score.guidance:g}"
    return [score.name, steps, guidance, f"{score.count:,}", *(_cell(score, metric) for metric in columns(record))]


def _cell(score: Score, metric: QualityMetric) -> str:
    if metric.name not in score.metrics:
        return ""
    text = format(score.metrics[metric.name], metric.format)
    half_width = score.half_widths.get(metric.name)
    return f"{text} ±{half_width:{metric.format}}" if half_width else text


def direction(metric: Metric) -> str:
    """Which way is better, for the end of a sentence."""
    return f" ({metric.better} is better)" if metric.better else ""


def table(record: Record) -> str:
    """The scores as text, one line a model, and below them what they were made from."""
    return "\n".join([*aligned(head(record), [row(record, s) for s in record.scores]), *provenance(record)])


def aligned(headings: Sequence[str], cells: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a table with headings of two words at most, one below the other, and a rule below them."""
    heads = [heading.partition(" ") for heading in headings]
    rows = [[top for top, _, _ in heads], [below for _, _, below in heads], *cells]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]).rstrip()
        for line in rows  # names left, numbers right
    ]
    return [*lines[:2], "-" * max(map(len, lines)), *lines[2:]]


def provenance(record: Record) -> list[str]:
    """What stands behind the figures: counts, noise, real images, features."""
    seeds, real = record.seeds, record.real
    noise = f"noise seed {seeds[0]}" if len(seeds) == 1 else f"noise seeds {seeds[0]} .. {seeds[-1]}, mean ±95 %"
    spaces = [_space(name, record.facts.get(name, {})) for name in record.features]
    told = {name: _seen_by(name, record.scores) for name in record.features}
    seen = [f"{name} by {', '.join(models)}" for name, models in told.items() if models]
    return [
        f"{record.samples:,} delivered samples a model; {noise}; precision, recall, KID and slices of at most "
        f"{record.kept_rows:,} rows",
        f"real images: {real['kind']}, {real['train']:,} training and {real['held_out']:,} held-out, "
        f"sha256 {real['sha256'][:12]}; features: {', '.join(spaces)}",
        *([f"classes, label=name: {list_classes(record.class_names)}"] if record.class_names else []),
        *([f"seen in training, and so no judge of these: {'; '.join(seen)}"] if seen else []),
    ]


def _seen_by(space: str, scores: Sequence[Score]) -> list[str]:
    """The models that were refined in a space, or in one that tells as much of an image."""
    of_pixels = {"pixels", "pooled"}
    same = of_pixels if space in of_pixels else set()  # an evaluation's other features are never trained on
    return list(dict.fromkeys(score.any_step or score.name for score in scores if same & set(score.refined_in)))


def _space(name: str, facts: dict[str, float]) -> str:
    told = ", ".join(f"{fact.replace('_', ' ')} {value:.4f}" for fact, value in facts.items())
    return f"{name} ({told})" if told else name

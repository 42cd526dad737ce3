"""The scores of an evaluation, their record and their table."""

import json
import math
from collections.abc import Sequence
from typing import Any

from pydantic import Field

from kac.data.class_names import list_classes
from kac.metrics import Metric, QualityMetric, quality_metrics
from kac.metrics.quality import COPIES_BELOW
from kac.solvers import KnotGrid, SolverName
from kac.util import files
from kac.util.errors import DistillKacError
from kac.util.options import Options

EVALUATION_FILE = "evaluation.json"
REAL, DECODED = "real", "decoded"
"""Kinds of the rows without a model: held-out images, and those images encoded and decoded by the autoencoder."""

PIXEL_SPACES = {"pixels", "pooled"}


class Score(Options):
    """One row of the table."""

    name: str
    kind: str  # "teacher", "student", REAL or DECODED
    steps: int | None  # None for real images
    guidance: float | None  # None for real images
    count: int  # samples per noise seed
    metrics: dict[str, float]  # applicable metrics; means if there are several noise seeds
    half_widths: dict[str, float] = Field({}, description="half widths of the 95 % intervals over noise seeds")
    fingerprint: str
    refined_in: tuple[str, ...] = Field((), description="feature spaces in the model's refinement loss")
    any_step: str = Field("", description="folder name of the any-step student of this row")
    folder: str = Field("", description="folder of the model")
    prefix: str = Field("", description="prefix of this row's metric names in the model's MLflow run")


class Record(Options):
    """The content of ``evaluation.json``."""

    fingerprint: str
    samples: int
    seeds: tuple[int, ...]
    features: tuple[str, ...]  # names of the feature spaces
    facts: dict[str, dict[str, float]]  # facts of each feature space, such as its classifier's accuracy
    real: dict[str, Any]  # the data: kind, train, held_out, sha256
    floor_count: int | None  # number of held-out images if it is below `samples`, otherwise None
    kept_rows: int  # maximum number of rows per set in nearest-neighbour, kernel and slice metrics
    scores: tuple[Score, ...]
    solver: SolverName = Field("ab2", description="the teacher's solver")
    knot_grid: KnotGrid = Field("uniform", description="spacing of the teacher's solver steps")
    time_factor: float = Field(1.0, description="the teacher's network received this factor times t")
    shown_labels: tuple[int, ...] = Field((), description="labels of the columns in the sample picture")

    @property
    def class_names(self) -> tuple[str, ...]:
        """Class names by number; empty if the classes have no names or an older version wrote the record."""
        return tuple(self.real.get("class_names", ()))

    def metrics(self) -> dict[str, QualityMetric]:
        """This evaluation's metrics, by name."""
        return quality_metrics(self.features, self.floor_count)


def read_record(out: str) -> Record:
    """Read the record in an evaluation's folder.

    Raises:
        DistillKacError: an older version, which scored raw network outputs, wrote the record.
    """
    path = files.join(out, EVALUATION_FILE)
    values = json.loads(files.read_bytes(path))
    if "features" not in values:
        raise DistillKacError(
            f"{path} is from an older version that evaluated raw network outputs. Choose another `out`."
        )
    return Record(**values)


def mean_score(scores: Sequence[Score]) -> Score:
    """One model's mean score over several noise seeds, with the half widths of the 95 % intervals."""
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
    """The metrics with a column in the table: the metrics that have a heading and at least one value."""
    metrics = record.metrics().values()
    return [m for m in metrics if m.heading and any(m.name in score.metrics for score in record.scores)]


def cells(record: Record) -> tuple[list[str], list[list[str]]]:
    """The headings and the rows of the table."""
    shown, rows = columns(record), []
    for score in record.scores:
        steps = "" if score.steps is None else str(score.steps)
        guidance = "" if score.guidance is None else f"{score.guidance:g}"
        rows.append([score.name, steps, guidance, f"{score.count:,}"])
        for metric in shown:
            value, half_width = score.metrics.get(metric.name), score.half_widths.get(metric.name)
            text = "" if value is None else format(value, metric.format)
            rows[-1].append(f"{text} ±{half_width:{metric.format}}" if half_width else text)
    return ["model", "steps", "w", "count", *(metric.heading for metric in shown)], rows


def direction(metric: Metric) -> str:
    """The suffix " (lower is better)" or " (higher is better)"; empty if neither is better."""
    return f" ({metric.better} is better)" if metric.better else ""


def table(record: Record) -> str:
    """The scores as text, one line per model, with notes below."""
    return "\n".join([*aligned(*cells(record)), *provenance(record)])


def aligned(headings: Sequence[str], body: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a text table. Names are aligned left, numbers right. Headings are split after their first word."""
    tops, _, belows = zip(*(heading.partition(" ") for heading in headings), strict=True)
    rows = [tops, belows, *body]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join([r[0].ljust(widths[0]), *map(str.rjust, r[1:], widths[1:])]).rstrip() for r in rows]
    return [*lines[:2], "-" * max(map(len, lines)), *lines[2:]]


def provenance(record: Record) -> list[str]:
    """Notes on the scores: counts, noise seeds, real images, feature spaces."""
    seeds, real = record.seeds, record.real
    noise = f"noise seed {seeds[0]}" if len(seeds) == 1 else f"noise seeds {seeds[0]} .. {seeds[-1]}, mean ±95 %"
    spaces, seen = [], []
    for name in record.features:
        facts = [f"{fact.replace('_', ' ')} {value:.4f}" for fact, value in record.facts.get(name, {}).items()]
        spaces.append(f"{name} ({', '.join(facts)})" if facts else name)
        # Pixels and pooled pixels count as the same space. Refinement cannot use an evaluation's other spaces.
        models = [
            s.any_step or s.name for s in record.scores if name in PIXEL_SPACES and PIXEL_SPACES & {*s.refined_in}
        ]
        seen += [f"{name} ({', '.join(dict.fromkeys(models))})"] if models else []
    solver = ""
    if (record.solver, record.knot_grid, record.time_factor) != ("ab2", "uniform", 1.0):
        solver = f"; the teacher's solver is {record.solver} on a {record.knot_grid} grid"
        solver += f", with time factor {record.time_factor:g}"
    copying = [
        f"{score.name} (memory ratio {score.metrics['memorisation']:.3f})"
        for score in record.scores
        if score.kind != DECODED and score.metrics.get("memorisation", 1.0) < COPIES_BELOW
    ]
    return [
        f"{record.samples:,} delivered samples per model; {noise}; precision, recall, KID and slices use at most "
        f"{record.kept_rows:,} rows{solver}",
        f"real images: {real['kind']}, {real['train']:,} training and {real['held_out']:,} held-out, "
        f"sha256 {real['sha256'][:12]}; features: {', '.join(spaces)}",
        *([f"classes, label=name: {list_classes(record.class_names)}"] if record.class_names else []),
        *([f"nearer to the training images than held-out images are: {', '.join(copying)}"] if copying else []),
        *([f"not comparable in feature spaces used to train a model: {'; '.join(seen)}"] if seen else []),
    ]

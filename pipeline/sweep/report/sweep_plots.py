"""Plots of a sweep's report, as PNG bytes, with text that is readable on a phone."""

import io
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from kac.metrics import Metric
from pipeline.evaluate.scores import REAL, direction
from pipeline.sweep.report.sweep_report import (
    COST,
    SPEED,
    Row,
    SweepReport,
    cost_of,
    describe,
    headings,
    ranked,
    sort_key,
    text,
)

DPI = 150
LOG_RATIO = 8.0
"""Values that span more than this factor get a logarithmic scale."""

COSTS = {COST: "network evaluations per image", SPEED: "images per second"}

MOST_COLOURS = 6
"""Up to this number of guidance scales, each has its own colour. More scales share a colour bar."""

MOST_CATEGORIES = 6
"""A field with up to this number of values has one tick per value, at equal distances."""

LEAST_TRIALS = 4
"""Finished trials that parallel coordinates and importances need."""


def heat_map_name(metric: Metric) -> str:
    """The name of a metric's heat map."""
    return f"heat-map-{metric.name.replace('/', '-')}"


def heat_map(rows: Sequence[Row], metric: Metric) -> bytes | None:
    """The best value per step count and guidance scale. None with fewer than two step counts or two scales."""
    from matplotlib.colors import ListedColormap, LogNorm, Normalize
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    best: dict[tuple[Any, Any], float] = {}
    for row in ranked(rows, metric):
        if row.steps is not None and row.guidance is not None:
            best.setdefault((row.steps, row.guidance), row.metrics[metric.name])
    down, across = (sorted({cell[axis] for cell in best}, key=sort_key) for axis in (0, 1))
    if len(down) < 2 or len(across) < 2:
        return None
    values = np.array([[best.get((steps, w), np.nan) for w in across] for steps in down])
    low, high = np.nanmin(values), np.nanmax(values)
    has_best = bool(metric.better) and high > low
    norm = LogNorm(low, high) if low > 0 and high / low > LOG_RATIO else Normalize(low, high)
    colours = (_colours(metric) if has_best else ListedColormap(["white"])).with_extremes(bad="#eeeeee")
    figure = Figure(figsize=(1.7 + 0.95 * len(across), 1.5 + 0.6 * len(down)), layout="constrained")
    axis = figure.subplots()
    axis.imshow(values, cmap=colours, norm=norm, aspect="auto")
    for (y, x), value in np.ndenumerate(values):
        is_dark = np.dot(colours(norm(value))[:3], (0.3, 0.59, 0.11)) < 0.5
        label = "-" if np.isnan(value) else format(value, metric.format)
        axis.text(x, y, label, ha="center", va="center", color="white" if is_dark else "black")
    if has_best:
        y, x = np.argwhere(values == (high if metric.better == "higher" else low))[0]
        axis.add_patch(Rectangle((x - 0.47, y - 0.46), 0.94, 0.92, fill=False, edgecolor="#d62728", linewidth=2.5))
    axis.set_xticks(range(len(across)), [text(w) for w in across])
    axis.set_yticks(range(len(down)), [text(steps) for steps in down])
    axis.set(xlabel="guidance scale w", ylabel="steps")
    axis.set_title(f"{metric.name.replace('/', ' ').replace('_', ' ')}{direction(metric)}", fontsize=10)
    return _png(figure)


def _colours(metric: Metric) -> Any:
    """A colour map in which darker is better and the worst value is still visible on white."""
    import matplotlib as mpl
    from matplotlib.colors import ListedColormap

    colours = mpl.colormaps["YlGnBu"](np.linspace(0.12, 1, 256))
    return ListedColormap(colours if metric.better == "higher" else colours[::-1])


def front_plot(report: SweepReport, on_front: Sequence[Row], cost_name: str) -> bytes:
    """Quality against cost: every row as a dot, and the front as a line with the numbers of its trials."""
    from matplotlib.figure import Figure

    metric, cost = report.metric, describe(cost_name, report.record)
    figure = Figure(figsize=(5.4, 4.6), layout="constrained")
    axis: Any = figure.subplots()

    def points(rows: Sequence[Row]) -> tuple[list[Any], list[Any]]:
        return [cost_of(row, cost) for row in rows], [row.metrics[metric.name] for row in rows]

    axis.plot(*points(on_front), "-", color="#999999", linewidth=1.2, zorder=1, label="front")
    drawn = [row for row in report.ranked if cost_of(row, cost) is not None]
    scales = sorted({row.guidance for row in drawn}, key=sort_key)
    colours = {w: f"C{number}" for number, w in enumerate(scales)} if len(scales) <= MOST_COLOURS else {}
    for w, colour in colours.items():
        own = points([row for row in drawn if row.guidance == w])
        label = f"w = {text(w)}" if w is not None else "trials"
        axis.plot(*own, "o", color=colour, label=label, markersize=6, alpha=0.8)
    if not colours:  # a legend would fill the plot
        shades = [row.guidance if isinstance(row.guidance, int | float) else np.nan for row in drawn]
        dots = axis.scatter(*points(drawn), c=shades, cmap="plasma", s=36, label="trials", zorder=2)
        figure.colorbar(dots, ax=axis, label="guidance scale w")
    axis.plot(*points(on_front), "o", color="black", mfc="none", markersize=12)
    is_low_good = metric.better == "lower"
    for *point, row in zip(*points(on_front), on_front, strict=True):  # labels on the empty side of the front
        offset: Any = {"xytext": (0, -20 if is_low_good else 10), "textcoords": "offset points", "ha": "center"}
        axis.annotate(f"#{row.trial.number}", point, weight="bold", fontsize=9, **offset)
    _draw_references(axis, report, cost_name, {w: colours.get(w, "white") for w in scales})
    scores = report.record.scores if report.record else ()
    costs = {*points(drawn)[0], *(score.metrics[cost_name] for score in scores if cost_name in score.metrics)}
    _log_if_wide(axis, "y", points(drawn)[1])
    _log_if_wide(axis, "x", costs)
    if cost_name == COST and len(costs) <= 8:
        axis.set_xticks(sorted(costs), [f"{value:g}" for value in sorted(costs)])
        axis.set_xticks([], minor=True)
    axis.set(xlabel=f"{COSTS[cost_name]}{direction(cost)}", ylabel=f"{metric.heading}{direction(metric)}")
    axis.margins(0.1, 0.15)
    if is_low_good and axis.get_yscale() == "linear":
        axis.set_ylim(bottom=0)
    axis.grid(alpha=0.25)
    axis.legend(fontsize=8)
    return _png(figure)


def _draw_references(axis: Any, report: SweepReport, cost_name: str, colours: dict[Any, str]) -> None:
    """Draw teachers of the same guidance scales as stars, held-out images as a line."""
    label: str | None = "teacher, of the same w"
    for score in report.record.scores if report.record else ():
        value = score.metrics.get(report.metric.name)
        if value is None:
            continue
        if score.kind == REAL:
            axis.axhline(value, color="black", linewidth=0.8, linestyle=":", label=f"real images ({score.count:,})")
        elif score.kind == "teacher" and score.guidance in colours and cost_name in score.metrics:
            style = {"color": colours[score.guidance], "markersize": 13, "label": label, "mec": "k"}
            axis.plot([score.metrics[cost_name]], [value], "*", **style)
            label = None  # one line of the legend


def _log_if_wide(axis: Any, name: str, values: Any) -> None:
    """Make the x or y axis logarithmic if the values span a large factor."""
    from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter

    if values and min(values) > 0 and max(values) / min(values) > LOG_RATIO:
        axis.set(**{f"{name}scale": "log"})
        ticks = getattr(axis, f"{name}axis")
        ticks.set_major_locator(LogLocator(subs=(1, 2, 5)))
        ticks.set_major_formatter(EngFormatter(sep=""))  # "50k", because long numbers would overlap
        ticks.set_minor_formatter(NullFormatter())


def parameter_plots(report: SweepReport) -> tuple[dict[str, bytes], str]:
    """Parallel coordinates and importances of the varied fields, drawn by Optuna.

    Returns:
        The plots by name, and a note on missing plots; empty if none is missing.
    """
    from optuna.importance import FanovaImportanceEvaluator
    from optuna.visualization.matplotlib import plot_parallel_coordinate, plot_param_importances

    best: dict[int, Row] = {}
    for row in report.ranked:
        best.setdefault(row.trial.number, row)
    names = [name for name in report.fields if len({str(row.trial.values.get(name)) for row in best.values()}) > 1]
    if len(best) < LEAST_TRIALS:
        needed = f"{LEAST_TRIALS} finished trials with this metric, not {len(best)}"
        return {}, f"Left out: plots of parameters need {needed}."
    if not names:
        return {}, "Left out: no parameter differs between the finished trials."
    metric, study, titles = report.metric, _study(list(best.values()), names, report.metric), headings(names)
    options = {"study": study, "params": list(titles.values()), "target_name": metric.heading}
    with _optuna_style():
        axis = plot_parallel_coordinate(**options)
        for lines in axis.collections:
            lines.set_cmap(_colours(metric))
            if lines.colorbar is not None:  # away from the tick labels of the last axis
                bar = lines.colorbar.ax
                bar.set_position(bar.get_position().translated(0.07, 0))
        axis.set_title(f"{metric.heading}{direction(metric)}: one line per trial", fontsize=10, pad=14)
        plots = {"parallel-coordinates": _png(axis.figure, (max(6.5, 1.7 * (len(names) + 1)), 4.4))}
    if len(names) == 1:
        return plots, "Importances are left out: only one parameter was varied."
    if len({row.metrics[metric.name] for row in best.values()}) == 1:
        return plots, "Importances are left out: all trials have the same value."
    with _optuna_style():
        axis = plot_param_importances(**options, evaluator=FanovaImportanceEvaluator(seed=0))
        axis.set_title("", loc="left")
        axis.set(xlabel="importance (fANOVA, shares of 1)", ylabel="")
        plots["importances"] = _png(axis.figure, (5.4, 1.2 + 0.45 * len(names)))
    return plots, ""


@contextmanager
def _optuna_style() -> Iterator[None]:
    """Undo Optuna's changes of pyplot's state, and silence warnings that its plots are experimental."""
    import matplotlib as mpl
    from matplotlib import pyplot as plt

    with mpl.rc_context(), warnings.catch_warnings(action="ignore"):
        plt.switch_backend("agg")
        yield
        plt.close()


def _study(rows: Sequence[Row], names: Sequence[str], metric: Metric) -> Any:
    """An Optuna study of the rows, for Optuna's plots."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    values = {title: [_plain(row.trial.values.get(name)) for row in rows] for name, title in headings(names).items()}
    distributions = {title: _distribution(column) for title, column in values.items()}
    study = optuna.create_study(direction="maximize" if metric.better == "higher" else "minimize")
    for number, row in enumerate(rows):
        params = {title: column[number] for title, column in values.items()}
        value = row.metrics[metric.name]
        study.add_trial(optuna.trial.create_trial(params=params, distributions=distributions, value=value))
    return study


def _distribution(values: Sequence[Any]) -> Any:
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    distinct = sorted(set(values), key=sort_key)
    is_number = all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)
    if not is_number or len(distinct) <= MOST_CATEGORIES:
        return CategoricalDistribution(distinct)
    low, high = distinct[0], distinct[-1]
    # Logarithmic if the median is closer to the geometric mean of the ends than to their arithmetic mean.
    middle = sorted(values)[len(values) // 2]
    is_log = bool(low > 0 and abs(middle - (low * high) ** 0.5) < abs(middle - (low + high) / 2))
    kind = IntDistribution if all(isinstance(value, int) for value in values) else FloatDistribution
    return kind(low, high, log=is_log)


def _plain(value: Any) -> Any:
    """The value as a type that Optuna accepts."""
    return value if isinstance(value, int | float | str) else "none" if value is None else str(value)


def _png(figure: Any, inches: tuple[float, float] | None = None) -> bytes:
    if inches:
        figure.set_size_inches(inches)
    sink = io.BytesIO()
    figure.savefig(sink, format="png", dpi=DPI, bbox_inches=None if figure.get_layout_engine() else "tight")
    return sink.getvalue()

"""Plots of a sweep's results as PNG bytes. Their text is readable on a phone."""

import io
import warnings
from collections.abc import Sequence
from itertools import product
from typing import Any, NamedTuple

import numpy as np

from kac.metrics import Metric
from pipeline.evaluate.scores import REAL, Score, direction
from pipeline.report import pictures
from pipeline.sweep.sweep_results import NFE, Cost, Row, SweepResults, headings, ranked, text

DPI = 150
LOG_RATIO = 8.0
"""Values that span more than this factor get a logarithmic scale."""

LEAST_TRIALS = 4
"""Minimum number of finished trials for parallel coordinates and importances."""

MOST_CATEGORIES = 6
"""In parallel coordinates, a field with at most this many values has one tick per value, at equal distances."""


class Plot(NamedTuple):
    """A picture on the page."""

    png: bytes
    alt: str  # describes the picture to screen readers
    caption: str = ""


def draw_plots(results: SweepResults, images: Sequence[np.ndarray] | None) -> tuple[dict[str, Plot], str]:
    """Return the page's plots by file name, and a note that explains why plots of parameters are missing.

    ``images`` has the samples [shown, *sample] of each evaluation row.
    """
    heading, plots = results.metric.heading, {}
    for cost, rows in results.fronts.items():
        if rows:
            plots[f"front-{cost.name}"] = Plot(front_plot(results, cost), f"{heading} against {cost.label}")
    if images and results.record and results.on_front:
        sheet = _sample_sheet(results, results.record.scores, images)
        plots["samples"] = Plot(sheet, "samples of the best trials, with real images on top")
    for number, (metric, fields) in enumerate(product(results.columns, results.planes)):
        # Further pairs of fields are shown only for the metric that ranks the trials.
        is_shown = metric.name != NFE and (fields == results.planes[0] or metric is results.metric)
        if is_shown and (png := heat_map(ranked(results.rows, metric), metric, fields)):
            name, meaning = metric.name.replace("/", "-"), f"{metric.meaning}{direction(metric)}"
            name += "" if fields == results.planes[0] else f"-{number}"
            plots[f"heat-map-{name}"] = Plot(png, f"{metric.heading} by {' and '.join(fields)}", meaning)
    of_parameters, note = parameter_plots(results)
    return {**plots, **of_parameters}, note


def _sample_sheet(results: SweepResults, scores: Sequence[Score], images: Sequence[np.ndarray]) -> bytes:
    """A picture of held-out images, the front's samples, and the teachers' samples at the front's guidance scales."""
    on_front = results.on_front
    scales = {row.values.get("guidance") for row in on_front}
    real = [(score.name, score) for score in scores if score.kind == REAL]
    students = [(f"#{row.trial.number}  {row.name}", row.score) for row in on_front if row.score]
    teachers = [(score.name, score) for score in results.teachers if score.guidance in scales]
    return pictures.comparison([(name, images[scores.index(s)]) for name, s in (*real, *students, *teachers)])


def heat_map(rows: Sequence[Row], metric: Metric, fields: tuple[str, str]) -> bytes | None:
    """Plot the best value per pair of values of two fields. Return None if a field has fewer than two values."""
    import pandas
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    down, across = fields
    cells = [(*map(row.values.get, fields), row.metrics[metric.name]) for row in rows]
    frame = pandas.DataFrame([cell for cell in cells if None not in cell], columns=["y", "x", "value"])
    frame[["y", "x"]] = frame[["y", "x"]].map(_plain)
    best = frame.drop_duplicates(["y", "x"]).pivot(index="y", columns="x", values="value")
    if min(best.shape) < 2:
        return None
    values = best.to_numpy(float)
    figure = Figure(figsize=(max(4.8, 1.7 + 0.95 * values.shape[1]), 1.5 + 0.6 * values.shape[0]), layout="constrained")
    axis = figure.subplots()
    norm = "log" if _is_wide(np.nanmin(values), np.nanmax(values)) else "linear"
    axis.imshow(values, cmap=_colours(metric, darkest=0.6), norm=norm, aspect="auto")
    for (y, x), value in np.ndenumerate(values):
        axis.text(x, y, "-" if np.isnan(value) else format(value, metric.format), ha="center", va="center")
    if metric.better:
        y, x = np.argwhere(values == frame["value"].iloc[0])[0]
        axis.add_patch(Rectangle((x - 0.47, y - 0.46), 0.94, 0.92, fill=False, edgecolor="#d62728", linewidth=2.5))
    axis.set_xticks(range(len(best.columns)), [text(x) for x in best.columns])
    axis.set_yticks(range(len(best.index)), [text(y) for y in best.index])
    titles = {**headings(fields), "guidance": "guidance scale w"}
    axis.set(xlabel=titles[across], ylabel=titles[down])
    axis.set_title(f"{metric.name.replace('/', ' ').replace('_', ' ')}{direction(metric)}", fontsize=10)
    return _png(figure)


def _colours(metric: Metric, darkest: float) -> Any:
    """A colour map: darker is better, and the worst value is visible on white. White if the metric has no direction."""
    import matplotlib as mpl
    from matplotlib.colors import ListedColormap

    colours = mpl.colormaps["YlGnBu"](np.linspace(0.12, darkest, 256)) if metric.better else ["white"]
    return ListedColormap(colours if metric.better == "higher" else colours[::-1]).with_extremes(bad="#eeeeee")


def front_plot(results: SweepResults, cost: Cost) -> bytes:
    """Plot quality against cost: every row as a dot, and the front as a line with the numbers of its trials.

    Stars show the teachers at the same guidance scales, and a dotted line shows held-out images.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure

    metric, on_front = results.metric, results.fronts[cost]
    figure = Figure(figsize=(5.4, 4.6), layout="constrained")
    axis: Any = figure.subplots()

    def points(rows: Sequence[Row]) -> tuple[list[Any], list[Any]]:
        return [row.cost(cost.name) for row in rows], [row.metrics[metric.name] for row in rows]

    style: Any = {"color": "#999999", "mfc": "none", "mec": "black", "markersize": 12}
    axis.plot(*points(on_front), "o-", label="front", **style)
    drawn = [row for row in results.ranked if row.cost(cost.name) is not None]
    scales = sorted({row.values.get("guidance") for row in drawn}, key=_sort_key)
    colours = dict(zip(scales, mpl.colormaps["plasma"](np.linspace(0, 0.9, len(scales))), strict=True))
    for w, colour in colours.items():
        own = points([row for row in drawn if row.values.get("guidance") == w])
        axis.plot(*own, "o", color=colour, label="trials" if w is None else f"w = {text(w)}")
    is_low_good = metric.better == "lower"
    for *point, row in zip(*points(on_front), on_front, strict=True):  # put labels on the empty side of the front
        offset: Any = {"xytext": (0, -20 if is_low_good else 10), "textcoords": "offset points", "ha": "center"}
        axis.annotate(f"#{row.trial.number}", point, weight="bold", fontsize=9, **offset)
    label: str | None = "teacher at the same w"
    for score in results.record.scores if results.record else ():
        value = score.metrics.get(metric.name)
        if value is not None and score.kind == REAL:
            axis.axhline(value, color="black", linewidth=0.8, linestyle=":", label=f"real images ({score.count:,})")
        elif (
            value is not None and score in results.teachers and score.guidance in colours and cost.name in score.metrics
        ):
            style = {"color": colours[score.guidance], "markersize": 13, "mec": "black", "label": label}
            axis.plot([score.metrics[cost.name]], [value], "*", **style)
            label = None  # the legend has one entry for all teachers
    for name in ("x", "y"):
        _log_if_wide(axis, name)
    if axis.get_xscale() == "linear":
        axis.locator_params(axis="x", integer=True)
    axis.set(xlabel=f"{cost.label} ({cost.better} is better)", ylabel=f"{metric.heading}{direction(metric)}")
    axis.margins(0.1, 0.15)
    if is_low_good and axis.get_yscale() == "linear":
        axis.set_ylim(bottom=0)
    axis.grid(alpha=0.25)
    axis.legend(fontsize=8, ncols=1 + len(scales) // 8)
    return _png(figure)


def _log_if_wide(axis: Any, name: str) -> None:
    """Make the x or y axis logarithmic if the plotted values span a wide range."""
    from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter

    if _is_wide(*getattr(axis.dataLim, f"interval{name}")):
        axis.set(**{f"{name}scale": "log"})
        getattr(axis, f"{name}axis").set(
            major_locator=LogLocator(subs=(1, 2, 5)),
            major_formatter=EngFormatter(sep=""),  # "50k", because long numbers would overlap
            minor_formatter=NullFormatter(),
        )


def _is_wide(low: float, high: float) -> bool:
    return low > 0 and high / low > LOG_RATIO


def parameter_plots(results: SweepResults) -> tuple[dict[str, Plot], str]:
    """Return Optuna's plots (parallel coordinates, importances) of the varied fields, and a note on missing plots."""
    import optuna
    from matplotlib import pyplot as plt
    from optuna.importance import FanovaImportanceEvaluator
    from optuna.visualization.matplotlib import plot_parallel_coordinate, plot_param_importances

    metric, plots = results.metric, {}
    rows = list({row.trial.number: row for row in reversed(results.ranked)}.values())  # the best row per trial
    columns = {name: [_plain(row.trial.values.get(name)) for row in rows] for name in results.varied}
    columns = {name: values for name, values in columns.items() if len(set(map(str, values))) > 1}
    if len(rows) < LEAST_TRIALS or not columns:
        return {}, (
            f"Plots of parameters are left out: they need {LEAST_TRIALS} finished trials with this metric, and a "
            "parameter that differs between the trials."
        )
    titles = headings(list(columns))
    distributions = {titles[name]: _distribution(values) for name, values in columns.items()}
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(direction="maximize" if metric.better == "higher" else "minimize")
    for number, row in enumerate(rows):
        params = {titles[name]: values[number] for name, values in columns.items()}
        value = row.metrics[metric.name]
        study.add_trial(optuna.trial.create_trial(params=params, distributions=distributions, value=value))
    options: Any = {"study": study, "params": list(distributions), "target_name": metric.heading}
    # Optuna changes pyplot's style, and warns that its plots are experimental.
    with plt.rc_context(), warnings.catch_warnings(action="ignore"):
        axis = plot_parallel_coordinate(**options)
        for lines in axis.collections:
            lines.set_cmap(_colours(metric, darkest=1.0))
            if lines.colorbar is not None:  # move the bar away from the last axis's tick labels
                bar = lines.colorbar.ax
                bar.set_position(bar.get_position().translated(0.07, 0))
        axis.set_title(f"{metric.heading}{direction(metric)}: one line per trial", fontsize=10, pad=14)
        caption = f"{metric.heading} and the parameters of every finished trial"
        size = (max(6.5, 1.7 * (len(columns) + 1)), 4.4)
        plots["parallel-coordinates"] = Plot(_png(axis.figure, size), caption, caption)
        plt.close(axis.figure)
        if len(columns) == 1 or len({row.metrics[metric.name] for row in rows}) == 1:
            return plots, "Importances are left out: they need two parameters, and different values of the metric."
        axis = plot_param_importances(**options, evaluator=FanovaImportanceEvaluator(seed=0))
        axis.set_title("", loc="left")
        axis.set(xlabel="importance (fANOVA, shares of 1)", ylabel="")
        caption = f"Share of the variance in {metric.heading} that each parameter explains"
        plots["importances"] = Plot(_png(axis.figure, (5.4, 1.2 + 0.45 * len(columns))), caption, caption)
        plt.close(axis.figure)
    return plots, ""


def _distribution(values: Sequence[Any]) -> Any:
    from optuna.distributions import CategoricalDistribution, FloatDistribution

    distinct = sorted(set(values), key=_sort_key)
    if len(distinct) <= MOST_CATEGORIES or any(isinstance(value, bool | str) for value in distinct):
        return CategoricalDistribution(distinct)
    low, middle, high = distinct[0], sorted(values)[len(values) // 2], distinct[-1]
    # Use a logarithmic scale if the median is closer to the geometric mean of the ends than to their arithmetic mean.
    is_log = low > 0 and abs(middle - (low * high) ** 0.5) < abs(middle - (low + high) / 2)
    return FloatDistribution(low, high, log=is_log)


def _plain(value: Any) -> Any:
    """The value as a type that Optuna accepts."""
    return value if isinstance(value, int | float | str) else "none" if value is None else str(value)


def _sort_key(value: Any) -> Any:
    """A sort key that puts numbers before text."""
    return isinstance(value, str), value


def _png(figure: Any, inches: tuple[float, float] | None = None) -> bytes:
    if inches:
        figure.set_size_inches(inches)
    sink = io.BytesIO()
    figure.savefig(sink, format="png", dpi=DPI, bbox_inches=None if figure.get_layout_engine() else "tight")
    return sink.getvalue()

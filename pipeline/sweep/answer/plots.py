"""Plots of a sweep's answer, as PNG bytes, with text that is readable on a phone."""

import io
from collections.abc import Sequence
from typing import Any

import numpy as np

from kac.metrics import Metric
from pipeline.evaluate.scores import REAL, Record, direction
from pipeline.sweep.answer.rows import COST, SPEED, Row, cost_of, headings, ranked, sort_key, text

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


def heat_map(rows: Sequence[Row], metric: Metric) -> bytes | None:
    """The best value per step count and guidance scale. None with fewer than two step counts or two scales."""
    from matplotlib.colors import LogNorm, Normalize
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
    norm = LogNorm(low, high) if low > 0 and high / low > LOG_RATIO else Normalize(low, high if high > low else low + 1)
    figure = Figure(figsize=(1.7 + 0.95 * len(across), 1.5 + 0.6 * len(down)), layout="constrained")
    axis = figure.subplots()
    image = axis.imshow(values, cmap=_colours(metric) if has_best else "Greys", norm=norm, aspect="auto")
    image.set_alpha(1.0 if has_best else 0.35)
    axis.set_facecolor("#eeeeee")
    for y, x in np.ndindex(values.shape):
        missing = np.isnan(values[y, x])
        red, green, blue, _ = image.cmap(norm(values[y, x])) if has_best and not missing else (1.0, 1.0, 1.0, 1.0)
        ink = "white" if 0.3 * red + 0.59 * green + 0.11 * blue < 0.5 else "black"
        axis.text(x, y, "-" if missing else format(values[y, x], metric.format), ha="center", va="center", color=ink)
    if has_best:
        find = np.nanargmax if metric.better == "higher" else np.nanargmin
        y, x = np.unravel_index(find(values), values.shape)
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


def front(rows: Sequence[Row], on_front: Sequence[Row], metric: Metric, cost: Metric, record: Record | None) -> bytes:
    """Quality against cost: every row as a dot, and the front as a line with the numbers of its trials."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.4, 4.6), layout="constrained")
    axis: Any = figure.subplots()
    marked = [(cost_of(row, cost), row.metrics[metric.name]) for row in on_front]
    axis.plot(*zip(*marked, strict=True), "-", color="#999999", linewidth=1.2, zorder=1, label="front")
    drawn = [row for row in ranked(rows, metric) if cost_of(row, cost) is not None]
    scales = sorted({row.guidance for row in drawn}, key=sort_key)
    colours = {w: f"C{number}" for number, w in enumerate(scales)} if len(scales) <= MOST_COLOURS else {}
    for w in scales if colours else []:
        own = [row for row in drawn if row.guidance == w]
        label = f"w = {text(w)}" if w is not None else "trials"
        axis.plot(*_coordinates(own, metric, cost), "o", color=colours[w], label=label, markersize=6, alpha=0.8)
    if not colours:  # a legend would fill the plot
        shades = [row.guidance if isinstance(row.guidance, int | float) else np.nan for row in drawn]
        dots = axis.scatter(*_coordinates(drawn, metric, cost), c=shades, cmap="plasma", s=36, label="trials", zorder=2)
        figure.colorbar(dots, ax=axis, label="guidance scale w")
    axis.plot(*zip(*marked, strict=True), "o", color="black", mfc="none", markersize=12)
    is_low_good = metric.better == "lower"
    for point, row in zip(marked, on_front, strict=True):  # labels on the empty side of the front
        offset: Any = {"xytext": (0, -20 if is_low_good else 10), "textcoords": "offset points", "ha": "center"}
        axis.annotate(f"#{row.trial.number}", point, weight="bold", fontsize=9, **offset)
    _draw_references(axis, metric, cost, record, {w: colours.get(w, "white") for w in scales})
    _scale_axes(axis, [row.metrics[metric.name] for row in drawn], cost, drawn, record)
    axis.set(xlabel=f"{COSTS.get(cost.name, cost.name)}{direction(cost)}", ylabel=_label(metric))
    axis.margins(0.1, 0.15)
    if is_low_good and axis.get_yscale() == "linear":
        axis.set_ylim(bottom=0)
    axis.grid(alpha=0.25)
    axis.legend(fontsize=8)
    return _png(figure)


def _coordinates(rows: Sequence[Row], metric: Metric, cost: Metric) -> tuple[list[Any], list[Any]]:
    return [cost_of(row, cost) for row in rows], [row.metrics[metric.name] for row in rows]


def _draw_references(axis: Any, metric: Metric, cost: Metric, record: Record | None, colours: dict[Any, str]) -> None:
    """Draw teachers of the same guidance scales as stars, held-out images as a line."""
    has_label = False
    for score in record.scores if record else ():
        if metric.name not in score.metrics:
            continue
        value = score.metrics[metric.name]
        if score.kind == REAL:
            axis.axhline(value, color="black", linewidth=0.8, linestyle=":", label=f"real images ({score.count:,})")
        elif score.kind == "teacher" and score.guidance in colours and cost.name in score.metrics:
            label = None if has_label else "teacher, of the same w"
            point = [score.metrics[cost.name]], [value]
            axis.plot(*point, "*", color=colours[score.guidance], markersize=13, label=label, mec="k")
            has_label = True


def _scale_axes(axis: Any, values: Sequence[float], cost: Metric, rows: Sequence[Row], record: Record | None) -> None:
    teachers = [s.metrics[cost.name] for s in (record.scores if record else ()) if cost.name in s.metrics]
    costs = [value for row in rows if (value := cost_of(row, cost))] + teachers
    if values and min(values) > 0 and max(values) / min(values) > LOG_RATIO:
        axis.set_yscale("log")
        _plain_ticks(axis.yaxis)
    if costs and min(costs) > 0 and max(costs) / min(costs) > LOG_RATIO:
        axis.set_xscale("log")
        _plain_ticks(axis.xaxis)
    if cost.name == COST and len(set(costs)) <= 8:
        axis.set_xticks(sorted(set(costs)), [f"{value:g}" for value in sorted(set(costs))])
        axis.set_xticks([], minor=True)


def _plain_ticks(axis: Any) -> None:
    from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter

    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(EngFormatter(sep=""))  # "50k", because long numbers would overlap
    axis.set_minor_formatter(NullFormatter())


def parameters(rows: Sequence[Row], fields: Sequence[str], metric: Metric) -> tuple[dict[str, bytes], str]:
    """Parallel coordinates and importances of the varied fields.

    Returns:
        The plots by name, and a note on missing plots; empty if none is missing.
    """
    best: dict[int, Row] = {}
    for row in ranked(rows, metric):
        best.setdefault(row.trial.number, row)
    names = [name for name in fields if len({str(row.trial.values.get(name)) for row in best.values()}) > 1]
    if len(best) < LEAST_TRIALS:
        return (
            {},
            f"Left out: plots of parameters need {LEAST_TRIALS} finished trials with this metric, not {len(best)}.",
        )
    if not names:
        return {}, "Left out: no parameter differs between the finished trials."
    study = _study(list(best.values()), names, metric)
    plots = {"parallel-coordinates": _parallel_coordinates(study, names, metric)}
    if len(names) == 1:
        return plots, "Importances are left out: only one parameter was varied."
    if len({row.metrics[metric.name] for row in best.values()}) == 1:
        return plots, "Importances are left out: all trials have the same value."
    return {**plots, "importances": _importances(study, names)}, ""


def _study(rows: Sequence[Row], names: Sequence[str], metric: Metric) -> Any:
    """An Optuna study of the rows, for Optuna's plots."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    values = {title: [_plain(row.trial.values.get(name)) for row in rows] for name, title in headings(names).items()}
    distributions = {name: _distribution(column) for name, column in values.items()}
    study = optuna.create_study(direction="maximize" if metric.better == "higher" else "minimize")
    for number, row in enumerate(rows):
        params = {name: column[number] for name, column in values.items()}
        study.add_trial(
            optuna.trial.create_trial(params=params, distributions=distributions, value=row.metrics[metric.name])
        )
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
    if all(isinstance(value, int) for value in values):
        return IntDistribution(low, high, log=is_log)
    return FloatDistribution(low, high, log=is_log)


def _plain(value: Any) -> Any:
    """The value as a type that Optuna accepts."""
    return value if isinstance(value, int | float | str) else "none" if value is None else str(value)


def _parallel_coordinates(study: Any, names: Sequence[str], metric: Metric) -> bytes:
    """One line per trial; darker is better."""
    import matplotlib as mpl
    import optuna.visualization.matplotlib as drawing
    from matplotlib import pyplot as plt

    with mpl.rc_context(), _no_warnings():
        plt.switch_backend("agg")
        fields = list(headings(names).values())
        axis = drawing.plot_parallel_coordinate(study, params=fields, target_name=metric.heading)
        for lines in axis.collections:
            lines.set_cmap(_colours(metric))
            if lines.colorbar is not None:  # away from the tick labels of the last axis
                bar = lines.colorbar.ax
                bar.set_position(bar.get_position().translated(0.07, 0))
        figure = axis.figure
        figure.set_size_inches(max(6.5, 1.7 * (len(names) + 1)), 4.4)
        axis.set_title(f"{_label(metric)}: one line per trial", fontsize=10, pad=14)
        data = _png(figure)
        plt.close(figure)
        return data


def _importances(study: Any, names: Sequence[str]) -> bytes:
    """Bars: the share of the metric's variance that each parameter explains."""
    from matplotlib.figure import Figure
    from optuna.importance import FanovaImportanceEvaluator, get_param_importances

    with _no_warnings():
        shares = get_param_importances(
            study, evaluator=FanovaImportanceEvaluator(seed=0), params=list(headings(names).values())
        )
    figure = Figure(figsize=(5.4, 1.2 + 0.45 * len(shares)), layout="constrained")
    axis = figure.subplots()
    bars = axis.barh(list(shares)[::-1], list(shares.values())[::-1], color="C0")
    axis.bar_label(bars, fmt="%.2f", padding=3)
    axis.set(xlabel="importance (fANOVA, shares of 1)", xlim=(0, 1.15 * max(shares.values())))
    return _png(figure)


def _no_warnings() -> Any:
    """Silence Optuna's warnings that these functions are experimental."""
    import warnings

    return warnings.catch_warnings(action="ignore")


def _label(metric: Metric) -> str:
    return f"{metric.heading}{direction(metric)}"


def _png(figure: Any) -> bytes:
    sink = io.BytesIO()
    figure.savefig(sink, format="png", dpi=DPI, bbox_inches=None if figure.get_layout_engine() else "tight")
    return sink.getvalue()

"""Pictures of a sweep's answer, as PNG bytes: small enough that their letters can be read on a phone."""

import io
from collections.abc import Sequence
from typing import Any

import numpy as np

from kac.metrics import Metric
from pipeline.evaluation.scores import REAL, Record, direction
from pipeline.sweep_answer.rows import COST, Row, cost_of, ranked, scale, text

DPI = 150
LOG_RATIO = 8.0
"""Values that differ by more than this factor are shown on a logarithmic scale."""

LEAST_TRIALS = 4
"""Finished trials from which on parallel coordinates and importances say anything."""


def heat_map(rows: Sequence[Row], metric: Metric) -> bytes | None:
    """Steps x guidance; of several trials at a place the best one. None if all lie on one line of it."""
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    best: dict[tuple[Any, Any], float] = {}
    for row in ranked(rows, metric):
        if row.steps is not None and row.guidance is not None:
            best.setdefault((row.steps, row.guidance), row.metrics[metric.name])
    down, across = (sorted({place[axis] for place in best}, key=scale) for axis in (0, 1))
    if len(down) < 2 or len(across) < 2:
        return None
    values = np.array([[best.get((steps, w), np.nan) for w in across] for steps in down])
    low, high = np.nanmin(values), np.nanmax(values)
    norm = LogNorm(low, high) if low > 0 and high / low > LOG_RATIO else None
    figure = Figure(figsize=(1.7 + 0.95 * len(across), 1.5 + 0.6 * len(down)), layout="constrained")
    axis = figure.subplots()
    colours = "YlGnBu" if metric.better == "higher" else "YlGnBu_r"  # dark is good
    image = axis.imshow(values, cmap=colours, norm=norm, aspect="auto")
    axis.set_facecolor("#eeeeee")
    for y, x in np.ndindex(values.shape):
        missing = np.isnan(values[y, x])
        red, green, blue, _ = image.cmap(image.norm(values[y, x])) if not missing else (1.0, 1.0, 1.0, 1.0)
        ink = "white" if 0.3 * red + 0.59 * green + 0.11 * blue < 0.5 else "black"
        axis.text(x, y, "-" if missing else format(values[y, x], metric.format), ha="center", va="center", color=ink)
    y, x = np.unravel_index((np.nanargmax if metric.better == "higher" else np.nanargmin)(values), values.shape)
    axis.add_patch(Rectangle((x - 0.47, y - 0.46), 0.94, 0.92, fill=False, edgecolor="#d62728", linewidth=2.5))
    axis.set_xticks(range(len(across)), [text(w) for w in across])
    axis.set_yticks(range(len(down)), [text(steps) for steps in down])
    axis.set(xlabel="guidance scale w", ylabel="steps")
    axis.set_title(_told(metric), fontsize=10)
    return _png(figure)


def front(rows: Sequence[Row], on_front: Sequence[Row], metric: Metric, cost: Metric, record: Record | None) -> bytes:
    """Quality against cost: every row, and the front, whose numbers are those of the table."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.4, 4.6), layout="constrained")
    axis: Any = figure.subplots()
    marked = [(cost_of(row, cost), row.metrics[metric.name]) for row in on_front]
    axis.plot(*zip(*marked, strict=True), "-", color="#999999", linewidth=1.2, zorder=1, label="front")
    drawn = [row for row in ranked(rows, metric) if cost_of(row, cost) is not None]
    for number, w in enumerate(sorted({row.guidance for row in drawn}, key=scale)):
        own = [row for row in drawn if row.guidance == w]
        label = f"w = {text(w)}" if w is not None else "trials"
        points = [[cost_of(row, cost) for row in own], [row.metrics[metric.name] for row in own]]
        axis.plot(*points, "o", color=f"C{number}", label=label, markersize=6, alpha=0.8)
    axis.plot(*zip(*marked, strict=True), "o", color="black", mfc="none", markersize=12)
    for place, row in zip(marked, on_front, strict=True):
        axis.annotate(
            f"#{row.trial.number}", place, xytext=(0, 9), textcoords="offset points", ha="center", weight="bold"
        )
    _draw_references(axis, metric, cost, record, {row.guidance for row in drawn})
    _scale_axes(axis, [row.metrics[metric.name] for row in drawn], cost, drawn, record)
    axis.set(xlabel=f"{cost.meaning or cost.name}{direction(cost)}", ylabel=_told(metric))
    axis.margins(0.1, 0.15)
    axis.grid(alpha=0.25)
    axis.legend(fontsize=8)
    return _png(figure)


def _draw_references(axis: Any, metric: Metric, cost: Metric, record: Record | None, scales: set[Any]) -> None:
    """Teachers of the same scales as stars, held-out images as a line."""
    for score in record.scores if record else ():
        if metric.name not in score.metrics:
            continue
        value = score.metrics[metric.name]
        if score.kind == REAL:
            axis.axhline(value, color="black", linewidth=0.8, linestyle=":", label=f"real images ({score.count:,})")
        elif score.kind == "teacher" and score.guidance in scales and cost.name in score.metrics:
            number = sorted(scales, key=scale).index(score.guidance)
            label = "teacher" if number == 0 else None
            axis.plot([score.metrics[cost.name]], [value], "*", color=f"C{number}", markersize=13, label=label, mec="k")


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
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    axis.set_minor_formatter(NullFormatter())


def parameters(rows: Sequence[Row], fields: Sequence[str], metric: Metric) -> tuple[dict[str, bytes], str]:
    """Parallel coordinates and importances of what was varied, by the name of the picture.

    Returns:
        The pictures, and why there are none or not all; empty if there are.
    """
    best: dict[int, Row] = {}
    for row in ranked(rows, metric):
        best.setdefault(row.trial.number, row)
    names = [name for name in fields if len({str(row.trial.values.get(name)) for row in best.values()}) > 1]
    if len(best) < LEAST_TRIALS:
        return {}, f"Left out: they need {LEAST_TRIALS} finished trials with this metric, found {len(best)}."
    if not names:
        return {}, "Left out: no parameter differs between the finished trials."
    study = _study(list(best.values()), names, metric)
    made = {"parallel-coordinates": _parallel_coordinates(study, names, metric)}
    if len(names) == 1:
        return made, "Importances are left out: one parameter was varied."
    if len({row.metrics[metric.name] for row in best.values()}) == 1:
        return made, "Importances are left out: all trials have the same value."
    return {**made, "importances": _importances(study, names)}, ""


def _study(rows: Sequence[Row], names: Sequence[str], metric: Metric) -> Any:
    """A study of Optuna's that holds what was found."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    distributions = {name: _distribution([row.trial.values.get(name) for row in rows]) for name in names}
    study = optuna.create_study(direction="maximize" if metric.better == "higher" else "minimize")
    for row in rows:
        params = {name: _param(row.trial.values.get(name), distributions[name]) for name in names}
        study.add_trial(
            optuna.trial.create_trial(params=params, distributions=distributions, value=row.metrics[metric.name])
        )
    return study


def _distribution(values: Sequence[Any]) -> Any:
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if any(isinstance(value, bool) or not isinstance(value, int | float) for value in values):
        return CategoricalDistribution([text(value) or "none" for value in sorted(set(values), key=scale)])
    low, high = min(values), max(values)
    is_log = bool(low > 0 and high / low > LOG_RATIO)
    if all(isinstance(value, int) for value in values):
        return IntDistribution(low, high, log=is_log)
    return FloatDistribution(low, high, log=is_log)


def _param(value: Any, distribution: Any) -> Any:
    from optuna.distributions import CategoricalDistribution

    return (text(value) or "none") if isinstance(distribution, CategoricalDistribution) else value


def _parallel_coordinates(study: Any, names: Sequence[str], metric: Metric) -> bytes:
    """One line a trial, dark where it is good."""
    import matplotlib as mpl
    import optuna.visualization.matplotlib as drawing
    from matplotlib import pyplot as plt

    with mpl.rc_context(), _no_warnings():
        plt.switch_backend("agg")
        axis = drawing.plot_parallel_coordinate(study, params=list(names), target_name=metric.heading)
        figure = axis.figure
        figure.set_size_inches(max(6.5, 1.9 * (len(names) + 1)), 4.4)
        axis.set_title(f"{_told(metric)}: one line a trial", fontsize=10)
        return _png(figure)


def _importances(study: Any, names: Sequence[str]) -> bytes:
    """Bars: the share of the differences in the metric that each parameter explains."""
    from matplotlib.figure import Figure
    from optuna.importance import FanovaImportanceEvaluator, get_param_importances

    with _no_warnings():
        found = get_param_importances(study, evaluator=FanovaImportanceEvaluator(seed=0), params=list(names))
    figure = Figure(figsize=(5.4, 1.2 + 0.45 * len(found)), layout="constrained")
    axis = figure.subplots()
    bars = axis.barh(list(found)[::-1], list(found.values())[::-1], color="C0")
    axis.bar_label(bars, fmt="%.2f", padding=3)
    axis.set(xlabel="importance (fANOVA, shares of 1)", xlim=(0, 1.15 * max(found.values())))
    return _png(figure)


def _no_warnings() -> Any:
    """Optuna says of each of these functions that it is experimental."""
    import warnings

    return warnings.catch_warnings(action="ignore")


def _told(metric: Metric) -> str:
    return f"{metric.heading}{direction(metric)}"


def _png(figure: Any) -> bytes:
    sink = io.BytesIO()
    figure.savefig(sink, format="png", dpi=DPI, bbox_inches=None if figure.get_layout_engine() else "tight")
    return sink.getvalue()

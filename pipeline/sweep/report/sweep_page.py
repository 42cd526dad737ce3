"""The HTML page of a sweep's report."""

import json
from collections.abc import Mapping, Sequence

from kac.metrics import Metric
from pipeline.config import SweepSpec
from pipeline.evaluate.scores import direction, provenance
from pipeline.report import page
from pipeline.sweep.report.sweep_plots import heat_map_name
from pipeline.sweep.report.sweep_report import COST, SPEED, Row, SweepReport
from pipeline.sweep.report.trial_table import ordered_rows, summary_lines, table

FRONT = (
    "A trial is on the front if no trial of the same or lower cost is better. Measured speeds within 10 % count as "
    "equal. The pictures and the tables number the trials alike."
)
SAMPLES = (
    "Each column has one noise and one label. The top row shows real images of that label; the last rows show the "
    "teachers."
)

HEAT_MAPS = "Each cell shows its best trial. Darker is better; the best cell has a frame."

PORTRAIT_COLUMNS = 14
"""Tables with more columns are printed in landscape."""


def make_page(
    spec: SweepSpec, report: SweepReport, plots: Mapping[str, bytes], notes: Mapping[str, str], tracking_uri: str
) -> bytes:
    """The content of the HTML file.

    Args:
        plots: by name.
        notes: on missing plots, by section.
    """

    def picture(name: str, alt: str, caption: str = "", is_wide: bool = False) -> str:
        return page.picture(plots[name], alt, caption, is_wide) if name in plots else ""

    metric = report.metric.heading
    by_cost = picture(f"front-{COST}", f"{metric} against network evaluations")
    by_speed = picture(f"front-{SPEED}", f"{metric} against images per second")
    front = []
    if report.on_front:
        fronts = page.pictures([by_cost, by_speed])
        trials = _table(report, report.on_front, report.main_columns)
        front = [page.heading("Quality against cost"), page.paragraph(FRONT), fronts, trials]
    samples = [
        page.heading("Samples of the front"),
        page.paragraph(SAMPLES),
        picture("samples", "samples of the front, with real images on top", is_wide=True),
    ]
    maps = [
        picture(heat_map_name(m), f"{m.heading} by steps and guidance", f"{m.meaning}{direction(m)}")
        for m in report.columns
    ]
    lines = f"{metric} and the parameters of every finished trial"
    bars = f"the share of the variance in {metric} that each parameter explains"
    all_trials = [page.heading("All trials"), _table(report, ordered_rows(report), report.columns)]
    is_wide = len(table(report, report.rows[:1], report.columns)[0]) > PORTRAIT_COLUMNS
    first, *others = summary_lines(report)
    parts = [
        *(page.paragraph(_capital(sentence), kind="lead") for sentence in others[:1]),
        page.paragraph(first),
        *(page.paragraph(sentence, kind="note") for sentence in others[1:]),
        *front,
        *(samples if "samples" in plots else []),
        page.heading("Steps x guidance"),
        *([page.paragraph(HEAT_MAPS), page.pictures(maps)] if any(maps) else []),
        *_note(notes["heat maps"]),
        page.heading("What the parameters do"),
        picture("parallel-coordinates", lines, _capital(lines), is_wide=True),
        picture("importances", bars, _capital(bars)),
        *_note(notes["parameters"]),
        page.landscape(all_trials) if is_wide else "".join(all_trials),
        *([page.paragraph(*provenance(report.record), kind="note")] if report.record else []),
        page.heading("Next steps"),
        page.paragraph("Evaluate the front with more samples and confidence intervals. Compare the runs in MLflow."),
        page.listing(f"{_evaluate_command(spec)}\n{page.mlflow_command(tracking_uri)}"),
        page.heading("Options"),
        page.listing(json.dumps(spec.model_dump(mode="json"), indent=2)),
    ]
    title = f"DistillKac: sweep {spec.out.rstrip('/').rsplit('/', 1)[-1]}"
    return page.page(title, [part for part in parts if part])


def _table(report: SweepReport, rows: Sequence[Row], metrics: Sequence[Metric]) -> str:
    heads, lines = table(report, rows, metrics)
    text_columns = {heads.index(name) for name in ("trial", "front", "status") if name in heads}
    marked = [number for number, row in enumerate(rows) if row is report.best]
    return page.table(heads, lines, text_columns, marked)


def _note(text: str) -> list[str]:
    return [page.paragraph(text, kind="note")] if text else []


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]


def _evaluate_command(spec: SweepSpec) -> str:
    """The command that evaluates the front with more samples. An evaluation inside the sweep's folder is refused."""
    out = f"{spec.out.rstrip('/')}-evaluation"
    return f"python -m jobs.evaluate --from-sweep {spec.out} --samples 10000 --seeds 5 --out {out}"

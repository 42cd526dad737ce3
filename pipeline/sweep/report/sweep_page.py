"""The HTML page of a sweep's report."""

import json
from collections.abc import Mapping, Sequence

from kac.metrics import Metric
from pipeline.config import SweepSpec
from pipeline.evaluate.scores import direction, provenance
from pipeline.report import page
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
    first, *others = summary_lines(report)
    all_trials = [page.heading("All trials"), _table(report, ordered_rows(report), report.columns)]
    is_wide = len(table(report, report.rows[:1], report.columns)[0]) > PORTRAIT_COLUMNS
    parts = [
        *(page.paragraph(sentence[0].upper() + sentence[1:], kind="lead") for sentence in others[:1]),
        page.paragraph(first),
        *(page.paragraph(sentence, kind="note") for sentence in others[1:]),
        *_front(report, plots),
        *_samples(plots),
        page.heading("Steps x guidance"),
        *_heat_maps(report, plots),
        *_note(notes["heat maps"]),
        page.heading("What the parameters do"),
        *_parameters(report, plots),
        *_note(notes["parameters"]),
        page.landscape(all_trials) if is_wide else "".join(all_trials),
        *([page.paragraph(*provenance(report.record), kind="note")] if report.record else []),
        page.heading("Next steps"),
        page.paragraph("Evaluate the front with more samples and confidence intervals. Compare the runs in MLflow."),
        page.listing(f"{_evaluate_command(spec)}\n{page.mlflow_command(tracking_uri)}"),
        page.heading("Options"),
        page.listing(json.dumps(spec.model_dump(mode="json"), indent=2)),
    ]
    return page.page(f"DistillKac: sweep {spec.out.rstrip('/').rsplit('/', 1)[-1]}", parts)


def _table(report: SweepReport, rows: Sequence[Row], metrics: Sequence[Metric]) -> str:
    heads, lines = table(report, rows, metrics)
    text_columns = {heads.index(name) for name in ("trial", "front", "status") if name in heads}
    marked = [number for number, row in enumerate(rows) if row is report.best]
    return page.table(heads, lines, text_columns, marked)


def _front(report: SweepReport, plots: Mapping[str, bytes]) -> list[str]:
    if not report.on_front:
        return []
    fronts = {f"front-{COST}": "network evaluations", f"front-{SPEED}": "images per second"}
    pictures = [
        page.picture(plots[name], f"{report.metric.heading} against {cost}")
        for name, cost in fronts.items()
        if name in plots
    ]
    trials = _table(report, report.on_front, report.main_columns)
    return [page.heading("Quality against cost"), page.paragraph(FRONT), page.pictures(pictures), trials]


def _samples(plots: Mapping[str, bytes]) -> list[str]:
    if "samples" not in plots:
        return []
    picture = page.picture(plots["samples"], "samples of the front, with real images on top", is_wide=True)
    return [page.heading("Samples of the front"), page.paragraph(SAMPLES), picture]


def _heat_maps(report: SweepReport, plots: Mapping[str, bytes]) -> list[str]:
    pictures = [
        page.picture(plots[name], f"{metric.heading} by steps and guidance", f"{metric.meaning}{direction(metric)}")
        for metric in report.columns
        if (name := f"heat-map-{metric.name.replace('/', '-')}") in plots
    ]
    lead = "Each cell shows its best trial. Darker is better; the best cell has a frame."
    return [page.paragraph(lead), page.pictures(pictures)] if pictures else []


def _parameters(report: SweepReport, plots: Mapping[str, bytes]) -> list[str]:
    titles = {
        "parallel-coordinates": f"{report.metric.heading} and the parameters of every finished trial",
        "importances": f"the share of the variance in {report.metric.heading} that each parameter explains",
    }
    return [
        page.picture(plots[name], title, title[0].upper() + title[1:], is_wide=name == "parallel-coordinates")
        for name, title in titles.items()
        if name in plots
    ]


def _note(text: str) -> list[str]:
    return [page.paragraph(text, kind="note")] if text else []


def _evaluate_command(spec: SweepSpec) -> str:
    """The command that evaluates the front with more samples. An evaluation inside the sweep's folder is refused."""
    out = f"{spec.out.rstrip('/')}-evaluation"
    return f"python -m jobs.evaluate --from-sweep {spec.out} --samples 10000 --seeds 5 --out {out}"

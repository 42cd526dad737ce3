"""The HTML page of a sweep's report."""

import json
from collections.abc import Mapping, Sequence

from kac.metrics import Metric
from pipeline.config import SweepSpec
from pipeline.evaluate.scores import provenance
from pipeline.report import page
from pipeline.sweep.report.sweep_plots import Plot
from pipeline.sweep.report.sweep_report import Row, SweepReport
from pipeline.sweep.report.trial_table import main_columns, ordered_rows, summary_lines, table

FRONT = (
    "A trial is on the front if no trial of the same or lower cost is better. Measured speeds within 10 % count as "
    "equal. The pictures and the tables number the trials alike."
)
SAMPLES = (
    "Each column has one noise and one label. The top row shows real images of that label; the last rows show the "
    "teachers."
)
HEAT_MAPS = "Each cell shows its best trial. Darker is better; the best cell has a frame."
NO_HEAT_MAPS = "Left out: heat maps need finished trials of two step counts and two guidance scales."

PORTRAIT_COLUMNS = 14
"""Tables with more columns are printed in landscape."""


def make_page(spec: SweepSpec, report: SweepReport, plots: Mapping[str, Plot], note: str, tracking_uri: str) -> bytes:
    """The content of the HTML file.

    Args:
        plots: by file name.
        note: on missing plots of parameters.
    """

    def drawn(prefix: str, is_wide: bool = False) -> list[str]:
        return [page.picture(*plot, is_wide) for name, plot in plots.items() if name.startswith(prefix)]

    counts, best, *failures = summary_lines(report)
    parts = [page.paragraph(best[0].upper() + best[1:], kind="lead"), page.paragraph(counts)]
    parts += [page.paragraph(failure, kind="note") for failure in failures]
    if report.on_front:
        parts += [page.heading("Quality against cost"), page.paragraph(FRONT), page.pictures(drawn("front-"))]
        parts.append(_table(report, report.on_front, main_columns(report)))
    if samples := drawn("samples", is_wide=True):
        parts += [page.heading("Samples of the front"), page.paragraph(SAMPLES), *samples]
    parts.append(page.heading("Steps x guidance"))
    maps = drawn("heat-map-")
    parts += [page.paragraph(HEAT_MAPS), page.pictures(maps)] if maps else [page.paragraph(NO_HEAT_MAPS, kind="note")]
    parts += [page.heading("What the parameters do"), *drawn("parallel-coordinates", is_wide=True)]
    parts += [*drawn("importances"), *([page.paragraph(note, kind="note")] if note else [])]
    all_trials = [page.heading("All trials"), _table(report, ordered_rows(report), report.columns)]
    is_wide = len(table(report, report.rows[:1], report.columns)[0]) > PORTRAIT_COLUMNS
    parts += [page.landscape(all_trials)] if is_wide else all_trials
    parts += [page.paragraph(*provenance(report.record), kind="note")] if report.record else []
    out = spec.out.rstrip("/")  # the command below cannot write into it
    command = f"python -m jobs.evaluate --from-sweep {spec.out} --samples 10000 --seeds 5 --out {out}-evaluation"
    parts += [
        page.heading("Next steps"),
        page.paragraph("Evaluate the front with more samples and confidence intervals. Compare the runs in MLflow."),
        page.listing(f"{command}\n{page.mlflow_command(tracking_uri)}"),
        page.heading("Options"),
        page.listing(json.dumps(spec.model_dump(mode="json"), indent=2)),
    ]
    return page.page(f"DistillKac: sweep {out.rsplit('/', 1)[-1]}", parts)


def _table(report: SweepReport, rows: Sequence[Row], metrics: Sequence[Metric]) -> str:
    heads, lines = table(report, rows, metrics)
    text_columns = {heads.index(name) for name in ("trial", "front", "status") if name in heads}
    return page.table(heads, lines, text_columns, [number for number, row in enumerate(rows) if row is report.best])

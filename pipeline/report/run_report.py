"""Report: one self-contained HTML page of a finished run."""

import json

from kac.util import files
from pipeline import tracking
from pipeline.evaluate.model_runs import CURVE_PICTURE, SAMPLES_PICTURE
from pipeline.evaluate.scores import Record, direction, head, provenance, read_record, row
from pipeline.report import page

LEAD = (
    "The first row is held-out real images: what a perfect model would show. Samples of all models are from the same "
    "noise; w is the guidance scale."
)


def mlflow_command(uri: str) -> str:
    """How to look at the runs."""
    if uri.startswith("sqlite:"):
        return f"mlflow ui --backend-store-uri {uri}"
    return f"open {tracking.without_password(uri)} in a browser"


def write_report(out: str, title: str, evaluation: str, specs: dict[str, str], tracking_uri: str) -> None:
    """Write the page ``out`` from an evaluation folder.

    Args:
        specs: heading -> JSON file with the options of a stage.
        tracking_uri: where the runs are.
    """
    record = read_record(evaluation)
    samples, curve = (files.read_bytes(files.join(evaluation, name)) for name in (SAMPLES_PICTURE, CURVE_PICTURE))
    parts = [
        page.paragraph(LEAD),
        page.table(head(record), [row(record, score) for score in record.scores]),
        page.paragraph(*provenance(record), kind="note"),
        page.heading("Samples"),
        page.paragraph("The same noise and label in each column; real images of that label on top."),
        page.picture(samples, "samples of every model", _columns(record), is_wide=True),
        page.heading("Quality against cost"),
        page.picture(curve, "quality by network evaluations", is_wide=True),
        page.heading("Every metric"),
        _metrics(record),
        page.heading("Compare the runs in MLflow"),
        page.listing(mlflow_command(tracking_uri)),
        page.heading("Options"),
        *(part for name, path in specs.items() for part in (page.heading(name, 3), page.listing(_options(path)))),
    ]
    files.write_bytes(out, page.page(f"DistillKac: {title}", parts))


def _columns(record: Record) -> str:
    """The classes of the columns of the picture; empty if the record does not say."""
    names = dict(enumerate(record.class_names))
    told = [f"{label} {names[label]}" if label in names else str(label) for label in record.shown_labels]
    return f"Classes from left to right: {', '.join(told)}." if told else ""


def _metrics(record: Record) -> str:
    """One line a metric, with its meaning and every row's value."""
    lines = []
    for name, metric in record.metrics().items():
        values = [format(s.metrics[name], metric.format) if name in s.metrics else "" for s in record.scores]
        lines.append([name, f"{metric.meaning}{direction(metric)}", *values])
    return page.table(["metric", "meaning", *(score.name for score in record.scores)], lines, texts=(0, 1))


def _options(path: str) -> str:
    return json.dumps(json.loads(files.read_bytes(path)), indent=2)

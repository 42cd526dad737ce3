"""The HTML page of an evaluation."""

import json

from kac.util import files
from pipeline.evaluate.scores import (
    CURVE_PICTURE,
    SAMPLES_PICTURE,
    Record,
    direction,
    head,
    provenance,
    read_record,
    row,
)
from pipeline.report import page

LEAD = (
    "The first row shows the scores of held-out real images, which a perfect model would reach. All models start from "
    "the same noise; w is the guidance scale."
)


def write_evaluation_page(out: str, title: str, evaluation: str, specs: dict[str, str], tracking_uri: str) -> None:
    """Write the page ``out`` from the folder of an evaluation.

    Args:
        specs: heading -> JSON file with the options of a stage.
        tracking_uri: of the MLflow server or file with the runs.
    """
    record = read_record(evaluation)
    samples, curve = (files.read_bytes(files.join(evaluation, name)) for name in (SAMPLES_PICTURE, CURVE_PICTURE))
    parts = [
        page.paragraph(LEAD),
        page.table(head(record), [row(record, score) for score in record.scores]),
        page.paragraph(*provenance(record), kind="note"),
        page.heading("Samples"),
        page.paragraph("Each column has one noise and one label. The top row shows real images of that label."),
        page.picture(samples, "samples of every model", _column_classes(record), is_wide=True),
        page.heading("Quality against cost"),
        page.picture(curve, "quality by network evaluations", is_wide=True),
        page.heading("All metrics"),
        _metrics_table(record),
        page.heading("Compare the runs in MLflow"),
        page.listing(page.mlflow_command(tracking_uri)),
        page.heading("Options"),
        *(part for name, path in specs.items() for part in (page.heading(name, 3), page.listing(_options(path)))),
    ]
    files.write_bytes(out, page.page(f"DistillKac: {title}", parts))


def _column_classes(record: Record) -> str:
    """A sentence with the classes of the picture's columns; empty without labels in the record."""
    names = dict(enumerate(record.class_names))
    classes = [f"{label} {names[label]}" if label in names else str(label) for label in record.shown_labels]
    return f"Classes from left to right: {', '.join(classes)}." if classes else ""


def _metrics_table(record: Record) -> str:
    """One line per metric, with its meaning and the value of every row."""
    lines = []
    for name, metric in record.metrics().items():
        values = [format(s.metrics[name], metric.format) if name in s.metrics else "" for s in record.scores]
        lines.append([name, f"{metric.meaning}{direction(metric)}", *values])
    return page.table(["metric", "meaning", *(score.name for score in record.scores)], lines, texts=(0, 1))


def _options(path: str) -> str:
    return json.dumps(json.loads(files.read_bytes(path)), indent=2)

"""The HTML page of an evaluation."""

import json

from kac.util import files
from pipeline.evaluate.results import CURVE_PICTURE, SAMPLES_PICTURE
from pipeline.evaluate.scores import cells, direction, provenance, read_record
from pipeline.report import page

LEAD = (
    "The first row shows the scores of held-out real images, which a perfect model would reach. All models start from "
    "the same noise; w is the guidance scale."
)


def write_evaluation_page(out: str, title: str, evaluation: str, specs: dict[str, str], tracking_uri: str) -> None:
    """Write the page ``out`` from the results in the folder ``evaluation``.

    Args:
        specs: JSON files with the options of each stage, by heading.
        tracking_uri: address of the MLflow server or database that has the runs.
    """
    record = read_record(evaluation)
    samples, curve = (files.read_bytes(files.join(evaluation, name)) for name in (SAMPLES_PICTURE, CURVE_PICTURE))
    names = dict(enumerate(record.class_names))
    classes = [f"{label} {names[label]}" if label in names else str(label) for label in record.shown_labels]
    caption = f"Classes from left to right: {', '.join(classes)}." if classes else ""
    metrics = []
    for name, metric in record.metrics().items():
        values = [format(s.metrics[name], metric.format) if name in s.metrics else "" for s in record.scores]
        metrics.append([name, f"{metric.meaning}{direction(metric)}", *values])
    parts = [
        page.paragraph(LEAD),
        page.table(*cells(record)),
        page.paragraph(*provenance(record), kind="note"),
        page.heading("Samples"),
        page.paragraph("In each column, noise and label are the same. The top row shows real images of that label."),
        page.picture(samples, "samples of every model", caption, is_wide=True),
        page.heading("Quality against cost"),
        page.picture(curve, "quality by network evaluations", is_wide=True),
        page.heading("All metrics"),
        page.table(["metric", "meaning", *(score.name for score in record.scores)], metrics, texts=(0, 1)),
        page.heading("Compare the runs in MLflow"),
        page.listing(page.mlflow_command(tracking_uri)),
        page.heading("Options"),
    ]
    for name, path in specs.items():
        parts += [page.heading(name, 3), page.listing(json.dumps(json.loads(files.read_bytes(path)), indent=2))]
    files.write_bytes(out, page.page(f"DistillKac: {title}", parts))

"""Report: one self-contained HTML page of a finished run."""

import base64
import html
import json

from kac import files
from kac.metrics import Metric
from pipeline.evaluation.model_runs import CURVE_PICTURE, SAMPLES_PICTURE
from pipeline.evaluation.scores import Record, head, provenance, read_record, row

PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>DistillKac: {title}</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222 }}
table {{ border-collapse: collapse }}
th, td {{ padding: .25rem .75rem; text-align: right; border-bottom: 1px solid #ddd }}
th:first-child, td:first-child {{ text-align: left }} img {{ max-width: 100% }}
pre {{ background: #f6f6f6; padding: 1rem; overflow-x: auto }}
</style></head><body>
<h1>DistillKac: {title}</h1>
<p>The first row is held-out real images: what a perfect model would show. Samples of all models are from the same
noise; w is the guidance scale.</p>
{table}
<p>{provenance}</p>
<h2>Samples</h2><p>The same noise and label in each column; real images of that label on top.</p>
<img alt="samples of every model" src="{samples_picture}">
<h2>Quality against cost</h2><img alt="quality by network evaluations" src="{curve_picture}">
<h2>Every metric</h2>{metrics}
<h2>Compare the runs in MLflow</h2><pre>{mlflow}</pre>
<h2>Options</h2>{options}
</body></html>
"""


def mlflow_command(uri: str) -> str:
    """How to look at the runs."""
    return f"mlflow ui --backend-store-uri {uri}" if uri.startswith("sqlite:") else f"open {uri} in a browser"


def write_report(out: str, title: str, evaluation: str, specs: dict[str, str], tracking_uri: str) -> None:
    """Write the page ``out`` from an evaluation folder.

    Args:
        specs: heading -> JSON file with the options of a stage.
        tracking_uri: where the runs are.
    """
    record = read_record(evaluation)
    page = PAGE.format(
        title=html.escape(title),
        table=_table(head(record), [row(record, score) for score in record.scores]),
        provenance="<br>".join(map(html.escape, provenance(record))),
        metrics=_metrics(record),
        samples_picture=_inline(files.join(evaluation, SAMPLES_PICTURE)),
        curve_picture=_inline(files.join(evaluation, CURVE_PICTURE)),
        mlflow=html.escape(mlflow_command(tracking_uri)),
        options="\n".join(_options(heading, path) for heading, path in specs.items()),
    )
    files.write_bytes(out, page.encode())


def _direction(metric: Metric) -> str:
    return f" ({metric.better} is better)" if metric.better else ""


def _table(heads: list[str], rows: list[list[str]]) -> str:
    cells = [f"<tr>{''.join(f'<th>{html.escape(cell)}</th>' for cell in heads)}</tr>"]
    cells += [f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in row)}</tr>" for row in rows]
    return f"<table>{''.join(cells)}</table>"


def _metrics(record: Record) -> str:
    """One line a metric, with its meaning and every row's value."""
    lines = []
    for name, metric in record.metrics().items():
        values = [format(s.metrics[name], metric.format) if name in s.metrics else "" for s in record.scores]
        lines.append([name, f"{metric.meaning}{_direction(metric)}", *values])
    return _table(["metric", "meaning", *(score.name for score in record.scores)], lines)


def _inline(path: str) -> str:
    return "data:image/png;base64," + base64.b64encode(files.read_bytes(path)).decode()


def _options(heading: str, path: str) -> str:
    text = json.dumps(json.loads(files.read_bytes(path)), indent=2)
    return f"<h3>{html.escape(heading)}</h3><pre>{html.escape(text)}</pre>"

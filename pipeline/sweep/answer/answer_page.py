"""The HTML page of a sweep's answer."""

import json
from collections.abc import Mapping

from pipeline.config import SweepSpec
from pipeline.evaluate.scores import direction, provenance
from pipeline.report import page
from pipeline.report.run_report import mlflow_command
from pipeline.sweep.answer.table import Answer, cells, head, ordered_rows, summary_lines

FRONT = (
    "A trial is on the front if no trial of the same or lower cost is better. Measured speeds within 10 % count as "
    "equal. The pictures and the tables number the trials alike."
)


PORTRAIT_COLUMNS = 14
"""Tables with more columns are printed in landscape."""


def make_page(
    spec: SweepSpec, answer: Answer, drawn: Mapping[str, bytes], notes: Mapping[str, str], tracking_uri: str
) -> bytes:
    """The content of the HTML file.

    Args:
        drawn: plots by name.
        notes: on missing plots, by section.
    """
    first, *others = summary_lines(answer)
    parts = [
        *(page.paragraph(sentence[0].upper() + sentence[1:], kind="lead") for sentence in others[:1]),
        page.paragraph(first),
        *(page.paragraph(sentence, kind="note") for sentence in others[1:]),
        *_front(answer, drawn),
        *_samples(drawn),
        page.heading("Steps x guidance"),
        *_heat_maps(answer, drawn, notes),
        page.heading("What the parameters do"),
        *_parameters(answer, drawn, notes),
        _all_trials(answer),
        *([page.paragraph(*provenance(answer.record), kind="note")] if answer.record else []),
        page.heading("Next steps"),
        page.paragraph("Evaluate the front with more samples and confidence intervals. Compare the runs in MLflow."),
        page.listing(f"{evaluate_command(spec)}\n{mlflow_command(tracking_uri)}"),
        page.heading("Options"),
        page.listing(json.dumps(spec.model_dump(mode="json"), indent=2)),
    ]
    return page.page(f"DistillKac: sweep {spec.out.rstrip('/').rsplit('/', 1)[-1]}", parts)


def evaluate_command(spec: SweepSpec) -> str:
    """The command that evaluates the front with more samples. An evaluation inside the sweep's folder is refused."""
    out = f"{spec.out.rstrip('/')}-evaluation"
    return f"python -m jobs.evaluate --from-sweep {spec.out} --samples 10000 --seeds 5 --out {out}"


def _table(answer: Answer, only_front: bool) -> str:
    rows = answer.on_front if only_front else ordered_rows(answer)
    columns = answer.main_columns if only_front else answer.columns
    heads = head(answer, columns)
    text_columns = {heads.index(name) for name in ("trial", "front", "status") if name in heads}
    marked = [number for number, row in enumerate(rows) if row is answer.best]
    return page.table(heads, [cells(answer, row, columns) for row in rows], text_columns, marked)


def _all_trials(answer: Answer) -> str:
    parts = [page.heading("All trials"), _table(answer, only_front=False)]
    is_wide = len(head(answer, answer.columns)) > PORTRAIT_COLUMNS
    return page.landscape(parts) if is_wide else "".join(parts)


def _front(answer: Answer, drawn: Mapping[str, bytes]) -> list[str]:
    if not answer.on_front:
        return []
    fronts = {"front-nfe": "network evaluations", "front-images_per_second": "images per second"}
    plots = [
        page.picture(drawn[name], f"{answer.metric.heading} against {cost}")
        for name, cost in fronts.items()
        if name in drawn
    ]
    return [
        page.heading("Quality against cost"),
        page.paragraph(FRONT),
        page.pictures(plots),
        _table(answer, only_front=True),
    ]


def _samples(drawn: Mapping[str, bytes]) -> list[str]:
    if "samples" not in drawn:
        return []
    return [
        page.heading("Samples of the front"),
        page.paragraph(
            "Each column has one noise and one label. The top row shows real images of that label; the last rows show "
            "the teachers."
        ),
        page.picture(drawn["samples"], "samples of the front, with real images on top", is_wide=True),
    ]


def _heat_maps(answer: Answer, drawn: Mapping[str, bytes], notes: Mapping[str, str]) -> list[str]:
    names = {f"heat-map-{metric.name.replace('/', '-')}": metric for metric in answer.columns}
    plots = [
        page.picture(drawn[name], f"{metric.heading} by steps and guidance", f"{metric.meaning}{direction(metric)}")
        for name, metric in names.items()
        if name in drawn
    ]
    if not plots:
        return [page.paragraph(notes["heat maps"], kind="note")]
    lead = "Each cell shows its best trial. Darker is better; the best cell has a frame."
    return [page.paragraph(lead), page.pictures(plots)]


def _parameters(answer: Answer, drawn: Mapping[str, bytes], notes: Mapping[str, str]) -> list[str]:
    titles = {
        "parallel-coordinates": f"{answer.metric.heading} and the parameters of every finished trial",
        "importances": f"the share of the variance in {answer.metric.heading} that each parameter explains",
    }
    plots = [
        page.picture(drawn[name], title, title[0].upper() + title[1:], is_wide=name == "parallel-coordinates")
        for name, title in titles.items()
        if name in drawn
    ]
    return [*plots, *([page.paragraph(notes["parameters"], kind="note")] if notes["parameters"] else [])]

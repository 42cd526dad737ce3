"""The page of a sweep's answer."""

import json
from collections.abc import Mapping

from kac.util import files
from pipeline.config.specs import SweepSpec
from pipeline.evaluate.scores import direction, provenance
from pipeline.report import page
from pipeline.report.run_report import mlflow_command
from pipeline.sweep.answer.table import Answer, head, in_order, line, told

FRONT = (
    "A trial is on the front if none is better at no higher cost. Measured speeds within 10 % count as equal. The "
    "number of a trial in the pictures is that in the tables."
)


PORTRAIT_COLUMNS = 14
"""Tables of more columns are printed across."""


def make_page(
    spec: SweepSpec, answer: Answer, drawn: Mapping[str, bytes], notes: Mapping[str, str], tracking_uri: str
) -> bytes:
    """The page's file.

    Args:
        drawn: the pictures by name. notes: why some are left out, by the part that they belong to.
    """
    first, *others = told(answer)
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
        page.heading("Go on"),
        page.paragraph("Judge the front again, with more samples and intervals; compare the runs in MLflow:"),
        page.listing(f"{judge_again(spec)}\n{mlflow_command(tracking_uri)}"),
        page.heading("Options"),
        page.listing(json.dumps(spec.model_dump(mode="json"), indent=2)),
    ]
    return page.page(f"DistillKac: sweep {spec.out.rstrip('/').rsplit('/', 1)[-1]}", parts)


def judge_again(spec: SweepSpec) -> str:
    """The command that judges the front with more samples."""
    again = files.join(spec.out, "evaluation-again")
    return f"python -m jobs.evaluate --from-sweep {spec.out} --samples 10000 --seeds 5 --out {again}"


def _table(answer: Answer, on_front_alone: bool) -> str:
    rows = answer.on_front if on_front_alone else in_order(answer)
    columns = answer.main_columns if on_front_alone else answer.columns
    heads = head(answer, columns)
    places = {heads.index(name) for name in ("trial", "front", "status") if name in heads}
    marked = [number for number, row in enumerate(rows) if row is answer.best]
    return page.table(heads, [line(answer, row, columns) for row in rows], places, marked)


def _all_trials(answer: Answer) -> str:
    parts = [page.heading("All trials"), _table(answer, on_front_alone=False)]
    is_wide = len(head(answer, answer.columns)) > PORTRAIT_COLUMNS
    return page.across(parts) if is_wide else "".join(parts)


def _front(answer: Answer, drawn: Mapping[str, bytes]) -> list[str]:
    if not answer.on_front:
        return []
    fronts = {"front-nfe": "network evaluations", "front-images_per_second": "images a second"}
    found = [
        page.picture(drawn[name], f"{answer.metric.heading} against {cost}")
        for name, cost in fronts.items()
        if name in drawn
    ]
    return [
        page.heading("Quality against cost"),
        page.paragraph(FRONT),
        page.pictures(found),
        _table(answer, on_front_alone=True),
    ]


def _samples(drawn: Mapping[str, bytes]) -> list[str]:
    if "samples" not in drawn:
        return []
    return [
        page.heading("Samples of the front"),
        page.paragraph("The same noise and label in each column; real images of that label on top, teachers below."),
        page.picture(drawn["samples"], "samples of the front, with real images on top", is_wide=True),
    ]


def _heat_maps(answer: Answer, drawn: Mapping[str, bytes], notes: Mapping[str, str]) -> list[str]:
    names = {f"heat-map-{metric.name.replace('/', '-')}": metric for metric in answer.columns}
    found = [
        page.picture(drawn[name], f"{metric.heading} by steps and guidance", f"{metric.meaning}{direction(metric)}")
        for name, metric in names.items()
        if name in drawn
    ]
    if not found:
        return [page.paragraph(notes["heat maps"], kind="note")]
    lead = "The best trial at each place, dark where it is good; the best place has a frame."
    return [page.paragraph(lead), page.pictures(found)]


def _parameters(answer: Answer, drawn: Mapping[str, bytes], notes: Mapping[str, str]) -> list[str]:
    titles = {
        "parallel-coordinates": f"{answer.metric.heading} and the parameters of every finished trial",
        "importances": f"how much of the differences in {answer.metric.heading} each parameter explains",
    }
    found = [
        page.picture(drawn[name], title, title[0].upper() + title[1:], is_wide=name == "parallel-coordinates")
        for name, title in titles.items()
        if name in drawn
    ]
    return [*found, *([page.paragraph(notes["parameters"], kind="note")] if notes["parameters"] else [])]

"""The report of an evaluation is one self-contained page."""

import html
from pathlib import Path

import pytest

from pipeline.config import EvaluateSpec
from pipeline.evaluate.scores import read_record
from pipeline.evaluate.stage import evaluate
from pipeline.report.evaluation_page import write_evaluation_page


@pytest.fixture
def evaluation(tmp_path: Path, teacher: str, student: str) -> Path:
    out = tmp_path / "evaluation"
    evaluate(EvaluateSpec(teacher=teacher, students=(student,), out=str(out), samples=50, solver_steps=8, actors=0))
    return out


def test_the_report_is_self_contained(evaluation: Path, student: str, tmp_path: Path):
    page = tmp_path / "report.html"
    sections = {"distill": str(Path(student) / "spec.json")}
    write_evaluation_page(str(page), "a <test>", str(evaluation), sections, "sqlite:////somewhere/mlflow.db")
    text = page.read_text()
    assert text.count("data:image/png;base64,") == 2
    assert 'src="http' not in text and "href=" not in text
    for part in (
        "a &lt;test&gt;",
        "mlflow ui --backend-store-uri sqlite:////somewhere/mlflow.db",
        "learning_rate",
        "two",
        *(html.escape(metric.meaning) for metric in read_record(str(evaluation)).metrics().values()),
    ):
        assert part in text

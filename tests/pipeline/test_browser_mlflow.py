"""MLflow's own pages in a real browser: nested runs, curves, quality by learning rate, and the registered model."""

import itertools
import json
import re
from collections.abc import Iterator
from typing import Any

import pytest
from mlflow import MlflowClient

from pipeline import tracking
from pipeline.config import OptimizerConfig, SweepSpec
from pipeline.sweep import sweep
from tests.pipeline.test_browser import CHROMIUM, sync_api
from tests.pipeline.tracking_servers import mlflow_server

pytestmark = [pytest.mark.browser, pytest.mark.skipif(not CHROMIUM.exists(), reason=f"no Chromium at {CHROMIUM}")]

RATES = ("1e-3", "2e-3", "4e-3", "8e-3")
WAIT_MS = 60_000


@pytest.fixture(scope="module")
def pages(small_store: str, ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Any, str]]:
    """A browser page, and the address of an MLflow server with one sweep of four learning rates."""
    folder = tmp_path_factory.mktemp("browser")
    backend = f"sqlite:///{folder / 'mlflow.db'}"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", backend)
        tracking.connect(backend)
        sweep(
            SweepSpec(
                store=small_store,
                out=str(folder / "rates"),
                steps=(2,),
                grid={"optimizer.learning_rate": RATES},
                optimizer=OptimizerConfig(updates=100, batch_size=64),
                samples=64,
                features=("pixels",),
                register="digits",
            )
        )
    with mlflow_server(folder, backend) as uri, sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=str(CHROMIUM), args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1600, "height": 1000})
        page.set_default_timeout(WAIT_MS)
        yield page, uri
        browser.close()


@pytest.fixture(scope="module")
def experiment(pages: tuple[Any, str]) -> str:
    experiment = MlflowClient(pages[1]).get_experiment_by_name(tracking.experiment_name())
    return str(experiment.experiment_id)


@pytest.fixture(scope="module")
def children(pages: tuple[Any, str], experiment: str) -> list[str]:
    client = MlflowClient(pages[1])
    (parent,) = client.search_runs([experiment], f"tags.`{tracking.STAGE_TAG}` = 'sweep'")
    below = client.search_runs([experiment], f"tags.`mlflow.parentRunId` = '{parent.info.run_id}'")
    return [run.info.run_id for run in below]


def test_the_runs_of_trials_are_nested_below_their_sweep(pages: tuple[Any, str], experiment: str, children: list[str]):
    assert len(children) == len(RATES), "only the trials are nested"
    page, uri = pages
    page.goto(f"{uri}/#/experiments/{experiment}/runs")
    row = page.locator(".ag-row").filter(has_text="sweep")
    row.locator("button").first.click()
    page.wait_for_function(f"document.querySelectorAll('.ag-center-cols-container .ag-row').length >= {2 + len(RATES)}")
    names = page.locator("[col-id='attributes.`Run Name`'] a").all_inner_texts()
    assert sorted(name for name in names if name.startswith("steps-2")) == [
        f"steps-2-guidance-0.0-optimizer-learning-rate-{rate}" for rate in RATES
    ]
    text = page.inner_text("body")
    assert "store (" in text and "python -" in text, "the page shows data and command"


def test_quality_against_a_learning_rate_over_four_children(
    pages: tuple[Any, str], experiment: str, children: list[str]
):
    page, uri = pages
    query = f"runs={json.dumps(children)}&experiments={json.dumps([experiment])}".replace(" ", "")
    page.goto(f"{uri}/#/compare-runs?{query}")
    page.get_by_text(f"Comparing {len(RATES)} Runs").wait_for()
    page.get_by_role("tab", name="Scatter Plot").click()
    for axis, name in (("x", "optimizer.learning_rate"), ("y", "frechet_distance_pixels")):
        page.locator(f"#{axis}-axis-selector").click()
        page.get_by_role("option", name=name, exact=True).click()
    title = page.locator(".js-plotly-plot .xtitle")
    title.wait_for()
    assert title.text_content() == "optimizer.learning_rate"
    assert page.locator(".js-plotly-plot .ytitle").text_content() == "frechet_distance_pixels"
    # The points are drawn on a canvas, so the test reads them from Plotly.
    drawn = page.evaluate("document.querySelector('.js-plotly-plot').data.map(trace => [trace.x, trace.y])")
    rates, distances = (list(itertools.chain.from_iterable(values)) for values in zip(*drawn, strict=True))
    assert sorted(map(float, rates)) == [float(rate) for rate in RATES]
    assert len(set(distances)) == len(RATES)


def test_the_page_of_the_best_model_shows_its_run_and_signature(pages: tuple[Any, str]):
    page, uri = pages
    page.goto(f"{uri}/#/models/digits/versions/1")
    for text in ("best", re.compile("^steps-2-guidance-0.0-optimizer"), "distillkac.store"):
        page.get_by_text(text).first.wait_for()
    for text in ("Inputs (1)", "Outputs (1)"):
        page.get_by_text(text).wait_for()


def test_the_page_of_a_trial_shows_its_curves_and_metrics(pages: tuple[Any, str], experiment: str, children: list[str]):
    page, uri = pages
    page.goto(f"{uri}/#/experiments/{experiment}/runs/{children[0]}/model-metrics")
    for name in ("loss/endpoint", "validation/energy_distance"):
        page.get_by_text(f"({name})").wait_for()
    assert page.locator(".js-plotly-plot").count() >= 2
    page.goto(f"{uri}/#/experiments/{experiment}/runs/{children[0]}")
    for name in ("frechet_distance_pixels", "nfe", "flops_per_call"):
        page.get_by_text(name, exact=True).wait_for()

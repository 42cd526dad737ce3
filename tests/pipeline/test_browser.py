"""The report of a sweep in a real browser: texts, counts and widths on a phone, on a desktop and in print."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.pipeline.sweeps import grid
from tests.pipeline.test_sweep_report import failed, report_run

CHROMIUM = Path("/usr/bin/chromium")

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
pytestmark = [pytest.mark.browser, pytest.mark.skipif(not CHROMIUM.exists(), reason=f"no Chromium at {CHROMIUM}")]


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of a grid of 16 trials with one failed trial."""
    out = tmp_path_factory.mktemp("sweeps") / "digits"
    trials = grid(out)
    trials[6] = failed(trials[6], "loss is <nan> after update 312")
    report_run(out, trials)
    return out / "report.html"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=str(CHROMIUM), args=["--no-sandbox"])
        yield started
        started.close()


@pytest.mark.parametrize("width", [390, 1280])
def test_the_report_is_complete_and_fits_the_screen(browser: Any, report: Path, width: int):
    requests: list[str] = []
    page = browser.new_page(viewport={"width": width, "height": 844})
    page.on("request", lambda request: requests.append(request.url))
    page.goto(report.as_uri())
    assert [url for url in requests if not url.startswith(("file:", "data:"))] == [], "the page loads no other files"
    assert page.title() == page.inner_text("h1") == "DistillKac: sweep digits"
    assert [heading.inner_text() for heading in page.query_selector_all("h2")] == [
        "Quality against cost",
        "Samples of the front",
        "Steps x guidance",
        "What the parameters do",
        "All trials",
        "Next steps",
        "Options",
    ]
    text = page.inner_text("body")
    assert "Best by FD classifier (lower is better): #14 steps-20-guidance-1.0 with" in text
    assert "16 trials: 15 finished, 1 failed" in text
    assert "failed: #6 steps-2-guidance-1.0: loss is <nan> after update 312" in text
    front, trials = page.query_selector_all("table")
    assert len(front.query_selector_all("tbody tr")) == 4
    assert len(trials.query_selector_all("tbody tr")) == 16
    assert trials.query_selector("tr.marked").inner_text().startswith("steps-20-guidance-1.0")
    pictures = page.query_selector_all("img")
    assert len(pictures) == 2 + 1 + 16 + 2, "fronts, samples, heat maps, parameters"
    assert all(picture.evaluate("image => image.naturalWidth") > 300 for picture in pictures)
    assert all(picture.get_attribute("alt") for picture in pictures)
    width_of_page = page.evaluate("document.documentElement.scrollWidth")
    assert width_of_page <= width, "only tables and wide pictures scroll, inside their own boxes"
    page.close()


def test_nothing_is_cut_off_in_print(browser: Any, report: Path):
    """The widest table fits the landscape pages, which are 273 mm wide."""
    page = browser.new_page(viewport={"width": round(273 / 25.4 * 96), "height": 700})
    page.emulate_media(media="print")
    page.goto(report.as_uri())
    assert page.evaluate("document.documentElement.scrollWidth") <= round(273 / 25.4 * 96)
    pages = re.findall(rb"/MediaBox\s*\[\s*0\s+0\s+(\d+)", page.pdf(prefer_css_page_size=True))
    assert {b"841", b"594"} >= set(pages) >= {b"841"}
    page.close()

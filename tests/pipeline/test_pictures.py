"""Sheets of samples: the position and the colours of each image."""

import io

import numpy as np
from PIL import Image

from kac.metrics import quality_metrics
from pipeline.evaluate.scores import Score
from pipeline.report.pictures import CELL, GAP, comparison, quality_by_nfe, sheet


def pixels(png: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(png)))


def test_a_sheet_shows_delivered_bytes():
    images = np.linspace(-1, 1, 12 * 3 * 8 * 8, dtype=np.float32).reshape(12, 3, 8, 8)
    shown, side = pixels(sheet(images)), CELL + GAP
    assert shown.shape == (2 * side, 10 * side, 3)
    tenth = shown[side : side + CELL : CELL // 8, side : side + CELL : CELL // 8]
    assert (tenth == np.floor(np.moveaxis(images[11], 0, -1) * 127.5 + 128).clip(0, 255)).all()
    assert (shown[side:, 2 * side :] == 255).all()


def test_a_folder_name_is_no_formula():
    metric = quality_metrics(["pixels"])["frechet_distance_pixels"]
    score = {"fingerprint": "", "count": 5}
    real = Score(name="real images", kind="real", steps=None, guidance=None, metrics={metric.name: 0.3}, **score)
    metrics = {metric.name: 0.1, "nfe": 2.0}
    student = Score(name="s", kind="student", steps=2, guidance=0.0, any_step="v$a_{$", metrics=metrics, **score)
    assert quality_by_nfe([metric], [real, student]).startswith(b"\x89PNG")


def test_grey_images_and_points_have_rows_with_titles():
    for samples in (np.full((4, 1, 28, 28), -1, np.float32), np.zeros((4, 2), np.float32)):
        rows = [("real images", samples), ("teacher w=0", samples[:2])]
        shown = pixels(comparison(rows))
        dark = (shown < 128).all(-1)
        half = len(shown) // 2
        assert dark[:half].sum() > dark[half:].sum() > 0

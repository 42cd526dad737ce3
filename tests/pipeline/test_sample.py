"""Sample: images of a model, and requests that a student refuses."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kac.util.errors import ArgumentError
from pipeline.config import SampleSpec
from pipeline.sample import sample
from tests.pipeline.stores import make_teacher


@pytest.mark.parametrize("kind", ["teacher", "student"])
def test_samples_are_images_of_the_requested_labels(kind: str, teacher: str, student: str, tmp_path: Path):
    model, out = {"teacher": teacher, "student": student}[kind], tmp_path / "samples.npz"
    sample(SampleSpec(model=model, out=str(out), count=5, labels=(1, 0)))
    with np.load(out) as made:
        assert made["labels"].tolist() == [1, 0, 1, 0, 1]
        assert made["images"].shape == (5, 2)
        assert made["images"].dtype == np.float32
        first = made["images"][:2]
    sample(SampleSpec(model=model, out=str(tmp_path / "more.npz"), count=700, labels=(1, 0)))
    with np.load(tmp_path / "more.npz") as made:
        np.testing.assert_allclose(made["images"][:2], first, atol=1e-5)
    sample(SampleSpec(model=model, out=str(tmp_path / "sheet.png"), count=3))
    assert (tmp_path / "sheet.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    "options",
    [{"labels": (2,)}, {"steps": 3}, {"guidance": 1.0}, {"solver": "heun"}],
    ids=["labels", "steps", "guidance", "solver"],
)
def test_samples_that_a_student_cannot_draw_are_refused(options: dict[str, Any], student: str, tmp_path: Path):
    with pytest.raises(ArgumentError) as error:
        sample(SampleSpec(model=student, out=str(tmp_path / "x.npz"), **options))
    assert [error.value.name] == list(options)


def test_images_are_rounded_to_8_bits_unless_raw(tmp_path: Path):
    model = make_teacher(tmp_path / "digits", "digits")
    made = {}
    for raw in (False, True):
        out = str(tmp_path / f"{raw}.npz")
        sample(SampleSpec(model=model, out=out, count=20, steps=4, raw=raw))
        with np.load(out) as found:
            made[raw] = found["images"]
    assert np.abs(made[True]).max() > 1
    np.testing.assert_array_equal(made[False], np.floor(made[True] * 127.5 + 128).clip(0, 255) / np.float32(127.5) - 1)
    with pytest.raises(ArgumentError, match="`raw`"):
        sample(SampleSpec(model=model, out=str(tmp_path / "x.png"), raw=True))

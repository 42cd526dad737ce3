"""Each stage writes only to its own folder, whatever characters the folder's name has, on a disk and on S3."""

import os
from pathlib import Path

import pytest

from kac.util import files
from pipeline.config import EvaluateSpec, SampleSpec, StudySpec, SweepSpec
from pipeline.distill import distill
from pipeline.evaluate.evaluate_stage import evaluate
from pipeline.rollout import rollout
from pipeline.sample import sample
from pipeline.store.merge import MergeSpec, merge
from pipeline.store.verify import VerifySpec, verify
from pipeline.study import study
from pipeline.sweep import sweep
from pipeline.teach import teach
from tests.pipeline.s3_server import FaultyS3, environment
from tests.pipeline.stages import distill_spec, teach_spec
from tests.pipeline.stores import make_spec

# Set during collection, before any test starts Ray, because the workers inherit this environment.
os.environ.update(environment())

BUCKET = "stage-names"
NAME = "run[1] #?%25 a::b ü*"
NEIGHBOURS = ["run1 #?%25 a::b üx", "run[1] ", "run[1] #?% a::b ü*", "run1"]
"""Names that would be reached if ``NAME`` were used as a pattern, decoded or cut."""


@pytest.fixture(scope="module")
def bucket(s3_server: FaultyS3) -> str:
    s3_server.client().create_bucket(Bucket=BUCKET)
    return BUCKET


@pytest.fixture(params=["disk", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path, bucket: str) -> str:
    """An empty folder on the disk or an empty prefix on S3."""
    return str(tmp_path) if request.param == "disk" else f"s3://{bucket}/{tmp_path.name}"


@pytest.fixture
def neighbours(place: str) -> dict[str, bytes]:
    """Files of other training runs, whose names must not be mistaken for ``NAME``."""
    there = {
        files.join(place, f"{neighbour}/{model}/training/{below}"): neighbour.encode()
        for neighbour in NEIGHBOURS
        for model in ("teacher", "student")
        for below in ("state.pt", "checkpoint_0/state.pt")
    }
    for path, data in there.items():
        files.write_bytes(path, data)
    return there


def test_every_stage_in_a_folder_with_a_strange_name(
    place: str, neighbours: dict[str, bytes], ray_cluster: None
) -> None:
    root = files.join(place, NAME)
    teacher, store, student = (f"{root}/{name}" for name in ("teacher", "store", "student"))
    teach(teach_spec(Path(".")).model_copy(update={"out": teacher}))
    for first, where in ((0, store), (64, f"{root}/other store")):
        rollout(make_spec(where, teacher, trajectories=64, first_sample=first))
    merge(MergeSpec(stores=(store, f"{root}/other store"), into=f"{root}/merged[1]"))
    assert verify(VerifySpec(store=f"{root}/merged[1]")).is_whole
    distill(distill_spec(store, Path(".")).model_copy(update={"out": student}))
    students = (student,)
    evaluate(EvaluateSpec(teacher=teacher, students=students, out=f"{root}/e?", samples=40, solver_steps=4, actors=0))
    study(StudySpec(teacher=teacher, store=store, students=students, out=f"{root}/s*", claims=("speed",), samples=40))
    sample(SampleSpec(model=student, out=f"{root}/sample[1].png", count=2))
    made = set(files.list_sizes(root))
    assert {"teacher/config.json", "student/config.json", "e?/evaluation.json", "s*/study.json"} <= made
    assert {"store/manifest.json", "merged[1]/manifest.json", "sample[1].png"} <= made
    assert [name for name in made if "training/" in name or name.rsplit("/", 1)[-1].startswith(".")] == []
    assert {path: files.read_bytes(path) for path in neighbours} == neighbours


def test_training_on_ray_in_a_folder_with_a_strange_name(
    place: str, neighbours: dict[str, bytes], ray_cluster: None
) -> None:
    """Ray Train keeps two checkpoints, and removes the older ones by itself."""
    root = files.join(place, NAME)
    teacher, store = f"{root}/teacher", f"{root}/store"
    spec = teach_spec(Path("."), workers=1, checkpoint_updates=10).model_copy(update={"out": f"{root}//teacher/"})
    teach(spec)
    rollout(make_spec(store, teacher, trajectories=64, actors=1))
    small = {"optimizer": spec.optimizer, "samples": 40, "features": ("pixels",)}
    sweep(SweepSpec(store=store, out=f"{root}/sweep[1]", steps=(1, 2), **small))
    made = set(files.list_sizes(root))
    assert {"teacher/config.json", "store/manifest.json", "sweep[1]/trials.json"} <= made
    assert "sweep[1]/evaluation/evaluation.json" in made
    assert [name for name in made if "training/" in name] == []
    assert {path: files.read_bytes(path) for path in neighbours} == neighbours

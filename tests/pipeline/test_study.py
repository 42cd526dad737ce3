"""Study: each claim is measured once or left out with a reason, and all inputs must belong to the same teacher."""

import json
import math
import runpy
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from kac.losses import FlowMapConfig
from kac.model import load_config, load_model, save_model
from kac.networks import MLPConfig, build_network
from kac.path import PathConfig
from kac.util.errors import ArgumentError, DistillKacError
from pipeline import store, tracking
from pipeline.config import CLAIMS, StudySpec
from pipeline.distill import distill
from pipeline.store.layout import KINETIC_ENERGY, SAMPLE_ID
from pipeline.study import study
from pipeline.tracking.metrics import SYSTEM_PREFIX
from tests.pipeline.stages import FEW, distill_spec, runs_of
from tests.pipeline.stores import make_teacher

GAUSSIAN = PathConfig(kind="gaussian")
COSTS = ("teaching", "rollout", "training", "total")
RIVALS = ("gaussian (rival)", "gaussian (repeat)")


def small(teacher: str, out: Path, **options: Any) -> StudySpec:
    return StudySpec(**{"samples": 60, "batch_size": 40, **options}, teacher=teacher, out=str(out))


@pytest.fixture(scope="module")
def rival(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_teacher(tmp_path_factory.mktemp("rivals") / "rival", seed=1, path_config=GAUSSIAN)


@pytest.fixture(scope="module")
def whole(teacher: str, small_store: str, student: str, rival: str, tmp_path_factory: pytest.TempPathFactory):
    """The spec of a finished study of all claims on the moons. Both rivals have the same path."""
    out, folder = tmp_path_factory.mktemp("studies") / "study", tmp_path_factory.mktemp("others")
    repeat = make_teacher(folder / "repeat", seed=2, path_config=GAUSSIAN)
    spec = small(teacher, out, store=small_store, students=(student,), rivals=(rival, repeat))
    study(spec)
    return spec


def claims_of(spec: StudySpec) -> dict[str, Any]:
    return json.loads((Path(spec.out) / "study.json").read_text())["claims"]


def test_a_study_measures_every_claim(whole: StudySpec):
    found = claims_of(whole)
    assert tuple(found) == CLAIMS
    assert not [claim for claim in found if found[claim]["found"].startswith("left out")]
    assert (Path(whole.out) / "paths.md").read_text().count("| gaussian | 2 |") == 2
    for claim in CLAIMS:
        assert (Path(whole.out) / f"{claim}.png").read_bytes().startswith(b"\x89PNG")
    knots = found["stability"]["values"]["two"]
    assert [knot["t"] for knot in knots] == [1, 0.5, 0]
    assert all(knot["error"] <= knot["certain"] + 1e-6 for knot in knots)
    assert found["speed"]["values"]["limit"] == 11
    assert set(found["speed"]["values"]["models"]) == {"teacher", "two", *RIVALS}
    assert set(found["solver"]["values"]) == {"held_out", "teacher", *RIVALS}
    assert set(found["plane"]["values"]) == {"teacher", *RIVALS}
    assert [point["guidance"] for point in found["guidance"]["values"]["teacher"]] == [0, 0.5, 1, 2, 4, 7, 10]
    assert [knot["t"] for knot in found["marginals"]["values"]["knots"]] == [1, 0.75, 0.5, 0.25, 0]
    assert len(found["plane"]["values"]["teacher"]["t"]) == 8  # one per solver step of the store


def test_paths_are_compared_by_mean_and_range_over_repeats(whole: StudySpec):
    found = claims_of(whole)["paths"]["values"]
    assert {path: len(repeats) for path, repeats in found["models"].items()} == {
        "kac a=25 c=5 quadratic": 1,
        "gaussian": 2,
    }
    first, second = found["models"]["gaussian"].values()
    for name in ("frechet_distance_pixels_heun_20", "kid_classifier_to_held_out", "memorisation", "lipschitz"):
        values = first[name], second[name]
        expected = {"mean": sum(values) / 2, "lowest": min(values), "highest": max(values), "repeats": 2}
        assert found["paths"]["gaussian"][name] == pytest.approx(expected)
    assert "percent_beyond" not in {*first, *found["paths"]["gaussian"]}
    assert "percent_beyond" in found["paths"]["kac a=25 c=5 quadratic"]
    solver = claims_of(whole)["solver"]["values"]["gaussian (rival)"]
    distances = {f"{point['method']}_{point['steps']}": point["distances"]["pixels"] for point in solver}
    assert {name: first[f"frechet_distance_pixels_{name}"] for name in distances} == distances


def test_the_command_takes_two_rivals(teacher: str, rival: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    other = make_teacher(tmp_path / "other", path_config=PathConfig(a=9, c=3, clock="linear"))
    command = f"study --teacher {teacher} --rivals {rival} {other} --claims speed --samples 40 --out {tmp_path / 'out'}"
    monkeypatch.setattr(sys, "argv", command.split())
    runpy.run_module("jobs.study", run_name="__main__")
    found = json.loads((tmp_path / "out" / "study.json").read_text())["claims"]
    assert list(found["speed"]["values"]["models"]) == ["teacher", "gaussian", "kac a=9 c=3 linear"]


def test_a_study_of_one_gaussian_rival_keeps_its_earlier_fingerprint(teacher: str, rival: str, tmp_path: Path):
    spec = small(teacher, tmp_path / "out", rivals=(rival,), claims=("speed",))
    study(spec)
    ours, theirs = (load_config(path).weights_sha256 for path in (teacher, rival))
    earlier = spec.fingerprint(teacher=ours, students={}, rival=theirs)
    assert json.loads((tmp_path / "out" / "study.json").read_text())["fingerprint"] == earlier


def test_metrics_pictures_and_inputs_are_in_mlflow(whole: StudySpec, teacher: str, student: str):
    (run,) = (r for r in runs_of("study") if r.data.tags.get(f"{tracking.INPUT_TAG}student.two"))
    assert run.data.tags[f"{tracking.INPUT_TAG}student.two"] == load_config(student).fingerprint
    assert run.data.tags[f"{tracking.INPUT_TAG}teacher"] == load_config(teacher).weights_sha256
    found, logged = claims_of(whole), run.data.metrics
    speed = found["speed"]["values"]["models"]["gaussian (rival)"]
    assert logged["speed/share_beyond/gaussian _rival_"] == speed["share_beyond"]
    assert logged["stability/image_error/two"] == found["stability"]["values"]["two"][-1]["error"]
    assert all(math.isfinite(value) for value in logged.values())
    of_claims = {name for name in logged if not name.startswith(SYSTEM_PREFIX)}
    assert {name.partition("/")[0] for name in of_claims} == set(CLAIMS)
    artifacts = {file.path for file in MlflowClient().list_artifacts(run.info.run_id)}
    assert artifacts == {"study.json", *(f"{claim}.png" for claim in CLAIMS), "paths.md", "compute.md"}


def test_a_complete_study_is_not_repeated(whole: StudySpec, capsys: pytest.CaptureFixture[str], monkeypatch):
    monkeypatch.setattr("pipeline.study.MEASURES", {})
    lines = study(whole)
    assert lines == {claim: entry["found"] for claim, entry in claims_of(whole).items()}
    assert f"{whole.out} is complete" in capsys.readouterr().out
    with pytest.raises(DistillKacError, match=r"samples.* 60"):
        study(whole.model_copy(update={"samples": 61}))


def test_a_claim_without_its_inputs_is_left_out_with_a_reason(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    gaussian = make_teacher(tmp_path / "digits", "digits", path_config=GAUSSIAN)
    claims = ("paths", "plane", "speed", "stability", "memorisation", "marginals", "compute")
    lines = study(small(gaussian, tmp_path / "out", claims=claims))
    assert lines == {
        "stability": "left out: no `students`",
        "speed": "left out: the teacher's path has no speed limit",
        "memorisation": "left out: no `store`",
        "marginals": "left out: no `store`",
        "plane": "left out: the samples are not points of the plane",
        "paths": "left out: no `rivals`",
        "compute": "left out: no `store`",
    }
    assert f"{'speed'.ljust(12)}  {lines['speed']}" in capsys.readouterr().out
    assert not list((tmp_path / "out").glob("*.png"))


def test_the_total_compute_includes_the_students_that_a_student_was_initialised_from(
    teacher: str, small_store: str, student: str, tmp_path: Path
):
    """The store has 400 trajectories of 8 solver steps without guidance. The first student used 60 x 64 rows."""
    taught, lost = shutil.copytree(teacher, tmp_path / "taught"), shutil.copytree(student, tmp_path / "lost")
    optimizer = {"updates": 100, "batch_size": 8}
    (taught / "spec.json").write_text(json.dumps({"stage": "teach", "options": {"optimizer": optimizer}}))
    record = json.loads((lost / "spec.json").read_text())
    record["options"]["init"] = str(tmp_path / "missing")
    (lost / "spec.json").write_text(json.dumps(record))
    options: dict[str, Any] = {"refine": {"kind": "data", "spaces": ("pixels",), "steps": (1, 1, 2, 4)}}
    options |= {"objective": FlowMapConfig(pairs="long"), "optimizer": FEW.model_copy(update={"updates": 5})}
    distill(distill_spec(small_store, tmp_path / "refined", init=student, **options))
    students = (student, str(tmp_path / "refined"), str(lost))
    spec = small(str(taught), tmp_path / "out", store=small_store, students=students, claims=("compute",))
    line = study(spec)["compute"]
    found = claims_of(spec)["compute"]["values"]
    costs = {(p["model"], p["steps"]): [p[name] for name in COSTS] for p in found["points"]}
    # The refined student has 5 x 64 samples of 1 + (1 + 1 + 2 + 4) / 4 calls.
    refined = 3 * 60 * 64 + 3 * 3 * 5 * 64
    assert costs == {
        ("teacher w=0", 8): [2400, 0, 0, 2400],
        ("two", 2): [2400, 3200, 3 * 60 * 64, 2400 + 3200 + 3 * 60 * 64],
        **{("refined", steps): [2400, 3200, refined, 2400 + 3200 + refined] for steps in (1, 2, 4)},
        ("lost", 2): [2400, None, None, None],
    }
    # The probability of a pair is proportional to its length, so the mean length is 50 / 20 of 4 knots.
    two, own = 60 * 64 * 4, 5 * 64 * 8 * 50 / 80
    assert found["teacher_in_the_loop"] == pytest.approx({"two": two, "refined": two + own}, rel=1e-3)
    assert (found["rollout"], found["pays_from"]) == (3200, 1)
    assert line.endswith("the store pays for itself from 1 student on")
    table = (tmp_path / "out" / "compute.md").read_text()
    assert "| model | steps | FD pixels | FD classifier | teaching | rollout | training | total |" in table
    assert "| 2.4 k | 3.2 k | 11.5 k | 17.1 k |" in table
    assert "| 2.4 k | - | - | - |" in table


def test_the_total_of_a_teacher_made_elsewhere_leaves_out_teaching(whole: StudySpec):
    table = (Path(whole.out) / "compute.md").read_text()
    assert "total without teaching" in table
    assert "| - | 3.2 k | 11.5 k | 14.7 k |" in table


def test_a_wrong_rival_is_refused(teacher: str, rival: str, tmp_path: Path):
    copy, wide = tmp_path / "copy", tmp_path / "wide"
    shutil.copytree(rival, copy)
    config = load_config(rival)
    wide_network = MLPConfig(width=16, depth=1)
    network = build_network(wide_network, config.sample_shape, config.num_classes)
    save_model(str(wide), config.model_copy(update={"network": wide_network}), network.state_dict())
    for wrong, message in (
        (teacher, "`rivals` .* is the same model"),
        (str(copy), "`rivals` .*copy is the same model"),
        (make_teacher(tmp_path / "gaussians", "gaussians", path_config=GAUSSIAN), "`rivals` .*data is"),
        (str(wide), r"`rivals` .*wide .*network\.width is 16 instead of 8"),
    ):
        with pytest.raises(ArgumentError, match=message):
            study(small(teacher, tmp_path / "out", rivals=(rival, wrong)))
    for name, updates in (("a", 100), ("b", 200)):
        folder = tmp_path / name
        make_teacher(folder, path_config=GAUSSIAN if name == "b" else None)
        (folder / "spec.json").write_text(json.dumps({"options": {"optimizer": {"updates": updates, "batch_size": 8}}}))
    with pytest.raises(ArgumentError, match=r"`rivals` .*updates is 200 instead of 100"):
        study(small(str(tmp_path / "a"), tmp_path / "out", rivals=(str(tmp_path / "b"),)))
    options = {"optimizer": {"updates": 100, "batch_size": 8}, "init": str(tmp_path / "a")}
    (tmp_path / "b" / "spec.json").write_text(json.dumps({"options": options}))
    with pytest.raises(ArgumentError, match=r"`rivals` .*training samples is 1600 instead of 800"):
        study(small(str(tmp_path / "a"), tmp_path / "out", rivals=(str(tmp_path / "b"),)))


def test_a_bounded_teacher_can_have_rivals_without_a_speed_limit(teacher: str, rival: str, tmp_path: Path):
    config = load_config(teacher)
    network = config.network.model_copy(update={"bounded": True})
    bounded = str(tmp_path / "bounded")
    save_model(bounded, config.model_copy(update={"network": network}), load_model(teacher).network.state_dict())
    study(small(bounded, tmp_path / "out", rivals=(rival,), claims=("speed",)))
    models = json.loads((tmp_path / "out" / "study.json").read_text())["claims"]["speed"]["values"]["models"]
    assert models.keys() == {"teacher", "gaussian"}
    assert models["teacher"]["share_beyond"] == 0


def test_students_and_stores_of_a_different_teacher_are_refused(student: str, small_store: str, tmp_path: Path):
    other = make_teacher(tmp_path / "other", seed=5)
    with pytest.raises(DistillKacError, match=f"{student} .*another teacher"):
        study(small(other, tmp_path / "out", students=(student,)))
    with pytest.raises(DistillKacError, match=f"{small_store} .*another teacher"):
        study(small(other, tmp_path / "out", store=small_store))


def test_a_student_whose_steps_do_not_divide_the_teachers_is_left_out(
    teacher: str, small_store: str, student: str, tmp_path: Path
):
    three = tmp_path / "three"
    shutil.copytree(student, three)
    config = json.loads((three / "config.json").read_text())
    (three / "config.json").write_text(json.dumps({**config, "steps": 3}))
    options = {"students": (student, str(three)), "store": small_store, "claims": ("stability",)}
    line = study(small(teacher, tmp_path / "out", **options))["stability"]
    assert line.startswith("two: error")
    assert line.endswith("three: left out, because its 3 steps do not divide the teacher's 8")
    # Without a store, the teacher's number of steps is a multiple of the student's.
    line = study(small(teacher, tmp_path / "free", students=(str(three),), claims=("stability",)))["stability"]
    assert line.startswith("three: error")


def test_claims_are_sorted_without_repeats_and_all_selects_every_claim():
    assert StudySpec(teacher="t", out="o", claims=("solver", "all")).claims == CLAIMS
    assert StudySpec(teacher="t", out="o", claims=("solver", "speed", "speed")).claims == ("speed", "solver")
    with pytest.raises(ArgumentError, match=r"`claims` .*'fame'"):
        StudySpec(teacher="t", out="o", claims=("fame",))


def test_first_reads_the_first_rows_of_a_store_by_sample_id(small_store: str):
    opened = store.open(small_store)
    rows = opened.first(150, 1.0, [SAMPLE_ID, KINETIC_ENERGY, "knot_04"])  # 150 rows of two shards of 128
    assert rows[SAMPLE_ID].tolist() == list(range(150))
    whole = next(opened.batches(400, 1.0, [4]))
    assert (whole.knots[:150, 0] == rows["knot_04"]).all()
    assert (rows[KINETIC_ENERGY] > 0).all()
    assert len(opened.first(1000, 0.0, [SAMPLE_ID])[SAMPLE_ID]) == 400

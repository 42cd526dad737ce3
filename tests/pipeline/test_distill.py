"""Distill: what a student learns, its initial weights, and refusals before anything is written."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mlflow import MlflowClient

from kac import model as models
from kac.data import open_dataset
from kac.data.in_memory import in_memory
from kac.losses import EndpointConfig, EndpointObjective, LossTerms
from kac.losses.refinement import RefinementLoss, energy_distance
from kac.model import load_config, load_model
from kac.sampling import Sampling, generate, initial_noise, student_sampling, teacher_sampling
from kac.solvers import GRIDS
from kac.study.subject import Watched
from kac.util.errors import DistillKacError
from pipeline import store, tracking
from pipeline.config import DistillSpec, SampleSpec
from pipeline.distill import distill
from pipeline.sample import sample
from pipeline.teach import teach
from tests.pipeline.stages import FEW, SMALL, distill_spec, run_of, teach_spec
from tests.pipeline.stores import make_store, make_teacher


def test_a_student_ends_closer_than_the_teachers_euler_steps(small_store: str, teacher: str, tmp_path: Path):
    longer = FEW.model_copy(update={"updates": 600})
    distill(distill_spec(small_store, tmp_path / "student", steps=1, optimizer=longer))
    batch = next(store.open(small_store).batches(400, 0.0, [0, 4]))
    errors = {}
    for name, path in (("teacher", teacher), ("student", str(tmp_path / "student"))):
        network = load_model(path).network
        with torch.inference_mode():
            x = batch.knots[:, 0] - network(batch.knots[:, 0], torch.ones(400), batch.label)
        errors[name] = float((x - batch.knots[:, 1]).square().mean())
    assert errors["student"] < 0.5 * errors["teacher"]


def test_a_student_names_its_store_and_teacher(student: str, small_store: str, teacher: str):
    config, manifest = load_config(student), store.read_manifest(small_store)
    assert manifest is not None
    assert (config.kind, config.steps, config.guidance) == ("student", 2, 0.0)
    assert config.store_fingerprint == manifest.fingerprint
    assert config.teacher_sha256 == load_config(teacher).weights_sha256


def test_a_student_can_start_from_a_previous_student(student: str, small_store: str, tmp_path: Path):
    tiny = FEW.model_copy(update={"updates": 1, "learning_rate": 1e-12, "warmup_updates": 0})
    distill(distill_spec(small_store, tmp_path / "one", steps=1, init=student, optimizer=tiny))
    config = load_config(str(tmp_path / "one"))
    assert (config.steps, config.teacher_sha256) == (1, load_config(student).teacher_sha256)
    for name, value in load_model(str(tmp_path / "one")).network.state_dict().items():
        torch.testing.assert_close(value, load_model(student).network.state_dict()[name])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 3}, "`steps` 3"),
        ({"guidance": 2.0}, "`guidance` 2"),
        ({"guidance": 1.0, "init": "STUDENT"}, "student of guidance 0.0"),
        ({"init": "OTHER"}, "other belongs to the teacher"),
        ({"teacher": "OTHER"}, "other belongs to the teacher"),
        ({"init": "no/such/model"}, "no/such/model"),
    ],
)
def test_inputs_that_do_not_fit_are_refused_before_anything_is_written(
    options: dict[str, Any], message: str, small_store: str, student: str, tmp_path: Path
):
    folders = {"STUDENT": student, "OTHER": make_teacher(tmp_path / "other", seed=9)}
    options = {name: folders.get(value, value) if isinstance(value, str) else value for name, value in options.items()}
    with pytest.raises(DistillKacError, match=message):
        distill(distill_spec(small_store, tmp_path / "out", **options))
    assert not (tmp_path / "out").exists()


def test_two_passes_give_the_same_student_as_one_pass(student: str, small_store: str, tmp_path: Path):
    distill(distill_spec(small_store, tmp_path / "out", optimizer=FEW.model_copy(update={"accumulation": 2})))
    for name, value in load_model(str(tmp_path / "out")).network.state_dict().items():
        torch.testing.assert_close(value, load_model(student).network.state_dict()[name], rtol=1e-4, atol=1e-5)


def test_a_dry_run_prints_the_cost_and_writes_nothing(
    small_store: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    assert distill(distill_spec(small_store, tmp_path / "out", dry_run=True)) is None
    assert list(tmp_path.iterdir()) == []
    out = capsys.readouterr().out
    assert "distill: 60 updates of 64 samples" in out
    assert "9.6 epochs of 400" in out


def test_an_unfinished_store_is_refused(small_store: str, tmp_path: Path):
    shutil.copytree(small_store, tmp_path / "store")
    (tmp_path / "store" / "manifest.json").unlink()
    with pytest.raises(DistillKacError, match="8 shards"):
        distill(distill_spec(str(tmp_path / "store"), tmp_path / "out"))


def test_a_grown_store_gives_a_different_student(teacher: str, tmp_path: Path):
    path = str(tmp_path / "store")
    make_store(path, teacher)
    distill(distill_spec(path, tmp_path / "out"))
    make_store(path, teacher, trajectories=200)
    with pytest.raises(DistillKacError, match="sample-ids"):
        distill(distill_spec(path, tmp_path / "out"))


def test_a_forward_store_can_be_distilled(teacher: str, tmp_path: Path):
    path = str(tmp_path / "store")
    make_store(path, teacher, source="forward", trajectories=200)
    distill(distill_spec(path, tmp_path / "out", steps=4))
    assert load_config(str(tmp_path / "out")).steps == 4
    with pytest.raises(DistillKacError, match=r"`steps`.*4"):
        distill(distill_spec(path, tmp_path / "two", steps=2))


def test_workers_that_use_every_cpu_can_stream_a_store(teacher: str, tmp_path: Path, ray_cluster: None):
    make_store(tmp_path / "store", teacher, trajectories=128, shard_size=32)
    distill(distill_spec(str(tmp_path / "store"), tmp_path / "out", workers=2, memory_gib=1e-9))
    assert load_config(str(tmp_path / "out")).steps == 2


@pytest.fixture(scope="module")
def any_step_student(small_store: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """An any-step student of the moons."""
    out = tmp_path_factory.mktemp("any-step") / "student"
    longer = FEW.model_copy(update={"updates": 600})
    distill(distill_spec(small_store, out, objective={"kind": "flow-map", "grids": (1, 2, 4)}, optimizer=longer))
    return str(out)


def test_a_flow_map_ends_near_the_teacher_in_any_number_of_steps(any_step_student: str, small_store: str, teacher: str):
    model = load_model(any_step_student)
    assert model.config.is_any_step
    batch = next(store.open(small_store).batches(400, 0.0))
    euler = load_model(teacher).network
    for steps in (1, 2, 3, 4):
        made = generate(model.network, batch.knots[:, 0], batch.label, student_sampling(model.config, steps))
        plain = generate(euler, batch.knots[:, 0], batch.label, Sampling(0.0, steps, "euler"))
        assert made.nfe == steps
        errors = [float((x - batch.knots[:, -1]).square().mean()) for x in (made.x, plain.x)]
        assert errors[0] < 0.5 * errors[1]


def test_a_student_takes_its_steps_on_the_grid_of_its_store(teacher: str, tmp_path: Path):
    make_store(tmp_path / "store", teacher, trajectories=400, knot_grid="quadratic")
    longer = FEW.model_copy(update={"updates": 600})
    objective = {"kind": "flow-map", "grids": (1, 2, 4)}
    config = distill(distill_spec(str(tmp_path / "store"), tmp_path / "out", objective=objective, optimizer=longer))
    assert config is not None
    student, batch = load_model(str(tmp_path / "out")), next(store.open(str(tmp_path / "store")).batches(400, 0.0))
    own, errors = student_sampling(config, 4), {}
    for grid in GRIDS:
        made = generate(student.network, batch.knots[:, 0], batch.label, own._replace(knot_grid=grid)).x
        errors[grid] = float((made - batch.knots[:, -1]).square().mean())
    assert own.knot_grid == "quadratic"
    assert errors["quadratic"] == min(errors.values())


def test_reflow_straightens_the_teachers_paths(small_store: str, tmp_path: Path):
    longer = FEW.model_copy(update={"updates": 600})
    config = distill(distill_spec(small_store, tmp_path / "out", objective="reflow", optimizer=longer))
    assert config is not None and config.is_any_step
    network, batch = load_model(str(tmp_path / "out")).network, next(store.open(small_store).batches(400, 0.0))
    errors = []
    for steps in (1, 20):
        made = generate(network, batch.knots[:, 0], batch.label, student_sampling(config, steps)).x
        errors.append(float((made - batch.knots[:, -1]).square().mean()))
    plain = float((batch.knots[:, 0] - batch.knots[:, -1]).square().mean())
    assert errors[1] < errors[0] < 0.5 * plain


def test_an_any_step_student_is_sampled_with_the_requested_steps(any_step_student: str, tmp_path: Path):
    made = {}
    for steps in (None, 2, 3):
        out = str(tmp_path / f"{steps}.npz")
        sample(SampleSpec(model=any_step_student, out=out, count=4, steps=steps))
        with np.load(out) as found:
            made[steps] = found["images"]
    np.testing.assert_array_equal(made[None], made[2])
    assert np.abs(made[3] - made[2]).max() > 1e-4


FLOW_MAP = {"kind": "flow-map", "grids": (1, 2, 4)}


def test_refinement_brings_a_student_closer_to_the_data_than_more_distillation(
    any_step_student: str, small_store: str, tmp_path: Path
):
    refine = {"kind": "data", "steps": (1, 2), "anchor": 0.01}
    options = {"objective": FLOW_MAP, "init": any_step_student, "refine": refine}
    config = distill(distill_spec(small_store, tmp_path / "refined", **options))
    assert config is not None
    assert config.is_any_step
    names = run_of("distill", config.fingerprint).data.metrics
    assert {"loss/flow_map", "loss/drift"} <= set(names)
    assert config.refined_in == ("pixels", "teacher")
    plain = distill(distill_spec(small_store, tmp_path / "plain", **{**options, "refine": "none"}))
    assert plain is not None
    assert plain.weights_sha256 != config.weights_sha256
    assert plain.refined_in == ()
    held_out = open_dataset(config.data).held_out.rows(torch.arange(400)).images
    distances = {}
    for name in ("refined", "plain"):
        model = load_model(str(tmp_path / name))
        x_1, label = initial_noise(config, 7, range(400))
        made = generate(model.network, x_1, label, student_sampling(model.config, 1)).x
        distances[name] = energy_distance(made, held_out).item()
    assert distances["refined"] < 0.7 * distances["plain"]


def test_the_parts_of_an_update_share_all_training_images_at_random(
    small_store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    parts: list[torch.Tensor] = []

    def spy(loss: RefinementLoss, samples: torch.Tensor, label: torch.Tensor, rows: torch.Tensor, *more: Any) -> Any:
        parts.append(rows)
        return compare(loss, samples, label, rows, *more)

    compare = RefinementLoss.__call__
    monkeypatch.setattr(RefinementLoss, "__call__", spy)
    optimizer = FEW.model_copy(update={"updates": 2, "accumulation": 2})
    refine = {"kind": "data", "real_images": 10**6}
    config = distill(distill_spec(small_store, tmp_path, optimizer=optimizer, refine=refine, validation_updates=0))
    assert config is not None
    everything = torch.arange(len(open_dataset(config.data).train))
    for first, second in (parts[:2], parts[2:]):
        assert torch.equal(torch.cat([first, second]).sort().values, everything)
    assert not torch.equal(parts[0].sort().values, parts[2].sort().values)


def test_an_impossible_refinement_is_refused_before_anything_is_written(
    any_step_student: str, small_store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def check_refused(message: str, **options: Any) -> None:
        with pytest.raises(DistillKacError, match=message):
            distill(distill_spec(small_store, tmp_path / "out", **options))
        assert not (tmp_path / "out").exists()

    check_refused("any-step student.*`objective` endpoint", init=any_step_student)
    check_refused("`refine.spaces`.*pooled", refine={"kind": "data", "spaces": ("pooled",)})
    check_refused("`refine.real_images` is 1 .* at least 2", refine={"kind": "data", "real_images": 1})
    options = {"init": any_step_student, "refine": "data", "objective": FLOW_MAP}
    check_refused("`refine.spaces` teacher .*missing cannot be used .*as `teacher`", teacher="missing", **options)
    check_refused("`refine.spaces` teacher .* has other weights.*as `teacher`", teacher=any_step_student, **options)
    passes = FEW.model_copy(update={"accumulation": 64})
    check_refused("`optimizer.batch_size` is 64, .* at least 128", refine="data", optimizer=passes)
    other = in_memory(torch.zeros(20, 2), torch.arange(20) % 2, 2)
    monkeypatch.setattr(models, "describe_dataset", lambda config: other.description)
    check_refused("sha256", refine="data")


def test_a_flow_map_needs_whole_trajectories(teacher: str, tmp_path: Path):
    path = str(tmp_path / "store")
    make_store(path, teacher, source="forward", trajectories=200)
    with pytest.raises(DistillKacError, match="forward store"):
        distill(distill_spec(path, tmp_path / "out", objective={"kind": "flow-map", "grids": (1, 2, 4)}))


REFINED = {
    "objective": FLOW_MAP,
    "refine": {"kind": "data", "spaces": ("pixels", "teacher", "random")},
}


def test_a_stopped_refinement_resumes_to_the_same_weights(
    small_store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def spec(name: str) -> DistillSpec:
        return distill_spec(small_store, tmp_path / name, checkpoint_updates=10, **REFINED)

    class Stopped(Exception):
        pass

    def stop(metrics: dict[str, Any]) -> None:
        if metrics["update"] >= 30:
            raise Stopped

    whole = distill(spec("whole"))
    with pytest.raises(Stopped):
        distill(spec("stopped"), on_report=stop)
    resumed = distill(spec("stopped"))
    assert whole is not None
    assert resumed is not None
    assert resumed.weights_sha256 == whole.weights_sha256


def test_two_workers_refine_like_one_worker_with_two_passes(small_store: str, tmp_path: Path, ray_cluster: None):
    two_passes = FEW.model_copy(update={"accumulation": 2})
    distill(distill_spec(small_store, tmp_path / "one", optimizer=two_passes, **REFINED))
    distill(distill_spec(small_store, tmp_path / "two", workers=2, **REFINED))
    one, two = (load_model(str(tmp_path / name)).network.state_dict() for name in ("one", "two"))
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("objective", ["endpoint", "flow-map"])
def test_a_student_of_all_scales_follows_the_teacher_at_each_scale(objective: str, small_store: str, tmp_path: Path):
    longer = FEW.model_copy(update={"updates": 600, "batch_size": 128})
    options = {"kind": objective, **({"grids": (1, 2, 4)} if objective == "flow-map" else {})}
    config = distill(
        distill_spec(small_store, tmp_path / "all", guidance="all", objective=options, optimizer=longer, steps=1)
    )
    assert config is not None
    assert (config.guidance, config.guidance_scales) == (0.0, (0.0, 1.0))
    network, errors = load_model(str(tmp_path / "all")).network, {}
    for w in (0.0, 1.0):
        batch = next(store.open(small_store).batches(400, w, [0, 4]))
        for given in (0.0, 1.0):
            made = generate(network, batch.knots[:, 0], batch.label, student_sampling(config, 1, given)).x
            errors[w, given] = float((made - batch.knots[:, 1]).square().mean())
    assert errors[0.0, 0.0] < 0.5 * errors[0.0, 1.0]
    assert errors[1.0, 1.0] < 0.5 * errors[1.0, 0.0]
    between = [generate(network, batch.knots[:, 0], batch.label, student_sampling(config, 1, w)).x for w in (0, 0.5, 1)]
    middle = (between[0] + between[2]) / 2
    assert (between[1] - middle).square().mean() < 0.1 * (between[2] - between[0]).square().mean()
    out = str(tmp_path / "made.npz")
    sample(SampleSpec(model=str(tmp_path / "all"), out=out, count=4, guidance=0.5))
    again = distill_spec(small_store, tmp_path / "one", init=str(tmp_path / "all"), objective=options)
    with pytest.raises(DistillKacError, match="student of guidance all"):
        distill(again)


def test_a_student_of_all_scales_cannot_be_refined(small_store: str, tmp_path: Path):
    with pytest.raises(DistillKacError, match=r"`refine` data .* `guidance` is all"):
        distill_spec(small_store, tmp_path / "out", guidance="all", refine="data")


class DiagnosedObjective(EndpointObjective):
    """Logs diagnostics: a scalar with a gradient, and a count."""

    def losses(self, network: Any, interval: Any) -> LossTerms:
        losses = super().losses(network, interval).losses
        return LossTerms(losses, {"double": 2 * losses["endpoint"], "rows": torch.tensor(len(interval.label))})


@pytest.mark.parametrize(("refine", "anchor"), [("none", 1.0), ({"kind": "data", "anchor": 0.25}, 0.25)])
def test_diagnostics_of_an_objective_are_logged_and_not_minimised(
    refine: Any, anchor: float, small_store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    options = {"refine": refine, "optimizer": FEW.model_copy(update={"accumulation": 2})}
    plain = distill(distill_spec(small_store, tmp_path / "plain", **options))
    monkeypatch.setattr(EndpointConfig, "build", lambda config, steps, takes: DiagnosedObjective(steps))
    diagnosed = distill(distill_spec(small_store, tmp_path / "diagnosed", **options))
    assert plain is not None
    assert diagnosed is not None
    assert diagnosed.weights_sha256 == plain.weights_sha256
    run = tracking.run_of_output(str(tmp_path / "diagnosed"))
    assert run is not None
    metrics = MlflowClient().get_run(run.run_id).data.metrics
    assert metrics["diagnostic/double"] == pytest.approx(2 * metrics["loss/endpoint"] / anchor)
    assert metrics["diagnostic/rows"] == FEW.batch_size / 2
    assert metrics["loss"] == pytest.approx(sum(v for name, v in metrics.items() if name.startswith("loss/")))


def test_models_of_a_bounded_network_obey_the_speed_limit(tmp_path: Path):
    """The network's velocities are far beyond the limit, so every trajectory would exceed it without the clamp."""
    network = {**SMALL.model_dump(), "bounded": True}
    path = str(tmp_path / "teacher")
    teach(teach_spec(Path(path), network=network, path={"kind": "kac", "a": 1, "c": 0.2}))
    make_store(tmp_path / "store", path, trajectories=64)
    make_store(tmp_path / "store", path, trajectories=64, guidance=(0.0, 1.0))
    for name, guidance in (("plain", 0.0), ("guided", 1.0)):
        distill(distill_spec(str(tmp_path / "store"), tmp_path / name, guidance=guidance))
    distill(distill_spec(str(tmp_path / "store"), tmp_path / "lines", objective="reflow"))
    assert load_config(str(tmp_path / "plain")).network.bounded
    assert not load_config(str(tmp_path / "lines")).network.bounded  # near the image, lines may be too fast
    assert not load_config(str(tmp_path / "guided")).network.bounded  # its teacher may be faster than the limit
    for name in ("teacher", "plain"):
        model, speeds = load_model(str(tmp_path / name)), []
        for parameter in model.network.parameters():
            parameter.data.mul_(20)
        network = Watched(model.network, lambda x, t, u, speeds=speeds: speeds.append(u.abs().max()))
        sampling = teacher_sampling(model.config) if name == "teacher" else student_sampling(model.config)
        generate(network, *initial_noise(model.config, 0, range(500)), sampling)
        assert max(speeds) == pytest.approx(model.config.path.build().speed_limit(), rel=0.2)
        assert max(speeds) <= model.config.path.build().speed_limit()

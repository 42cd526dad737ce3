"""Counts and ranges of workers, nodes' resources, elastic groups, and waiting for resources."""

import contextlib
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from jobs.parsing import parse
from kac.model import load_model
from kac.util.errors import ArgumentError
from kac.util.options import Range
from pipeline import training
from pipeline.cluster import placement, ray_internals
from pipeline.cluster.placement import Node, Resources, wait_for_capacity
from pipeline.config import DistillSpec, EvaluateSpec, RolloutSpec, SweepSpec, TeachSpec
from pipeline.distill import DistillTask, distill, resolve_spec
from pipeline.evaluate.evaluate_stage import evaluate
from pipeline.rollout import rollout
from pipeline.sweep import sweep
from pipeline.teach import TeachTask, teach
from pipeline.tracking import TrackedRun
from pipeline.training.loop import averaged_weights, run_updates
from tests.pipeline.stages import FEW, distill_spec, teach_spec


class Untracked(TrackedRun):
    """A run that logs nothing."""

    def metrics(self, values: dict[str, float], step: int = 0) -> None:
        """Discard the values."""

    def flush(self, seconds: float = 0.0) -> bool:
        """Report that all values are delivered."""
        return True


def parsed(spec: type[Any], options: str) -> Any:
    return parse(spec, options.split(), "test")


@pytest.mark.parametrize(
    ("given", "expected"), [("3", 3), ("0", 0), ("2:8", Range(2, 8)), ("4:4", 4), ("1:2", Range(1, 2))]
)
def test_a_count_from_options_yaml_python_and_json_is_the_same(tmp_path: Path, given: str, expected: int | Range):
    (tmp_path / "options.yaml").write_text(f"actors: {given}\n")
    rest = "--teacher t --store s"
    spec = parsed(RolloutSpec, f"--actors {given} {rest}")
    assert spec.actors == expected
    assert parsed(RolloutSpec, f"--config {tmp_path / 'options.yaml'} {rest}") == spec
    assert RolloutSpec(teacher="t", store="s", actors=expected) == spec
    assert RolloutSpec.model_validate_json(spec.model_dump_json()) == spec


@pytest.mark.parametrize("given", ["0:4", "8:2", "-1", "2:", "two", "1.5"])
def test_other_counts_are_refused(given: str):
    with pytest.raises(ArgumentError, match=r"^`workers`.*MIN:MAX"):
        DistillSpec(store="s", out="o", workers=given)


def test_a_label_selector_from_options_and_yaml_is_the_same(tmp_path: Path):
    (tmp_path / "options.yaml").write_text("label_selector: {market: spot}\n")
    for spec, rest in ((TeachSpec, "--out o"), (SweepSpec, "--out o --store s"), (EvaluateSpec, "--out o --teacher t")):
        given = parsed(spec, f"--label-selector market=spot {rest}")
        assert given.label_selector == {"market": "spot"}
        assert parsed(spec, f"--config {tmp_path / 'options.yaml'} {rest}") == given
    with pytest.raises(ArgumentError, match=r"`label_selector`.*(KEY=VALUE.*spot|spot.*KEY=VALUE)"):
        parsed(TeachSpec, "--label-selector spot --out o")


def test_a_node_fits_whole_workers():
    node = Node({"CPU": 4, "GPU": 2}, {"market": "spot"})
    assert node.capacity(Resources(1)) == 4
    assert node.capacity(Resources(1.5)) == 2
    assert node.capacity(Resources(1, 1)) == 2
    assert node.capacity(Resources(0, 0.4)) == 4, "a worker cannot use parts of two GPUs"
    for value, fitting in (("spot", 4), ("!spot", 0), ("in(on-demand, spot)", 4), ("!in(on-demand)", 4), ("other", 0)):
        assert node.capacity(Resources(1, 0, {"market": value})) == fitting
    assert node.capacity(Resources(1, 0, {"zone": "!a"})) == 4


# Elastic groups.

MAX_WORKERS = 4, 3
"""The maximum workers of the teacher, each with one pass per update, and of the student, each with two passes."""


def elastic_tasks(teacher: str, small_store: str, out: Path) -> tuple[TeachTask, DistillTask]:
    two_passes = FEW.model_copy(update={"batch_size": 48, "accumulation": 2})
    student = resolve_spec(
        distill_spec(small_store, out, optimizer=two_passes, objective={"kind": "flow-map", "grids": (1, 2, 4)})
    )
    return TeachTask(teach_spec(out)), DistillTask(student, teacher)


def train(task: Any, worker: training.Worker) -> list[torch.Tensor]:
    """Return the losses and the weights after a few updates."""
    learner = task.build(worker)
    losses = []
    for number in range(5):
        loss = sum(learner.update(number).losses.values()).detach()
        if worker.world_size > 1:
            dist.all_reduce(loss)
        losses.append(loss / worker.world_size)
    return [torch.stack(losses), *learner.averaged().state_dict().values()]


def train_in_groups(rank: int, tasks: tuple[Any, ...], folder: Path) -> dict[int, list[list[torch.Tensor]]]:
    """Return the results of this rank in groups of three and of two processes."""
    results = {}
    for size in (3, 2):
        if rank < size:
            dist.init_process_group("gloo", init_method=f"file://{folder / str(size)}", rank=rank, world_size=size)
            workers = (training.Worker(rank, size, torch.device("cpu"), most) for most in MAX_WORKERS)
            results[size] = [train(task, worker) for task, worker in zip(tasks, workers, strict=True)]
            dist.destroy_process_group()
    return results


def test_draining_and_dead_nodes_are_not_counted(monkeypatch: pytest.MonkeyPatch):
    def listed(name: str, is_alive: bool) -> dict[str, object]:
        return {"NodeID": name, "Alive": is_alive, "Resources": {"CPU": 1}, "Labels": {}, "NodeManagerAddress": name}

    monkeypatch.setattr(ray, "nodes", lambda: [listed("a", True), listed("b", True), listed("dead", False)])
    monkeypatch.setattr(ray_internals, "draining_nodes", lambda: {"b"})
    monkeypatch.setattr(ray_internals, "available_resources_per_node", lambda: {"a": {"CPU": 1}, "b": {"CPU": 1}})
    assert [node.address for node in placement.live_nodes()] == ["a"]
    assert placement.capacity(Resources(1.0)) == placement.free_capacity(Resources(1.0)) == 1


def test_any_number_of_workers_trains_the_same_model(teacher: str, small_store: str, tmp_path: Path):
    tasks = elastic_tasks(teacher, small_store, tmp_path / "out")
    others = [mp.get_context("spawn").Process(target=train_in_groups, args=(rank, tasks, tmp_path)) for rank in (1, 2)]
    for other in others:
        other.start()
    results = train_in_groups(0, tasks, tmp_path)
    for other in others:
        other.join(60)
        assert other.exitcode == 0
    uncut = train(tasks[0], training.Worker(0, 1, torch.device("cpu")))
    assert not torch.allclose(uncut[0], results[2][0][0], rtol=1e-3), "noise is drawn by slot"
    for number, (task, most) in enumerate(zip(tasks, MAX_WORKERS, strict=True)):
        single = train(task, training.Worker(0, 1, torch.device("cpu"), most))
        for size in (2, 3):
            for one, other in zip(single, results[size][number], strict=True):
                torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_slots_are_distributed_without_gaps():
    for most, accumulation in ((4, 1), (3, 2), (5, 3)):
        for size in range(1, most + 1):
            slots = []
            for rank in range(size):
                micro = training.MicroBatch(0, 0, accumulation, training.Worker(rank, size, torch.device("cpu"), most))
                assert micro.passes in {micro.slots // size, -(-micro.slots // size)}
                while micro.update == 0:
                    slots.append(micro.slot)
                    micro = micro.next()
            assert slots == list(range(most * accumulation))


def test_an_elastic_group_of_ray_train_trains_like_one_process(
    teacher: str, small_store: str, tmp_path: Path, ray_cluster: None
):
    spec = distill_spec(small_store, tmp_path / "group", workers="1:2")
    distill(spec)
    job = training.Job(DistillTask(resolve_spec(spec), teacher), "test", str(tmp_path / "alone"), Untracked("", ""), 60)
    state = run_updates(job, training.Worker(0, 1, torch.device("cpu"), 2), lambda metrics, state: None, None)
    single, group = averaged_weights(state), load_model(str(tmp_path / "group")).network.state_dict()
    for name, value in single.items():
        torch.testing.assert_close(group[name], value, rtol=1e-4, atol=1e-5)


# Waiting for resources.


def test_an_embedded_ray_that_is_too_small_is_refused_at_once(
    teacher: str, small_store: str, tmp_path: Path, ray_cluster: None
):
    actors = {"teacher": teacher, "actors": 1}
    roll = {
        **actors,
        "store": str(tmp_path / "store"),
        "trajectories": 40,
        "shard_size": 20,
        "knots": 4,
        "solver_steps": 4,
    }
    for run, message in (
        (lambda: teach(teach_spec(tmp_path / "t", workers=4)), r"`workers`: .*4 x \(1 CPU\)"),
        (lambda: teach(teach_spec(tmp_path / "t", workers="4:8")), r"`workers`: .*4 x \(1 CPU\)"),
        (lambda: distill(distill_spec(small_store, tmp_path / "d", workers=1, gpu=True)), r"1 x \(1 CPU, 1 GPU\)"),
        (lambda: rollout(RolloutSpec(**roll, gpu=True, gpus_per_actor=0.5)), r"`actors`: .*1 x \(0.5 GPU\)"),
        (lambda: rollout(RolloutSpec(**roll, label_selector={"market": "spot"})), "1 CPU on nodes with market=spot"),
        (lambda: rollout(RolloutSpec(**{**roll, "actors": 2}, cpus_per_actor=1.5)), r"2 x \(1.5 CPU\)"),
        (lambda: evaluate(EvaluateSpec(**actors, out=str(tmp_path / "e"), gpu=True)), r"1 x \(1 GPU\)"),
        (
            lambda: sweep(SweepSpec(store=small_store, out=str(tmp_path / "s"), steps=(1,), workers=4, samples=0)),
            r"`workers`: .*4 x \(1 CPU\)",
        ),
    ):
        with pytest.raises(ArgumentError, match=message + r".*2 CPU, 0 GPU.*RAY_ADDRESS"):
            run()
    assert not (tmp_path / "store").exists()


GPU = Resources(1, 1)


class Clock:
    """A replacement for the module ``time``, in which only ``sleep`` advances the time."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock(ray_cluster: None, monkeypatch: pytest.MonkeyPatch) -> Clock:
    """A clock for ``placement``, which takes the session's Ray for a cluster that other nodes may join."""
    monkeypatch.setattr(ray_internals, "is_embedded", lambda: False)
    clock = Clock()
    monkeypatch.setattr(placement, "time", clock)
    return clock


def test_a_cluster_that_stays_too_small_is_refused_after_a_wait(clock: Clock, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(ArgumentError, match=r"`workers`.*1 x \(1 CPU, 1 GPU\).*no autoscaler.*30 s"):
        wait_for_capacity("distill", "`workers`", 1, GPU)
    assert clock.now == 30
    assert "distill: waiting for nodes that can fit 1 x (1 CPU, 1 GPU)" in capsys.readouterr().out


def test_a_node_that_joins_in_time_is_used(clock: Clock, monkeypatch: pytest.MonkeyPatch):
    seen = [[], [], [], [Node({"CPU": 8, "GPU": 1}, {})]]
    monkeypatch.setattr(placement, "live_nodes", lambda: seen.pop(0) if len(seen) > 1 else seen[0])
    monkeypatch.setattr(placement, "free_resources", lambda: seen[-1])
    wait_for_capacity("distill", "`workers`", 1, GPU)
    assert len(seen) == 1 and clock.now < 30


@pytest.mark.parametrize(
    ("pending", "infeasible", "seconds", "reason"),
    [
        ([], [], 1200, "not added any nodes"),
        (["node"], [], 1200, "have not joined"),
        ([], ["the request"], 30, "cannot add such nodes"),
        ([], ["another request"], 1200, "not added any nodes"),
    ],
)
def test_nodes_of_an_autoscaler_are_waited_for_longer(
    clock: Clock,
    monkeypatch: pytest.MonkeyPatch,
    pending: list[str],
    infeasible: list[str],
    seconds: int,
    reason: str,
):
    state = SimpleNamespace(
        pending_instances=pending,
        pending_instance_requests=[],
        infeasible_gang_resource_requests=[SimpleNamespace(details=text) for text in infeasible],
    )
    nodes = [Node({"CPU": 0}, {placement.NODE_GROUP_LABEL: "head"})]
    monkeypatch.setattr(ray_internals, "autoscaling_state", lambda: state)
    monkeypatch.setattr(placement, "live_nodes", lambda: nodes)
    monkeypatch.setattr(placement, "free_resources", lambda: nodes)
    monkeypatch.setattr(placement, "requested_from_autoscaler", lambda *_: contextlib.nullcontext("the request"))
    with pytest.raises(ArgumentError, match=reason):
        wait_for_capacity("distill", "`workers`", 1, GPU)
    assert clock.now == seconds


def test_incompatible_options_are_refused(tmp_path: Path, ray_cluster: None):
    for options, message in (
        ({"label_selector": {"a": "b"}}, "workers"),
        ({"label_selector": {"a": "b"}, "workers": "1:2"}, "`workers`"),
        ({"label_selector": {"a": "b c"}, "workers": 1}, "a=b c"),
        ({"gpus_per_worker": 0.5, "workers": 2, "gpu": True}, "GPU"),
    ):
        with pytest.raises(ArgumentError, match=message) as refused:
            teach(teach_spec(tmp_path / "t", **options))
        assert refused.value.name == next(iter(options))


def test_gpus_are_hidden_from_actors_without_one_but_not_from_the_driver(ray_cluster: None):
    @ray.remote(num_cpus=0)
    def visible() -> str | None:
        placement.hide_unassigned_gpus()
        return os.environ.get("CUDA_VISIBLE_DEVICES")

    before = os.environ.get("CUDA_VISIBLE_DEVICES")
    assert ray.get(visible.remote()) == ""
    placement.hide_unassigned_gpus()
    assert os.environ.get("CUDA_VISIBLE_DEVICES") == before


def test_work_in_this_process_cannot_leave_out_its_gpu(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(ArgumentError, match="`gpu` False with `actors` 0"):
        placement.choose_actors(RolloutSpec(teacher="t", store="s", actors=0, gpu=False))
    with pytest.raises(ArgumentError, match="`gpu` False with `workers` 0"):
        training.choose_workers(TeachSpec(out="o", workers=0, gpu=False))

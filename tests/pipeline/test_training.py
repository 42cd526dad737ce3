"""The training loop: what it computes, how it resumes, what it refuses."""

import gc
import io
import itertools
import os
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from mlflow import MlflowClient
from torch import Tensor, nn

from kac.precision import Precision
from kac.util.errors import ArgumentError, DistillKacError
from pipeline import tracking, training
from pipeline.config.specs import OptimizerConfig, SampleSpec, SweepSpec
from pipeline.distill import distill
from pipeline.sweep import sweep
from pipeline.teach import teach
from pipeline.tracking import TrackedRun
from pipeline.training.ahead import BATCHES_AHEAD, Ahead, made_ahead
from pipeline.training.learner import TrainedNetwork, learning_rate_factor
from pipeline.training.loop import run_updates
from tests.pipeline.stages import FEW, distill_spec, teach_spec

DIAGNOSTICS = {"learning_rate", "gradient_norm", "samples_per_second", "peak_memory_bytes"}


class NoTracking(TrackedRun):
    """A run that keeps its metrics to itself."""

    def metrics(self, values: dict[str, float], step: int = 0) -> None:
        assert set(values) == {"loss", "loss/regression", *DIAGNOSTICS}
        assert values["peak_memory_bytes"] > 1e6


UNTRACKED = NoTracking("", "")
HERE = training.Worker(0, 1, torch.device("cpu"))
HERE_ALONE = training.Place(0, use_gpu=False)


@dataclass(frozen=True)
class Regression:
    """A linear map of 64 fixed points; its rows are split between the workers, as a batch is."""

    optimizer: OptimizerConfig
    dies_at: int = -1
    mark: str = ""
    poison_at: int = -1

    def build(self, worker: training.Worker) -> training.Learner:
        points = torch.randn(64, 5, generator=torch.Generator().manual_seed(1))
        target = points @ torch.arange(10.0).reshape(5, 2)
        torch.manual_seed(0)

        def losses(network: nn.Module, micro: training.MicroBatch) -> dict[str, Tensor]:
            update = micro.update
            if update == self.dies_at and worker.rank == 1 and not Path(self.mark).exists():
                Path(self.mark).touch()
                os._exit(1)
            x, y = micro.share(points), micro.share(target)
            value = (network(x, None, None) - y).square().mean()
            return {"regression": value * float("nan") if update == self.poison_at else value}

        return training.NetworkLearner(Linear(), losses, self.optimizer, worker)


class Linear(nn.Linear):
    """As a velocity network is called."""

    null_label = 0

    def __init__(self) -> None:
        super().__init__(5, 2)

    def forward(self, x: Tensor, t: None, label: None) -> Tensor:
        return super().forward(x)


def job(out: Path, task: Regression, checkpoint_updates: int = 10) -> training.Job:
    return training.Job(task, "test", str(out), UNTRACKED, checkpoint_updates)


OPTIONS = OptimizerConfig(updates=60, batch_size=64, learning_rate=0.4, warmup_updates=5, ema_decay=0.9)


def assert_same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor], tolerance: float = 0.0) -> None:
    assert a.keys() == b.keys()
    for name, value in a.items():
        torch.testing.assert_close(value, b[name], rtol=tolerance, atol=tolerance)


def test_it_learns_and_returns_the_average(tmp_path: Path):
    weights = training.train(job(tmp_path, Regression(OPTIONS)), HERE_ALONE)
    state = run_updates(job(tmp_path, Regression(OPTIONS)), HERE, _ignore, None)
    trained = torch.load(io.BytesIO(state), weights_only=True)["learner"]
    assert_same(weights, trained["average"])
    assert not torch.equal(weights["weight"], trained["network"]["weight"])
    error = (trained["network"]["weight"] - torch.arange(10.0).reshape(5, 2).T).abs().max()
    assert error < (nn.Linear(5, 2).weight - torch.arange(10.0).reshape(5, 2).T).abs().max() / 2


def _ignore(metrics: dict[str, float], state: bytes) -> None:
    """A report function that keeps nothing."""


@pytest.mark.parametrize("stop_after", [10, 30, 50])
def test_a_resumed_run_is_the_run_that_was_not_stopped(tmp_path: Path, stop_after: int):
    whole = training.train(job(tmp_path / "whole", Regression(OPTIONS)), HERE_ALONE)

    class Stopped(Exception):
        pass

    def stop(metrics: dict[str, float]) -> None:
        if metrics["update"] == stop_after:
            raise Stopped

    stopped = job(tmp_path / "stopped", Regression(OPTIONS))
    with pytest.raises(Stopped):
        training.train(stopped, HERE_ALONE, on_report=stop)
    assert_same(whole, training.train(stopped, HERE_ALONE))


def test_what_is_logged_is_delivered_before_its_checkpoint_is_reported(tmp_path: Path):
    events: list[str] = []

    class Told(TrackedRun):
        def metrics(self, values: dict[str, float], step: int = 0) -> None:
            events.append(f"metrics {step}")

        def flush(self, seconds: float = 0.0) -> bool:
            events.append("flush")
            return True

    watched = training.Job(Regression(OPTIONS), "test", str(tmp_path), Told("", ""), 55)
    training.train(watched, HERE_ALONE, on_report=lambda metrics: events.append(f"report {metrics['update']:.0f}"))
    assert events == ["metrics 50", "flush", "report 55", "metrics 60", "flush", "report 60"]


def test_a_resumed_run_logs_no_update_twice(tmp_path: Path):
    class Stopped(Exception):
        pass

    longer = OPTIONS.model_copy(update={"updates": 300})
    with tracking.start_run(
        spec=SampleSpec(model="m", out="o.png"), fingerprint="f", inputs={}, output=str(tmp_path)
    ) as run:
        resumed = training.Job(Regression(longer), "test", str(tmp_path), run, 80)

        def stop(metrics: dict[str, float]) -> None:
            if metrics["update"] == 160:
                (tmp_path / "training" / "state.pt").write_bytes(states[0])
                raise Stopped
            states.append((tmp_path / "training" / "state.pt").read_bytes())

        states: list[bytes] = []
        with pytest.raises(Stopped):
            training.train(resumed, HERE_ALONE, on_report=stop)
        training.train(resumed, HERE_ALONE)
        run.flush()
    steps = [point.step for point in MlflowClient().get_metric_history(run.run_id, "loss")]
    assert steps == [50, 100, 150, 200, 250, 300]


def test_a_run_that_begins_anew_for_want_of_a_checkpoint_logs_no_update_twice(tmp_path: Path):
    with tracking.start_run(
        spec=SampleSpec(model="m", out="o.png"), fingerprint="f", inputs={}, output=str(tmp_path)
    ) as run:
        for updates in (60, 120):
            options = OPTIONS.model_copy(update={"updates": updates})
            run_updates(training.Job(Regression(options), "test", str(tmp_path), run, 500), HERE, _ignore, None)
            run.flush()
    steps = [point.step for point in MlflowClient().get_metric_history(run.run_id, "loss")]
    assert steps == [50, 60, 100, 120]


def test_a_loss_that_is_not_finite_ends_the_run_before_a_checkpoint(tmp_path: Path):
    poisoned = job(tmp_path, Regression(OPTIONS, poison_at=9))
    with pytest.raises(DistillKacError, match="expected a finite loss, found nan by update 10"):
        training.train(poisoned, HERE_ALONE)
    assert not (tmp_path / "training" / "state.pt").exists()


def test_a_batch_that_the_workers_cannot_share_is_refused(small_store: str, tmp_path: Path, ray_cluster: None):
    """Before the work, and so before there is a run of it."""
    message = "`workers`: expected a divisor of the batch size 64, found (1:)?3$"
    with pytest.raises(ArgumentError, match=message):
        teach(teach_spec(tmp_path / "teacher", workers=3))
    with pytest.raises(ArgumentError, match=message):
        distill(distill_spec(small_store, tmp_path / "student", workers="1:3"))
    with pytest.raises(ArgumentError, match=message):
        sweep(SweepSpec(store=small_store, out=str(tmp_path / "sweep"), optimizer=FEW, workers=3))
    assert not list(tmp_path.rglob("run.json"))


def test_two_workers_one_killed_end_where_one_process_ends(tmp_path: Path, ray_cluster: None):
    alone = training.train(job(tmp_path / "alone", Regression(OPTIONS)), HERE_ALONE)
    mark = tmp_path / "killed"
    task = Regression(OPTIONS, dies_at=35, mark=str(mark))
    together = training.train(
        # Checkpoints by time too, in which the two must agree.
        replace(job(tmp_path / "together", task, checkpoint_updates=10), checkpoint_seconds=0.5),
        training.Place(2, use_gpu=False),
    )
    assert mark.exists()
    assert_same(alone, together, tolerance=1e-5)


def test_learning_rate_warms_up_and_falls_to_nothing():
    factors = [learning_rate_factor(update, OPTIONS) for update in range(OPTIONS.updates)]
    assert factors[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert all(a >= b for a, b in itertools.pairwise(factors[4:]))
    assert 0 < factors[-1] < 0.01
    constant = OPTIONS.model_copy(update={"schedule": "constant"})
    assert [learning_rate_factor(update, constant) for update in (0, 4, 5, 59)] == pytest.approx([0.2, 1.0, 1.0, 1.0])


@pytest.mark.parametrize(("count", "batch"), [(10, 4), (7, 20), (5, 5)])
def test_every_row_is_drawn_once_an_epoch(count: int, batch: int):
    order = training.EpochOrder(3, count, batch)
    drawn = torch.cat([order.batch(update) for update in range(30)])
    for epoch in range(len(drawn) // count):
        rows = drawn[epoch * count : (epoch + 1) * count]
        assert sorted(rows.tolist()) == list(range(count))
    assert not torch.equal(drawn[:count], drawn[count : 2 * count])
    resumed = training.EpochOrder(3, count, batch)
    assert torch.equal(torch.cat([resumed.batch(update) for update in range(13, 30)]), drawn[13 * batch :])


def test_an_epoch_is_shuffled_once(monkeypatch: pytest.MonkeyPatch):
    shuffled = []
    real = training.EpochOrder._shuffle
    monkeypatch.setattr(
        training.EpochOrder, "_shuffle", lambda self, epoch: shuffled.append(epoch) or real(self, epoch)
    )
    order = training.EpochOrder(0, 10, 4)
    for update in range(10):
        order.batch(update)
    assert shuffled == [0, 1, 2, 3]


def test_random_numbers_differ_by_seed_update_and_rank():
    first = training.MicroBatch(0, 0, 2, training.Worker(0, 2, torch.device("cpu")))
    keys = [(0, first), (0, first.next()), (0, first.next().next()), (1, first)]
    keys.append((0, first._replace(worker=first.worker._replace(rank=1))))
    draws = [torch.rand(4, generator=training.slot_generator(*key)).tolist() for key in keys]
    draws += [torch.rand(4, generator=training.update_generator(*key)).tolist() for key in ((0, 0), (0, 1), (1, 0))]
    assert len({tuple(draw) for draw in draws}) == 8
    assert torch.rand(4, generator=training.slot_generator(*keys[0])).tolist() == draws[0]


def test_every_row_is_in_one_slot_however_the_batch_is_split():
    rows = torch.arange(24)
    splits = [(1, 6), (2, 3), (3, 2), (6, 1)]
    found = []
    for workers, accumulation in splits:
        micro = [
            training.MicroBatch(0, n, accumulation, training.Worker(rank, workers, torch.device("cpu")))
            for rank in range(workers)
            for n in range(accumulation)
        ]
        found.append({each.slot: each.share(rows).tolist() for each in micro})
    assert all(each == found[0] for each in found)
    assert sorted(row for slot in found[0].values() for row in slot) == rows.tolist()


def test_accumulated_passes_are_one_batch(tmp_path: Path):
    whole = training.train(job(tmp_path / "whole", Regression(OPTIONS)), HERE_ALONE)
    options = OPTIONS.model_copy(update={"accumulation": 4})
    assert_same(whole, training.train(job(tmp_path / "parts", Regression(options)), HERE_ALONE), tolerance=1e-5)
    with pytest.raises(DistillKacError, match="`workers`: expected a divisor of the batch size 64, of 4 passes"):
        training.check_shares(options, 32)
    training.check_shares(options, 16)
    with pytest.raises(DistillKacError, match="`accumulation`: expected a divisor of the batch size 64, found 3"):
        OptimizerConfig(batch_size=64, accumulation=3)


class Row(NamedTuple):
    """A batch of one number."""

    value: Tensor


def test_batches_made_ahead_are_those_that_were_asked_for():
    made = []

    def make(micro: training.MicroBatch) -> Row:
        made.append(micro)
        if micro.update == 9:
            raise DistillKacError("update 9 is damaged")
        return Row(torch.tensor([micro.update, micro.number]))

    ahead, micro = Ahead(make), training.MicroBatch(3, 0, 2, HERE)
    for update in (3, 4):
        for number in (0, 1):
            assert ahead(micro).value.tolist() == [update, number]
            micro = micro.next()
    ahead.thread.shutdown()
    assert len(made) <= 4 + BATCHES_AHEAD
    ahead = Ahead(make)
    micro = micro._replace(update=8, number=1)
    assert ahead(micro).value.tolist() == [8, 1]
    with pytest.raises(DistillKacError, match="update 9 is damaged"):
        ahead(micro.next())
    assert ahead(micro._replace(update=1)).value.tolist() == [1, 1]  # and it can begin anew elsewhere


def test_they_are_made_ahead_for_a_gpu_alone():
    def make(micro: training.MicroBatch) -> Row:
        return Row(torch.zeros(1))

    assert made_ahead(make, torch.device("cpu")) is make
    assert isinstance(made_ahead(make, torch.device("cuda")), Ahead)


def test_its_thread_ends_with_it():
    ahead = Ahead(lambda micro: Row(torch.zeros(1)))
    ahead(training.MicroBatch(0, 0, 1, HERE))
    (thread,) = ahead.thread._threads
    del ahead
    gc.collect()
    thread.join(10)
    assert not thread.is_alive()


def test_the_loop_says_once_how_long_it_will_take(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    training.train(job(tmp_path, Regression(OPTIONS)), HERE_ALONE)
    assert len(re.findall(r"test: about \d+ seconds left", capsys.readouterr().out)) == 1


def test_a_state_of_another_memory_format_goes_on(tmp_path: Path):
    """The fused optimizer reads memory in its order."""
    results = []
    for formats in (("contiguous", "contiguous"), ("channels_last", "contiguous"), ("contiguous", "channels_last")):
        torch.manual_seed(0)
        networks = [nn.Conv2d(3, 8, 3), nn.Conv2d(3, 8, 3)]
        x, state = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(1)), None
        for network, memory_format in zip(networks, formats, strict=True):
            network.null_label = 0
            trained = TrainedNetwork(network, OPTIONS, HERE, Precision(memory_format=memory_format))
            if state is not None:
                trained.load_state_dict(state)
            for update in range(10, 13):
                trained.descend(trained.network(x).square().mean(), update)
            state = trained.state_dict()
        results.append(trained.network.weight.detach())
    for other in results[1:]:
        torch.testing.assert_close(results[0], other, rtol=1e-4, atol=1e-5)


@dataclass(frozen=True)
class Duel:
    """A task whose learner has two networks with an optimizer each, as a second stage has."""

    optimizer: OptimizerConfig

    def build(self, worker: training.Worker) -> training.Learner:
        return DuelLearner(self.optimizer, worker)


class DuelLearner:
    """Two networks that approach each other; the first becomes the model."""

    def __init__(self, options: OptimizerConfig, worker: training.Worker) -> None:
        torch.manual_seed(0)
        self.student, self.critic = (TrainedNetwork(Linear(), options, worker) for _ in range(2))

    def update(self, number: int) -> training.Progress:
        distance = (self.student.network.weight - self.critic.network.weight.detach()).square().mean()
        self.student.descend(distance, number)
        other = (self.critic.network.weight - self.student.network.weight.detach()).square().mean()
        self.critic.descend(other, number)
        return training.Progress({"student": distance.detach(), "critic": other.detach()}, {})

    def learning_rate(self) -> float:
        return self.student.learning_rate()

    def state_dict(self) -> dict:
        return {**self.student.state_dict(), "critic": self.critic.state_dict()}

    def load_state_dict(self, state: dict) -> None:
        self.student.load_state_dict(state)
        self.critic.load_state_dict(state["critic"])


def test_a_learner_of_two_networks_resumes_and_logs_its_parts_by_name(tmp_path: Path):
    logged: list[dict[str, float]] = []

    class Kept(TrackedRun):
        def metrics(self, values: dict[str, float], step: int = 0) -> None:
            logged.append(values)

    def duel(folder: str) -> training.Job:
        return training.Job(Duel(OPTIONS), "duel", str(tmp_path / folder), Kept("", ""), 10)

    whole = training.train(duel("whole"), HERE_ALONE)
    for values in logged:
        assert values["loss"] == pytest.approx(values["loss/student"] + values["loss/critic"])
    state: list[bytes] = []
    run_updates(duel("part"), HERE, lambda metrics, saved: state.append(saved), None)
    resumed = run_updates(duel("part"), HERE, _ignore, state[2])
    assert_same(whole, torch.load(io.BytesIO(resumed), weights_only=True)["learner"]["average"])


def test_a_network_trains_in_bfloat16(tmp_path: Path):
    learner = TrainedNetwork(Linear(), OPTIONS, HERE, Precision(dtype="bfloat16"))
    x = torch.randn(8, 5)
    assert learner.forward(x, None, None).dtype == torch.float32
    before = learner.network.weight.clone()
    learner.descend(learner.forward(x, None, None).square().mean(), 10)
    assert learner.network.weight.dtype == torch.float32
    assert not torch.equal(before, learner.network.weight)

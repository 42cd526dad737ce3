"""The training loop: results, resuming, and refused options."""

import gc
import io
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from mlflow import MlflowClient
from torch import Tensor, nn

from kac.losses import LossTerms
from kac.precision import Precision
from kac.util.errors import ArgumentError, DistillKacError, DivergedError
from pipeline import tracking, training
from pipeline.config import OptimizerConfig, SampleSpec, SweepSpec
from pipeline.distill import distill
from pipeline.sweep import sweep
from pipeline.teach import teach
from pipeline.tracking import TrackedRun
from pipeline.training.batches import (
    BATCHES_AHEAD,
    EpochOrder,
    Prefetcher,
    prefetched,
    slot_generator,
    update_generator,
)
from pipeline.training.learner import learning_rate
from pipeline.training.loop import run_updates
from tests.pipeline.stages import FEW, distill_spec, teach_spec

DIAGNOSTICS = {"learning_rate", "gradient_norm", "samples_per_second", "peak_memory_bytes"}


class NoTracking(TrackedRun):
    """A run that checks its metrics and logs nothing."""

    def metrics(self, values: dict[str, float], step: int = 0) -> None:
        assert set(values) == {"loss", "loss/regression", *DIAGNOSTICS}
        assert values["peak_memory_bytes"] > 1e6


UNTRACKED = NoTracking("", "")
HERE = training.Worker(0, 1, torch.device("cpu"))
THIS_PROCESS = training.WorkerGroup(0)


@dataclass(frozen=True)
class Regression:
    """Fits a linear map to 64 fixed points, which the workers split as they split a batch."""

    optimizer: OptimizerConfig
    poison_at: int = -1

    def build(self, worker: training.Worker) -> training.Learner:
        points = torch.randn(64, 5, generator=torch.Generator().manual_seed(1))
        target = points @ torch.arange(10.0).reshape(5, 2)
        torch.manual_seed(0)

        def losses(network: nn.Module, micro: training.MicroBatch) -> LossTerms:
            x, y = micro.share(points), micro.share(target)
            value = (network(x, None, None) - y).square().mean()
            return LossTerms({"regression": value * float("nan") if micro.update == self.poison_at else value})

        return training.Learner(Linear(), losses, self.optimizer, worker)


class Linear(nn.Linear):
    """A linear map that is called like a velocity network."""

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


def test_training_reduces_the_error_and_returns_the_average(tmp_path: Path):
    weights = training.train(job(tmp_path, Regression(OPTIONS)), THIS_PROCESS)
    state = run_updates(job(tmp_path, Regression(OPTIONS)), HERE, _ignore, None)
    trained = torch.load(io.BytesIO(state), weights_only=True)["learner"]
    assert_same(weights, trained["average"])
    assert not torch.equal(weights["weight"], trained["network"]["weight"])
    error = (trained["network"]["weight"] - torch.arange(10.0).reshape(5, 2).T).abs().max()
    assert error < (nn.Linear(5, 2).weight - torch.arange(10.0).reshape(5, 2).T).abs().max() / 2


def _ignore(metrics: dict[str, float], state: bytes) -> None:
    """Report nothing."""


@pytest.mark.parametrize("stop_after", [10, 30, 50])
def test_a_resumed_run_equals_an_uninterrupted_run(tmp_path: Path, stop_after: int):
    whole = training.train(job(tmp_path / "whole", Regression(OPTIONS)), THIS_PROCESS)

    class Stopped(Exception):
        pass

    def stop(metrics: dict[str, float]) -> None:
        if metrics["update"] == stop_after:
            raise Stopped

    stopped = job(tmp_path / "stopped", Regression(OPTIONS))
    with pytest.raises(Stopped):
        training.train(stopped, THIS_PROCESS, on_report=stop)
    assert_same(whole, training.train(stopped, THIS_PROCESS))


def test_metrics_are_flushed_before_their_checkpoint_is_reported(tmp_path: Path):
    events: list[str] = []

    class Recorded(TrackedRun):
        def metrics(self, values: dict[str, float], step: int = 0) -> None:
            events.append(f"metrics {step}")

        def flush(self, seconds: float = 0.0) -> bool:
            events.append("flush")
            return True

    watched = training.Job(Regression(OPTIONS), "test", str(tmp_path), Recorded("", ""), 55)
    training.train(watched, THIS_PROCESS, on_report=lambda metrics: events.append(f"report {metrics['update']:.0f}"))
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
            training.train(resumed, THIS_PROCESS, on_report=stop)
        training.train(resumed, THIS_PROCESS)
        run.flush()
    steps = [point.step for point in MlflowClient().get_metric_history(run.run_id, "loss")]
    assert steps == [50, 100, 150, 200, 250, 300]


def test_a_run_restarted_without_a_checkpoint_logs_no_update_twice(tmp_path: Path):
    with tracking.start_run(
        spec=SampleSpec(model="m", out="o.png"), fingerprint="f", inputs={}, output=str(tmp_path)
    ) as run:
        for updates in (60, 120):
            options = OPTIONS.model_copy(update={"updates": updates})
            run_updates(training.Job(Regression(options), "test", str(tmp_path), run, 500), HERE, _ignore, None)
            run.flush()
    steps = [point.step for point in MlflowClient().get_metric_history(run.run_id, "loss")]
    assert steps == [50, 60, 100, 120]


def test_a_loss_that_is_not_finite_ends_the_run_without_a_checkpoint(tmp_path: Path):
    poisoned = job(tmp_path, Regression(OPTIONS, poison_at=9))
    with pytest.raises(DivergedError, match="nan at update 10"):
        training.train(poisoned, THIS_PROCESS)
    assert not (tmp_path / "training" / "state.pt").exists()


def test_a_batch_that_does_not_fit_on_the_gpu_ends_with_advice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def fail(*args: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(training.Learner, "update", fail)
    with pytest.raises(DistillKacError, match="accumulation"):
        training.train(job(tmp_path, Regression(OPTIONS)), THIS_PROCESS)


def test_a_batch_that_the_workers_cannot_split_is_refused_before_a_run_starts(
    small_store: str, tmp_path: Path, ray_cluster: None
):
    stages = [
        lambda: teach(teach_spec(tmp_path / "teacher", workers=3)),
        lambda: distill(distill_spec(small_store, tmp_path / "student", workers="1:3")),
        lambda: sweep(SweepSpec(store=small_store, out=str(tmp_path / "sweep"), optimizer=FEW, workers=3)),
    ]
    for stage in stages:
        with pytest.raises(ArgumentError, match=r"(1:)?3, .* batch of 64") as refusal:
            stage()
        assert refusal.value.name == "workers"
    assert not list(tmp_path.rglob("run.json"))


def test_the_learning_rate_warms_up_and_decays_to_zero():
    unit = OPTIONS.model_copy(update={"learning_rate": 1.0})
    factors = [learning_rate(update, unit) for update in range(OPTIONS.updates)]
    assert factors[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert all(a >= b for a, b in itertools.pairwise(factors[4:]))
    assert 0 < factors[-1] < 0.01
    constant = unit.model_copy(update={"schedule": "constant"})
    assert [learning_rate(update, constant) for update in (0, 4, 5, 59)] == pytest.approx([0.2, 1.0, 1.0, 1.0])


@pytest.mark.parametrize(("count", "batch"), [(10, 4), (7, 20), (5, 5)])
def test_every_row_is_drawn_once_per_epoch(count: int, batch: int):
    order = EpochOrder(3, count, batch)
    drawn = torch.cat([order.batch(update) for update in range(30)])
    for epoch in range(len(drawn) // count):
        rows = drawn[epoch * count : (epoch + 1) * count]
        assert sorted(rows.tolist()) == list(range(count))
    assert not torch.equal(drawn[:count], drawn[count : 2 * count])
    resumed = EpochOrder(3, count, batch)
    assert torch.equal(torch.cat([resumed.batch(update) for update in range(13, 30)]), drawn[13 * batch :])


def test_an_epoch_is_shuffled_once(monkeypatch: pytest.MonkeyPatch):
    shuffled = []
    real = EpochOrder._shuffle
    monkeypatch.setattr(EpochOrder, "_shuffle", lambda self, epoch: shuffled.append(epoch) or real(self, epoch))
    order = EpochOrder(0, 10, 4)
    for update in range(10):
        order.batch(update)
    assert shuffled == [0, 1, 2, 3]


def test_random_numbers_differ_by_seed_update_and_rank():
    first = training.MicroBatch(0, 0, 2, training.Worker(0, 2, torch.device("cpu")))
    keys = [(0, first), (0, first.next()), (0, first.next().next()), (1, first)]
    keys.append((0, first._replace(worker=first.worker._replace(rank=1))))
    draws = [torch.rand(4, generator=slot_generator(*key)).tolist() for key in keys]
    draws += [torch.rand(4, generator=update_generator(*key)).tolist() for key in ((0, 0), (0, 1), (1, 0))]
    assert len({tuple(draw) for draw in draws}) == 8
    assert torch.rand(4, generator=slot_generator(*keys[0])).tolist() == draws[0]


def test_every_row_is_in_the_same_slot_for_every_split_of_the_batch():
    rows = torch.arange(24)
    splits = [(1, 6), (2, 3), (3, 2), (6, 1)]
    slots = []
    for workers, accumulation in splits:
        micro = [
            training.MicroBatch(0, n, accumulation, training.Worker(rank, workers, torch.device("cpu")))
            for rank in range(workers)
            for n in range(accumulation)
        ]
        slots.append({each.slot: each.share(rows).tolist() for each in micro})
    assert all(each == slots[0] for each in slots)
    assert sorted(row for part in slots[0].values() for row in part) == rows.tolist()


def test_accumulated_passes_equal_one_batch(tmp_path: Path):
    whole = training.train(job(tmp_path / "whole", Regression(OPTIONS)), THIS_PROCESS)
    options = OPTIONS.model_copy(update={"accumulation": 4})
    assert_same(whole, training.train(job(tmp_path / "parts", Regression(options)), THIS_PROCESS), tolerance=1e-5)
    with pytest.raises(ArgumentError, match="4 parts of a batch of 64") as refusal:
        training.check_batch_split(options, 32)
    assert refusal.value.name == "workers"
    training.check_batch_split(options, 16)
    with pytest.raises(ArgumentError, match="3") as refusal:
        OptimizerConfig(batch_size=64, accumulation=3)
    assert refusal.value.name == "accumulation"


def test_a_prefetcher_returns_the_requested_batches():
    calls = []

    def make(micro: training.MicroBatch) -> tuple[Tensor]:
        calls.append(micro)
        if micro.update == 9:
            raise DistillKacError("update 9 is damaged")
        return (torch.tensor([micro.update, micro.number]),)

    prefetcher, micro = Prefetcher(make), training.MicroBatch(3, 0, 2, HERE)
    for update in (3, 4):
        for number in (0, 1):
            assert prefetcher(micro)[0].tolist() == [update, number]
            micro = micro.next()
    prefetcher.thread.shutdown()
    assert len(calls) <= 4 + BATCHES_AHEAD
    prefetcher = Prefetcher(make)
    micro = micro._replace(update=8, number=1)
    assert prefetcher(micro)[0].tolist() == [8, 1]
    with pytest.raises(DistillKacError, match="update 9 is damaged"):
        prefetcher(micro.next())


def test_batches_are_prefetched_only_for_a_gpu():
    def make(micro: training.MicroBatch) -> tuple[Tensor]:
        return (torch.zeros(1),)

    assert prefetched(make, torch.device("cpu")) is make
    assert isinstance(prefetched(make, torch.device("cuda")), Prefetcher)


def test_the_thread_ends_with_its_prefetcher():
    prefetcher = Prefetcher(lambda micro: (torch.zeros(1),))
    prefetcher(training.MicroBatch(0, 0, 1, HERE))
    (thread,) = prefetcher.thread._threads
    del prefetcher
    gc.collect()
    thread.join(10)
    assert not thread.is_alive()


def test_training_resumes_from_a_state_with_a_different_memory_format():
    """The fused optimizer depends on the memory layout of its state."""
    x = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    results = []
    for formats in (("contiguous", "contiguous"), ("channels_last", "contiguous"), ("contiguous", "channels_last")):
        torch.manual_seed(0)
        networks, state = [nn.Conv2d(3, 8, 3), nn.Conv2d(3, 8, 3)], None
        for network, memory_format in zip(networks, formats, strict=True):
            network.null_label = 0

            def losses(network: nn.Module, micro: training.MicroBatch) -> LossTerms:
                return LossTerms({"square": network(x).square().mean()})

            learner = training.Learner(network, losses, OPTIONS, HERE, Precision(memory_format=memory_format))
            learner.forward = network
            if state is not None:
                learner.load_state_dict(state)
            for update in range(10, 13):
                learner.update(update)
            state = learner.state_dict()
        results.append(learner.network.weight.detach())
    for other in results[1:]:
        torch.testing.assert_close(results[0], other, rtol=1e-4, atol=1e-5)


@dataclass(frozen=True)
class Duel:
    """A task whose learner has two networks with one optimizer each."""

    optimizer: OptimizerConfig

    def build(self, worker: training.Worker) -> training.Learner:
        torch.manual_seed(0)
        return DuelLearner(self.optimizer, worker)


class DuelLearner(training.Learner):
    """Trains two networks to approach each other. The first becomes the model."""

    def __init__(self, options: OptimizerConfig, worker: training.Worker) -> None:
        def losses_to(name: str, other: Linear) -> Callable[..., LossTerms]:
            return lambda network, micro: LossTerms({name: (network.weight - other.weight.detach()).square().mean()})

        student, critic = Linear(), Linear()
        super().__init__(student, losses_to("student", critic), options, worker)
        self.critic = training.Learner(critic, losses_to("critic", student), options, worker)

    def update(self, number: int) -> LossTerms:
        mine, critics = super().update(number), self.critic.update(number)
        return LossTerms({**mine.losses, **critics.losses}, mine.diagnostics)

    def state_dict(self) -> dict:
        return {**super().state_dict(), "critic": self.critic.state_dict()}

    def load_state_dict(self, state: dict) -> None:
        super().load_state_dict(state)
        self.critic.load_state_dict(state["critic"])


def test_a_learner_with_two_networks_resumes_and_logs_its_losses_by_name(tmp_path: Path):
    logged: list[dict[str, float]] = []

    class Kept(TrackedRun):
        def metrics(self, values: dict[str, float], step: int = 0) -> None:
            logged.append(values)

    def duel(folder: str) -> training.Job:
        return training.Job(Duel(OPTIONS), "duel", str(tmp_path / folder), Kept("", ""), 10)

    whole = training.train(duel("whole"), THIS_PROCESS)
    for values in logged:
        assert values["loss"] == pytest.approx(values["loss/student"] + values["loss/critic"])
    state: list[bytes] = []
    run_updates(duel("part"), HERE, lambda metrics, saved: state.append(saved), None)
    resumed = run_updates(duel("part"), HERE, _ignore, state[2])
    assert_same(whole, torch.load(io.BytesIO(resumed), weights_only=True)["learner"]["average"])


def test_a_network_trains_in_bfloat16():
    x = torch.randn(8, 5)

    def losses(network: nn.Module, micro: training.MicroBatch) -> LossTerms:
        made = network(x, None, None)
        assert made.dtype == torch.float32
        return LossTerms({"square": made.square().mean()})

    learner = training.Learner(Linear(), losses, OPTIONS, HERE, Precision(dtype="bfloat16"))
    before = learner.network.weight.clone()
    learner.update(10)
    assert learner.network.weight.dtype == torch.float32
    assert not torch.equal(before, learner.network.weight)

"""The host does not wait for a GPU in solver steps, network calls, training updates and rollout batches."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
import torch

from kac.losses import EndpointConfig, FlowMapConfig, Interval, ReflowConfig
from kac.losses.refinement import DataRefinementConfig, RefinementDistance, SpaceName
from kac.networks import Condition
from kac.precision import Precision
from kac.sampling import Sampling, generate
from kac.solvers import SolverName
from pipeline import training
from pipeline.distill import DistillTask
from pipeline.rollout import make_plan
from pipeline.rollout.shard_maker import FrozenTeacher
from pipeline.teach import TeachTask
from tests.host_reads import host_reads
from tests.kac.diffusers_folders import SHAPE
from tests.kac.every_network import CONFIGS, network_of
from tests.pipeline.stages import FEW, distill_spec, teach_spec
from tests.pipeline.stores import make_spec

HERE = training.Worker(0, 1, torch.device("cpu"))
X_1, LABEL = torch.randn(4, *SHAPE), torch.tensor([0, 1, 2, 0])

TIME_GRID = Counter({"kac/solvers.py solve": 2})
"""Checking and reading a solver's time grid, once per solution. The grid is on the CPU."""

TIMES_ON_THE_CPU = Counter({"kac/process.py sample": 1})
"""The check of a Kac process's times, which is left out on a GPU."""


def sampling_reads(network: Any, w: float, steps: int, solver: SolverName) -> Counter[str]:
    return host_reads(lambda: generate(network, X_1, LABEL, Sampling(w, steps, solver)))


def update_reads(learner: training.Learner, number: int = 1) -> Counter[str]:
    """The reads of an update after the first."""
    learner.update(number - 1)
    return host_reads(lambda: learner.update(number))


@pytest.mark.parametrize("work", [lambda x: x[0].item(), lambda x: x[x > 0], lambda x: x.tolist(), lambda x: x.cpu()])
@pytest.mark.parametrize("place", [torch.enable_grad, torch.inference_mode])
def test_a_read_in_a_network_is_counted_at_every_step(work: Callable[[Any], Any], place: Any):
    def network(x, t, label):
        with place():
            work(x.flatten())
        return x

    network.null_label = None
    assert sampling_reads(network, 0.0, 3, "euler") == TIME_GRID + Counter({"kac/guidance.py __call__": 3})


@pytest.mark.parametrize("steps", [2, 5])
@pytest.mark.parametrize("solver", get_args(SolverName))
@pytest.mark.parametrize("guidance", ["none", "null label", "guide"])
def test_a_solver_reads_only_its_time_grid(solver: SolverName, guidance: str, steps: int):
    network = network_of("mlp")
    network.guide = network_of("mlp") if guidance == "guide" else None
    assert sampling_reads(network, 0.0 if guidance == "none" else 1.5, steps, solver) == TIME_GRID


@pytest.mark.parametrize("precision", [Precision(), Precision(dtype="bfloat16", memory_format="channels_last")])
@pytest.mark.parametrize("kind", CONFIGS)
def test_no_network_reads_anything_in_sampling(kind: str, precision: Precision):
    teacher, flow_map = network_of(kind).eval(), network_of(kind, ("end_time",)).eval()
    both = network_of(kind, ("end_time", "guidance")).eval()
    assert sampling_reads(precision.wrap(teacher), 1.5, 2, "ab2") == TIME_GRID
    for steps in (1, 4):
        for network in (teacher, flow_map, both):
            assert sampling_reads(precision.wrap(network), 0.0, steps, "euler") == TIME_GRID


@pytest.mark.parametrize("path", ["kac", "gaussian"])
@pytest.mark.parametrize("kind", ["mlp", "unet", "dit"])
def test_an_update_of_a_teacher_reads_nothing(kind: str, path: str, tmp_path: Path):
    spec = teach_spec(tmp_path, data="digits", network=CONFIGS[kind](), path=path)
    assert update_reads(TeachTask(spec).build(HERE)) == (TIMES_ON_THE_CPU if path == "kac" else Counter())


def interval() -> Interval:
    """A batch of intervals of digits."""
    return Interval(*torch.randn(2, 4, *SHAPE), torch.ones(4), torch.full((4,), 0.5), LABEL, torch.zeros(4))


@pytest.mark.parametrize("takes", [(), ("guidance",)])
@pytest.mark.parametrize("config", [EndpointConfig(), FlowMapConfig(), ReflowConfig(loss="huber", scales=2)])
@pytest.mark.parametrize("kind", CONFIGS)
def test_an_update_of_a_student_reads_nothing(kind: str, config: Any, takes: tuple[Condition, ...]):
    objective, part = config.build(2, takes), interval()
    network = network_of(kind, objective.conditions)
    learner = training.Learner(network, lambda network, micro: objective.losses(network, part), FEW, HERE)
    assert update_reads(learner) == Counter()


@pytest.mark.parametrize("objective", ["endpoint", {"kind": "flow-map", "grids": (1, 2, 4)}, "reflow"])
@pytest.mark.parametrize("space", ["pixels", "random", "teacher"])
@pytest.mark.parametrize("distance", get_args(RefinementDistance))
def test_an_update_of_refinement_reads_nothing(
    distance: RefinementDistance, space: SpaceName, objective: Any, small_store: str, teacher: str, tmp_path: Path
):
    refine = DataRefinementConfig(distance=distance, spaces=(space,), real_images=300, steps=(1, 4))
    part = Interval(*torch.randn(2, 64, 2), torch.ones(64), torch.zeros(64), torch.arange(64) % 2, torch.zeros(64))
    spec = distill_spec(small_store, tmp_path, objective=objective, refine=refine)
    learner = DistillTask(spec, teacher, lambda update: part).build(HERE)
    for number in (1, 2):  # 4 steps and 1 step
        assert update_reads(learner, number) == TIME_GRID + TIMES_ON_THE_CPU


@pytest.mark.parametrize("guidance", [0.0, 1.0])
@pytest.mark.parametrize("source", ["trajectory", "forward"])
def test_a_batch_of_a_rollout_reads_the_same_for_any_number_of_steps(
    source: str, guidance: float, teacher: str, tmp_path: Path
):
    def reads(steps: int) -> Counter[str]:
        spec = make_spec(tmp_path, teacher, solver_steps=steps, knots=2, source=source)
        follower = FrozenTeacher(spec, make_plan(spec).identity)
        return host_reads(lambda: follower.follow(guidance, range(20)))

    assert reads(4) == reads(10)

"""The bare loop that a rollout actor is held against: the teacher on the same batches, in a process that keeps nothing.

``python -m pipeline.benchmark.bare`` reads a rollout spec as JSON from standard input and prints seconds and rows.
"""

import json
import sys
import time

import torch
from torch import Tensor

from kac import identity
from kac.checkpoint import Model, load_model
from kac.guidance import guide
from kac.solvers import solve, uniform_times
from pipeline.config import RolloutSpec


def device() -> torch.device:
    """Where an actor computes."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def prepare(spec: RolloutSpec, model: Model) -> list[tuple[Tensor, Tensor]]:
    """Noise and labels of every batch of the rollout, on the device."""
    stop, config = spec.first_sample + spec.trajectories, model.config
    batches = [
        range(start, min(start + spec.batch_size, stop)) for start in range(spec.first_sample, stop, spec.batch_size)
    ]
    path = config.path.build()
    return [
        (
            identity.noise(path, spec.seed, ids, config.sample_shape).to(device()),
            identity.labels(spec.seed, ids, config.class_frequencies).to(device()),
        )
        for ids in batches
    ]


@torch.inference_mode()
def follow(spec: RolloutSpec, model: Model, noise: Tensor, label: Tensor) -> Tensor:
    """Where the teacher takes ``noise`` [batch, *sample]."""
    velocity = guide(model.network, spec.guidance[0]).given(label)
    return solve(velocity, noise, uniform_times(spec.solver_steps), spec.solver).x


def main() -> None:
    """Time the loop over all batches after one to warm up."""
    spec = RolloutSpec(**json.load(sys.stdin))
    model = load_model(spec.teacher, device())
    batches = prepare(spec, model)
    follow(spec, model, *batches[0])
    _wait()
    started = time.perf_counter()
    for noise, label in batches:
        follow(spec, model, noise, label)
    _wait()
    print(json.dumps({"seconds": time.perf_counter() - started, "rows": spec.trajectories}), flush=True)


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()

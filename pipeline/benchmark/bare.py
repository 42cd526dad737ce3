"""The bare loop to compare a rollout actor with: the teacher on the same batches, in a process that keeps nothing.

``python -m pipeline.benchmark.bare`` reads a rollout spec as JSON from standard input and prints seconds and rows.
"""

import json
import sys
import time

import torch
from torch import Tensor

from kac.checkpoint import Model, load_model
from kac.device import default_device
from kac.sampling import Sampling, generate, initial_noise
from pipeline.config import RolloutSpec


def prepare(spec: RolloutSpec, model: Model) -> list[tuple[Tensor, Tensor]]:
    """Noise and labels of every batch of the rollout, on the device."""
    stop, device = spec.first_sample + spec.trajectories, default_device()
    batches = []
    for start in range(spec.first_sample, stop, spec.batch_size):
        x_1, label = initial_noise(model.config, spec.seed, range(start, min(start + spec.batch_size, stop)))
        batches.append((x_1.to(device), label.to(device)))
    return batches


def follow(spec: RolloutSpec, model: Model, x_1: Tensor, label: Tensor) -> Tensor:
    """Where the teacher takes noise ``x_1`` [batch, *sample]."""
    sampling = Sampling(spec.guidance[0], spec.solver_steps, spec.solver, spec.knot_grid)
    return generate(spec.precision.wrap(model.network), x_1, label, sampling).x


def main() -> None:
    """Time the loop over all batches after one to warm up."""
    spec = RolloutSpec(**json.load(sys.stdin))
    model = load_model(spec.teacher, default_device())
    batches = prepare(spec, model)
    follow(spec, model, *batches[0])
    _wait()
    started = time.perf_counter()
    for x_1, label in batches:
        follow(spec, model, x_1, label)
    _wait()
    print(json.dumps({"seconds": time.perf_counter() - started, "rows": spec.trajectories}), flush=True)


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()

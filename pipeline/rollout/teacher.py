"""The frozen teacher and how it is followed: sample ids to rows, in batches. Knows nothing of Ray."""

from collections.abc import Sequence

import numpy as np
import torch

from kac import noise
from kac.checkpoint import load_model
from kac.data import open_dataset
from kac.device import default_device
from kac.errors import DistillKacError
from kac.guidance import guide
from kac.solvers import knot_times, solve
from pipeline.config import RolloutSpec
from pipeline.store.layout import INTERVAL, KINETIC_ENERGY, LABEL, StoreIdentity


class RolloutError(DistillKacError):
    """The rollout cannot go on; the message names the shard."""


Rows = dict[str, np.ndarray]
"""Rows by column: [rows], or [rows, *sample_shape] for a knot."""


def join(parts: Sequence[Rows]) -> Rows:
    """The parts one after the other."""
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


class FrozenTeacher:
    """The teacher of a rollout, loaded once a process."""

    def __init__(self, spec: RolloutSpec, identity: StoreIdentity) -> None:
        self.identity, self.batch_size = identity, spec.batch_size
        self.device = default_device()
        network, self.config = load_model(spec.teacher, self.device)
        expected, found = identity.teacher_sha256, self.config.weights_sha256
        if found != expected:
            changed = f"expected weights {expected[:12]}..., found {found[:12]}...: the teacher changed"
            raise RolloutError(f"{spec.teacher}: {changed} while the rollout ran")
        self.network = spec.precision.wrap(network)
        self.path = identity.path.build()
        self.times = knot_times(identity.solver_steps, identity.knot_grid)
        self.steps_a_knot = identity.solver_steps // identity.knots

    def follow(self, guidance: float, ids: range) -> Rows:
        """The rows of the samples ``ids``, in batches."""
        size = self.batch_size
        batches = [range(start, min(start + size, ids.stop)) for start in range(ids.start, ids.stop, size)]
        sources = {"trajectory": self._trajectories, "forward": self._forward}
        return join([sources[self.identity.source](guidance, batch) for batch in batches])

    @torch.inference_mode()
    def _trajectories(self, guidance: float, ids: range) -> Rows:
        identity = self.identity
        label = noise.labels(identity.seed, ids, identity.class_frequencies)
        x_1 = noise.noise(self.path, identity.seed, ids, identity.sample_shape)
        velocity = guide(self.network, guidance, label.to(self.device))
        keep = range(0, identity.solver_steps + 1, self.steps_a_knot)
        solution = solve(velocity, x_1.to(self.device), self.times, identity.solver, keep=keep)
        return self._rows(label, solution.kinetic_energy, solution.knots)

    @torch.inference_mode()
    def _forward(self, guidance: float, ids: range) -> Rows:
        """Noise a data point to the start of an interval, follow the teacher to its end (2509.21513, Alg. 1)."""
        identity, data = self.identity, open_dataset(self.config.data).train
        point, interval = noise.data_points(identity.seed, ids, len(data), identity.knots)
        images, label = data.rows(point)
        uniforms = noise.noise_uniforms(self.path, identity.seed, ids, identity.sample_shape)
        start = torch.empty((len(ids), *identity.sample_shape))
        end, energy = torch.empty_like(start), torch.empty(len(ids))
        for k in sorted(set(interval.tolist())):
            rows = interval == k
            times = self.times[k * self.steps_a_knot : (k + 1) * self.steps_a_knot + 1]
            start[rows] = self.path.point(images[rows], times[0].item(), uniforms[:, rows]).float()
            at_start = start[rows].to(self.device)
            velocity = guide(self.network, guidance, label[rows].to(self.device))
            solution = solve(velocity, at_start, times, identity.solver)
            end[rows], energy[rows] = solution.x.cpu(), solution.kinetic_energy.cpu()
        return {INTERVAL: interval.numpy(), **self._rows(label, energy, [start, end])}

    def _rows(self, label: torch.Tensor, energy: torch.Tensor, knots: Sequence[torch.Tensor]) -> Rows:
        dtype = getattr(torch, self.identity.dtype)
        named = zip(self.identity.knot_columns, knots, strict=True)
        stored = {name: knot.to(dtype).cpu().numpy() for name, knot in named}
        return {LABEL: label.numpy(), KINETIC_ENERGY: energy.cpu().numpy(), **stored}

"""The frozen teacher and how it is followed: sample ids to rows, in batches. Knows nothing of Ray."""

from collections.abc import Sequence

import numpy as np
import torch

from kac import noise
from kac.conditioning import network_labels
from kac.data import open_dataset
from kac.guidance import guide
from kac.model import load_model
from kac.precision import Precision
from kac.solvers import knot_times, solve
from kac.util.device import default_device
from kac.util.errors import DistillKacError
from pipeline.config.specs import RolloutSpec
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

    @property
    def on_gpu(self) -> bool:
        """Whether it computes on a GPU."""
        return self.device.type == "cuda"

    def follow(self, guidance: float, ids: range) -> Rows:
        """The rows of the samples ``ids``, in batches: those of one leave the device while the next is computed."""
        size = self.batch_size
        batches = [range(start, min(start + size, ids.stop)) for start in range(ids.start, ids.stop, size)]
        source = {"trajectory": self._trajectories, "forward": self._forward}[self.identity.source]
        parts, leaving = [], source(guidance, batches[0])
        for batch in batches[1:]:
            following = source(guidance, batch)
            parts.append(leaving.rows())
            leaving = following
        return join([*parts, leaving.rows()])

    @torch.inference_mode()
    def _trajectories(self, guidance: float, ids: range) -> "_Leaving":
        identity = self.identity
        label = network_labels(self.config, noise.labels(identity.seed, ids, identity.class_frequencies))
        x_1 = noise.noise(self.path, identity.seed, ids, identity.sample_shape)
        velocity = guide(self.network, guidance, self._on_device(label))
        keep = range(0, identity.solver_steps + 1, self.steps_a_knot)
        solution = solve(velocity, self._on_device(x_1), self.times, identity.solver, keep=keep)
        return self._leave(label, solution.kinetic_energy, solution.knots)

    @torch.inference_mode()
    def _forward(self, guidance: float, ids: range) -> "_Leaving":
        """Noise a data point to the start of an interval, follow the teacher to its end (2509.21513, Alg. 1)."""
        identity, data = self.identity, open_dataset(self.config.data).train
        point, interval = noise.data_points(identity.seed, ids, len(data), identity.knots)
        images, classes = data.rows(point)
        label = network_labels(self.config, classes)
        uniforms = noise.noise_uniforms(self.path, identity.seed, ids, identity.sample_shape)
        start = torch.empty((len(ids), *identity.sample_shape))
        end = torch.empty(start.shape, device=self.device)
        energy = torch.empty(len(ids), device=self.device)
        for k in sorted(set(interval.tolist())):
            rows = torch.nonzero(interval == k)[:, 0]
            times = self.times[k * self.steps_a_knot : (k + 1) * self.steps_a_knot + 1]
            start[rows] = self.path.point(images[rows], times[0].item(), uniforms[:, rows]).float()
            velocity = guide(self.network, guidance, self._on_device(label[rows]))
            solution = solve(velocity, self._on_device(start[rows]), times, identity.solver)
            there = self._on_device(rows)
            end[there], energy[there] = solution.x, solution.kinetic_energy
        return self._leave(label, energy, [start, end], interval)

    def _on_device(self, values: torch.Tensor) -> torch.Tensor:
        """A copy that nobody waits for."""
        return values.pin_memory().to(self.device, non_blocking=True) if self.on_gpu else values

    def _leave(
        self,
        label: torch.Tensor,
        energy: torch.Tensor,
        knots: Sequence[torch.Tensor],
        interval: torch.Tensor | None = None,
    ) -> "_Leaving":
        dtype = getattr(torch, self.identity.dtype)
        named = zip(self.identity.knot_columns, knots, strict=True)
        first = {} if interval is None else {INTERVAL: interval}
        return _Leaving(
            {**first, LABEL: label, KINETIC_ENERGY: energy, **{name: knot.to(dtype) for name, knot in named}}
        )


class _Leaving:
    """Tensors on their way from the device to memory; the device goes on meanwhile."""

    def __init__(self, columns: dict[str, torch.Tensor]) -> None:
        self.columns = {name: self._begin(values) for name, values in columns.items()}
        self.arrived = None
        if any(values.is_cuda for values in columns.values()):
            self.arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self.arrived.record()

    def rows(self) -> Rows:
        """All of them, once they are there."""
        if self.arrived is not None:
            self.arrived.synchronize()
        return {name: values.numpy() for name, values in self.columns.items()}

    @staticmethod
    def _begin(values: torch.Tensor) -> torch.Tensor:
        if not values.is_cuda:
            return values
        return torch.empty(values.shape, dtype=values.dtype, pin_memory=True).copy_(values, non_blocking=True)


CHECKED_TRAJECTORIES = 64


def endpoint_rms(spec: RolloutSpec, identity: StoreIdentity) -> float:
    """How far the rollout's precision moves the ends of trajectories: the root mean square difference to float32.

    Of the first samples that the seed has, at the largest of the guidance scales.
    """
    ids, w = range(min(CHECKED_TRAJECTORIES, spec.trajectories)), max(spec.guidance, key=abs)
    unrounded = identity.model_copy(update={"dtype": "float32"})
    ends = []
    for dtype in (spec.precision.dtype, "float32"):
        precision = Precision(dtype=dtype, compile=False)
        teacher = FrozenTeacher(spec.model_copy(update={"precision": precision}), unrounded)
        ends.append(teacher.follow(w, ids)[identity.knot_columns[-1]].astype(np.float64))
    return float(np.sqrt(np.square(ends[0] - ends[1]).mean()))

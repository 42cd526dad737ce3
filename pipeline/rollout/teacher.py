"""The frozen teacher: computes the rows of sample ids in batches, without Ray."""

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
from pipeline.config import RolloutSpec
from pipeline.store.layout import INTERVAL, KINETIC_ENERGY, LABEL, StoreIdentity


class RolloutError(DistillKacError):
    """The rollout failed. If a shard failed, the message names it."""


Rows = dict[str, np.ndarray]
"""Rows by column name: [rows], or [rows, *sample_shape] for a knot."""


def join(parts: Sequence[Rows]) -> Rows:
    """Concatenate the parts."""
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


class FrozenTeacher:
    """The teacher of a rollout, loaded once per process."""

    def __init__(self, spec: RolloutSpec, identity: StoreIdentity) -> None:
        self.identity, self.batch_size = identity, spec.batch_size
        self.device = default_device()
        network, self.config = load_model(spec.teacher, self.device)
        if self.config.weights_sha256 != identity.teacher_sha256:
            raise RolloutError(
                f"{spec.teacher} changed during the rollout: the sha256 of its weights was "
                f"{identity.teacher_sha256[:12]}..., and is now {self.config.weights_sha256[:12]}.... Restore the "
                "teacher, or choose another `store`."
            )
        self.network = spec.precision.wrap(network)
        self.path = identity.path.build()
        self.times = knot_times(identity.solver_steps, identity.knot_grid)
        self.steps_per_interval = identity.solver_steps // identity.knots

    @property
    def on_gpu(self) -> bool:
        """Whether the teacher runs on a GPU."""
        return self.device.type == "cuda"

    def follow(self, guidance: float, ids: range) -> Rows:
        """Compute the rows of the samples ``ids``. Each batch leaves the device while the next one is computed."""
        size = self.batch_size
        batches = [range(start, min(start + size, ids.stop)) for start in range(ids.start, ids.stop, size)]
        compute = {"trajectory": self._trajectories, "forward": self._forward}[self.identity.source]
        parts, pending = [], compute(guidance, batches[0])
        for batch in batches[1:]:
            following = compute(guidance, batch)
            parts.append(pending.wait())
            pending = following
        return join([*parts, pending.wait()])

    @torch.inference_mode()
    def _trajectories(self, guidance: float, ids: range) -> "_Transfer":
        identity = self.identity
        label = network_labels(self.config, noise.labels(identity.seed, ids, identity.class_frequencies))
        x_1 = noise.noise(self.path, identity.seed, ids, identity.sample_shape)
        velocity = guide(self.network, guidance, self._on_device(label))
        keep = range(0, identity.solver_steps + 1, self.steps_per_interval)
        solution = solve(velocity, self._on_device(x_1), self.times, identity.solver, keep=keep)
        return self._transfer(label, solution.kinetic_energy, solution.knots)

    @torch.inference_mode()
    def _forward(self, guidance: float, ids: range) -> "_Transfer":
        """Add noise to data up to the start of an interval; run the teacher to its end (2509.21513, Alg. 1)."""
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
            times = self.times[k * self.steps_per_interval : (k + 1) * self.steps_per_interval + 1]
            start[rows] = self.path.point(images[rows], times[0].item(), uniforms[:, rows]).float()
            velocity = guide(self.network, guidance, self._on_device(label[rows]))
            solution = solve(velocity, self._on_device(start[rows]), times, identity.solver)
            device_rows = self._on_device(rows)
            end[device_rows], energy[device_rows] = solution.x, solution.kinetic_energy
        return self._transfer(label, energy, [start, end], interval)

    def _on_device(self, values: torch.Tensor) -> torch.Tensor:
        """Copy to the device asynchronously."""
        return values.pin_memory().to(self.device, non_blocking=True) if self.on_gpu else values

    def _transfer(
        self,
        label: torch.Tensor,
        energy: torch.Tensor,
        knots: Sequence[torch.Tensor],
        interval: torch.Tensor | None = None,
    ) -> "_Transfer":
        dtype = getattr(torch, self.identity.dtype)
        named = zip(self.identity.knot_columns, knots, strict=True)
        first = {} if interval is None else {INTERVAL: interval}
        return _Transfer(
            {**first, LABEL: label, KINETIC_ENERGY: energy, **{name: knot.to(dtype) for name, knot in named}}
        )


class _Transfer:
    """An asynchronous copy of tensors from the device to memory."""

    def __init__(self, columns: dict[str, torch.Tensor]) -> None:
        self.columns = {name: self._begin(values) for name, values in columns.items()}
        self.done = None
        if any(values.is_cuda for values in columns.values()):
            self.done = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self.done.record()

    def wait(self) -> Rows:
        """Wait for the copy and return the rows."""
        if self.done is not None:
            self.done.synchronize()
        return {name: values.numpy() for name, values in self.columns.items()}

    @staticmethod
    def _begin(values: torch.Tensor) -> torch.Tensor:
        if not values.is_cuda:
            return values
        return torch.empty(values.shape, dtype=values.dtype, pin_memory=True).copy_(values, non_blocking=True)


CHECKED_TRAJECTORIES = 64


def endpoint_rms(spec: RolloutSpec, identity: StoreIdentity) -> float:
    """Return the root mean square difference between endpoints in the rollout's precision and in float32.

    Uses the first samples of the seed at the largest guidance scale.
    """
    ids, w = range(min(CHECKED_TRAJECTORIES, spec.trajectories)), max(spec.guidance, key=abs)
    unrounded = identity.model_copy(update={"dtype": "float32"})
    ends = []
    for dtype in (spec.precision.dtype, "float32"):
        precision = Precision(dtype=dtype, compile=False)
        teacher = FrozenTeacher(spec.model_copy(update={"precision": precision}), unrounded)
        ends.append(teacher.follow(w, ids)[identity.knot_columns[-1]].astype(np.float64))
    return float(np.sqrt(np.square(ends[0] - ends[1]).mean()))

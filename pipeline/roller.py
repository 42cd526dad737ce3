"""The frozen teacher and how it is followed: batches of sample ids to rows. Knows nothing of Ray."""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from kac import identity
from kac.checkpoint import load_model
from kac.data import load_dataset
from kac.errors import DistillKacError
from kac.guidance import guide
from kac.solvers import solve, uniform_times
from pipeline.config import RolloutSpec
from pipeline.store.layout import INTERVAL, KINETIC_ENERGY, LABEL, Shard, StoreIdentity
from pipeline.store.shards import column_array, name_ids


class RolloutError(DistillKacError):
    """The rollout cannot go on; the message names the shard."""


class Rows(NamedTuple):
    """Computed rows, as numpy."""

    label: np.ndarray  # [rows]
    kinetic_energy: np.ndarray  # [rows]
    knots: list[np.ndarray]  # one [rows, *sample_shape] a knot column
    interval: np.ndarray | None  # [rows], of forward rollouts

    @classmethod
    def joined(cls, parts: Sequence["Rows"]) -> "Rows":
        """The parts one after the other."""
        intervals = [part.interval for part in parts if part.interval is not None]
        return cls(
            np.concatenate([part.label for part in parts]),
            np.concatenate([part.kinetic_energy for part in parts]),
            [np.concatenate(columns) for columns in zip(*(part.knots for part in parts), strict=True)],
            np.concatenate(intervals) if intervals else None,
        )

    @classmethod
    def of_table(cls, table: Any, of: StoreIdentity) -> "Rows":
        """The rows of a published shard."""
        return cls(
            column_array(table[LABEL]),
            column_array(table[KINETIC_ENERGY]),
            [column_array(table[name]) for name in of.knot_columns],
            column_array(table[INTERVAL]) if INTERVAL in table.column_names else None,
        )


class Roller:
    """The frozen teacher, and how it is followed; knows nothing of Ray."""

    def __init__(self, spec: RolloutSpec, identity: StoreIdentity) -> None:
        self.spec, self.identity = spec, identity
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        model = load_model(spec.teacher, self.device)
        if model.config.weights_sha256 != identity.teacher_sha256:
            raise RolloutError(
                f"{spec.teacher}: expected weights {identity.teacher_sha256[:12]}..., "
                f"found {model.config.weights_sha256[:12]}...: the teacher changed while the rollout ran"
            )
        self.model = model
        self.path = model.config.path.build()

    def roll(self, guidance: float, ids: range) -> Rows:
        """Follow the teacher for the samples ``ids``, in batches."""
        size = self.spec.batch_size
        batches = [range(start, min(start + size, ids.stop)) for start in range(ids.start, ids.stop, size)]
        rollers = {"trajectory": self._trajectories, "forward": self._forward}
        return Rows.joined([rollers[self.identity.source](guidance, batch) for batch in batches])

    @torch.inference_mode()
    def _trajectories(self, guidance: float, ids: range) -> Rows:
        of, network = self.identity, self.model.network
        label = identity.labels(of.seed, ids, of.class_frequencies)
        noise = identity.noise(self.path, of.seed, ids, of.sample_shape)
        every = of.solver_steps // of.knots
        solution = solve(
            guide(network, guidance).given(label.to(self.device)),
            noise.to(self.device),
            uniform_times(of.solver_steps),
            of.solver,
            keep=range(0, of.solver_steps + 1, every),
        )
        assert solution.knots is not None
        return Rows(label.numpy(), solution.kinetic_energy.cpu().numpy(), self._stored(solution.knots), None)

    @torch.inference_mode()
    def _forward(self, guidance: float, ids: range) -> Rows:
        """Noise a data point to the start of an interval, follow the teacher to its end (2509.21513, Alg. 1)."""
        of = self.identity
        data = load_dataset(self.model.config.data)
        point, interval = identity.data_points(of.seed, ids, len(data.labels), of.knots)
        label = data.labels[point]
        uniforms = identity.noise_uniforms(self.path, of.seed, ids, of.sample_shape)
        start = torch.empty((len(ids), *of.sample_shape))
        end, energy = torch.empty_like(start), torch.empty(len(ids))
        velocity = guide(self.model.network, guidance)
        for k in sorted(set(interval.tolist())):
            rows = interval == k
            t_start, t_end = 1 - k / of.knots, 1 - (k + 1) / of.knots
            start[rows] = self.path.point(data.images[point[rows]], t_start, uniforms[:, rows]).float()
            solution = solve(
                velocity.given(label[rows].to(self.device)),
                start[rows].to(self.device),
                uniform_times(of.solver_steps // of.knots, t_start, t_end),
                of.solver,
            )
            end[rows], energy[rows] = solution.x.cpu(), solution.kinetic_energy.cpu()
        return Rows(label.numpy(), energy.numpy(), self._stored([start, end]), interval.numpy())

    def _stored(self, knots: Iterable[torch.Tensor]) -> list[np.ndarray]:
        dtype = getattr(torch, self.identity.dtype)
        return [knot.to(dtype).cpu().numpy() for knot in knots]


def check_finite(store: str, shard: Shard, rows: Rows) -> None:
    """Refuse a shard with NaN or infinity before anything of it is published.

    Raises:
        RolloutError: names the shard and the samples.
    """
    finite = np.isfinite(rows.kinetic_energy)
    for knot in rows.knots:
        finite &= np.isfinite(knot).reshape(len(knot), -1).all(axis=1)
    if not finite.all():
        bad = np.arange(shard.start, shard.ids.stop)[~finite]
        raise RolloutError(
            f"{store}/{shard.name}: expected finite states from the teacher, found NaN or infinity in samples "
            f"{name_ids(bad)}: nothing of the shard was published; "
            "check the teacher's weights, the solver steps and --dtype"
        )

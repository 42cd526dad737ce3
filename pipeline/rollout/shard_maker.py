"""Make shards, without Ray: reuse an existing shard, or compute its rows with the frozen teacher and publish it."""

import contextlib
import threading
import time
from collections.abc import Callable, Sequence

import numpy as np
import torch

from kac import noise
from kac.conditioning import network_labels
from kac.data import open_dataset
from kac.guidance import GuidedVelocity, guide
from kac.model import load_model
from kac.precision import Precision
from kac.solvers import knot_times, solve
from kac.util.device import default_device, to_device
from kac.util.errors import DistillKacError, one_line
from kac.util.log import log
from kac.util.options import Options
from pipeline.config import RolloutSpec
from pipeline.memory import peak_memory
from pipeline.store.layout import INTERVAL, KINETIC_ENERGY, LABEL, Shard, StoreIdentity
from pipeline.store.shards import (
    DamagedShard,
    NotFiniteShard,
    Receipt,
    adopt,
    check_rows,
    column_array,
    encode,
    make_table,
    publish,
)

Rows = dict[str, np.ndarray]
"""Rows by column name: [rows], or [rows, *sample_shape] for a knot."""

CHECKED_TRAJECTORIES = 64
"""The number of trajectories that ``endpoint_rms`` computes."""


class RolloutError(DistillKacError):
    """The rollout failed. If a shard failed, the message names it."""


class ShardOutcome(Options):
    """The result of making a planned shard."""

    receipt: Receipt
    computed_rows: int  # 0 if the shard was reused
    compute_seconds: float  # spent in the teacher
    finished: float  # time, in seconds since the epoch
    peak_memory: int | None  # of the process that made the shard, in KiB


class ShardMaker:
    """Makes the shards of a store. One thread computes while another reads or publishes."""

    def __init__(self, spec: RolloutSpec, identity: StoreIdentity) -> None:
        self.spec, self.identity = spec, identity
        self.teacher = FrozenTeacher(spec, identity)
        self.computing = threading.Lock()

    def make(self, shard: Shard) -> ShardOutcome:
        """Publish the shard, unless it exists and is intact. A shard with NaN or infinity raises ``RolloutError``."""
        try:
            receipt, rows, seconds = self._adopt_or_compute(shard)
        except NotFiniteShard as error:
            advice = "Check the teacher's weights, `solver_steps` and `dtype`."
            raise RolloutError(f"{error} The shard was not published. {advice}") from error
        except DistillKacError as error:
            raise RolloutError(str(error)) from error
        except Exception as error:
            problem = f"{type(error).__name__}: {one_line(error)}"
            raise RolloutError(f"{self.spec.store}/{shard.name} failed with {problem}") from error
        return ShardOutcome(
            receipt=receipt,
            computed_rows=rows,
            compute_seconds=seconds,
            finished=time.time(),
            peak_memory=peak_memory(),
        )

    def _adopt_or_compute(self, shard: Shard) -> tuple[Receipt, int, float]:
        """Return the receipt, the number of computed rows, and the computing time in seconds."""
        existing = None
        try:
            receipt, existing = adopt(self.spec.store, shard, self.identity)
            if receipt.rows >= shard.rows:
                return receipt, 0, 0.0
        except FileNotFoundError:
            pass  # the usual case
        except DamagedShard as damage:
            log.info(f"rollout: {damage} Recomputing it.")
        with contextlib.ExitStack() as computing:
            computing.enter_context(self.computing)
            started = time.perf_counter()
            missing = shard.ids if existing is None else range(shard.start + existing.num_rows, shard.ids.stop)
            rows = self.teacher.follow(shard.guidance, missing)
            seconds = time.perf_counter() - started
            # A GPU can compute the other thread's shard while this shard is encoded. On a CPU, the two threads would
            # compete for the same core and for Python's global lock.
            if self.teacher.on_gpu:
                computing.close()
            if existing is not None:
                rows = join([{name: column_array(existing[name]) for name in rows}, rows])
            table = make_table(self.identity, shard, rows)
            check_rows(f"{self.spec.store}/{shard.name}", shard, self.identity, table)
            data = encode(table, self.spec.compression)
        receipt = publish(self.spec.store, shard, self.identity, data)
        return receipt, len(missing), seconds


class FrozenTeacher:
    """The teacher of a rollout, loaded once per process."""

    def __init__(self, spec: RolloutSpec, identity: StoreIdentity) -> None:
        self.identity, self.batch_size = identity, spec.batch_size
        self.device = default_device()
        self.on_gpu = self.device.type == "cuda"
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

    def follow(self, guidance: float, ids: range) -> Rows:
        """Compute the rows of the samples ``ids``. Each batch is copied to host memory while the next is computed."""
        size = self.batch_size
        batches = [range(start, min(start + size, ids.stop)) for start in range(ids.start, ids.stop, size)]
        compute = {"trajectory": self._trajectories, "forward": self._forward}[self.identity.source]
        parts, pending = [], compute(guidance, batches[0])
        for batch in batches[1:]:
            following = compute(guidance, batch)
            parts.append(pending())
            pending = following
        return join([*parts, pending()])

    @torch.inference_mode()
    def _trajectories(self, guidance: float, ids: range) -> Callable[[], Rows]:
        identity = self.identity
        label = network_labels(self.config, noise.labels(identity.seed, ids, identity.class_frequencies))
        x_1 = noise.noise(self.path, identity.seed, ids, identity.sample_shape)
        velocity = self._velocity(guidance, label)
        keep = range(0, identity.solver_steps + 1, self.steps_per_interval)
        solution = solve(velocity, self._on_device(x_1), self.times, identity.solver, keep=keep)
        return self._transfer({LABEL: label, KINETIC_ENERGY: solution.kinetic_energy}, solution.knots)

    @torch.inference_mode()
    def _forward(self, guidance: float, ids: range) -> Callable[[], Rows]:
        """Add noise to images up to an interval's start, and run the teacher to its end (2509.21513, Alg. 1)."""
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
            velocity = self._velocity(guidance, label[rows])
            solution = solve(velocity, self._on_device(start[rows]), times, identity.solver)
            device_rows = self._on_device(rows)
            end[device_rows], energy[device_rows] = solution.x, solution.kinetic_energy
        return self._transfer({INTERVAL: interval, LABEL: label, KINETIC_ENERGY: energy}, [start, end])

    def _velocity(self, guidance: float, label: torch.Tensor) -> GuidedVelocity:
        return guide(self.network, guidance, self._on_device(label), time_factor=self.identity.time_factor)

    def _on_device(self, values: torch.Tensor) -> torch.Tensor:
        return to_device(values, self.device)

    def _transfer(self, columns: dict[str, torch.Tensor], knots: Sequence[torch.Tensor]) -> Callable[[], Rows]:
        """Start copying the columns to host memory. Return a function that waits for them and returns the rows."""
        dtype = getattr(torch, self.identity.dtype)
        named = {name: knot.to(dtype) for name, knot in zip(self.identity.knot_columns, knots, strict=True)}
        # PyTorch copies asynchronously to pinned memory.
        copies = {name: values.to("cpu", non_blocking=True) for name, values in {**columns, **named}.items()}
        copied = torch.cuda.current_stream().record_event() if self.on_gpu else None

        def rows() -> Rows:
            if copied is not None:
                copied.synchronize()
            return {name: values.numpy() for name, values in copies.items()}

        return rows


def join(parts: Sequence[Rows]) -> Rows:
    """Concatenate the rows of the parts."""
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def endpoint_rms(spec: RolloutSpec, identity: StoreIdentity) -> float:
    """Return the root mean square difference between endpoints in the rollout's precision and in float32.

    Uses the seed's first samples, at the largest guidance scale.
    """
    ids, w = range(min(CHECKED_TRAJECTORIES, spec.trajectories)), max(spec.guidance, key=abs)
    unrounded = identity.model_copy(update={"dtype": "float32"})
    ends = []
    for dtype in (spec.precision.dtype, "float32"):
        precision = Precision(dtype=dtype, compile=False)
        teacher = FrozenTeacher(spec.model_copy(update={"precision": precision}), unrounded)
        ends.append(teacher.follow(w, ids)[identity.knot_columns[-1]].astype(np.float64))
    return float(np.sqrt(np.square(ends[0] - ends[1]).mean()))

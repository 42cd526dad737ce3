"""Make the shards of a rollout on a Ray Data actor pool.

Defaults of Ray 2.60, and what this module does instead:

- A pool's actors restart and retry indefinitely (map_batches deprecates other values of max_restarts). This handles a
  lost node, but not a shard that kills its process. The ``AttemptLedger`` counts attempts outside the dying processes,
  and ends the job with an error that names the shard.
- ``write_parquet`` uses a new UUID in file names in each run, so a second run would write all rows again. Also, a write
  stage behind a pool that uses every CPU starves. Therefore the actors publish their own shards. An actor takes two
  shards at a time: it uploads one while it computes the other.
- ``CheckpointConfig`` adds a second actor pool and hangs on two CPUs. Instead, published shards record the progress.
- A pool of ``min_size`` to ``max_size`` actors with two shards each never grows, because it cannot reach its threshold
  of 1.75 tasks per call. For a range of actors, the pool therefore has the maximum size. Actors without resources stay
  pending, which triggers the autoscaler. (Measured: a node that joined after 18 seconds had an actor 8 seconds later.)
- An actor on a lost node keeps its slot in the pool and its shards (ray-project/ray #62746). These shards come last:
  when all shards are assigned, idle actors end, which frees resources to restart the lost actor.
"""

import contextlib
import gc
import threading
from collections.abc import Callable, Generator
from typing import Any

import numpy as np
import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from kac.util.errors import DistillKacError, one_line
from kac.util.options import most
from pipeline.cluster import connection as cluster
from pipeline.cluster.placement import choose_actors, hide_unassigned_gpus
from pipeline.cluster.ray_data import each
from pipeline.config import RolloutSpec
from pipeline.rollout.plan import Plan
from pipeline.rollout.shard_maker import RolloutError, ShardMaker, ShardOutcome, endpoint_rms
from pipeline.store.layout import Shard, StoreIdentity

MAX_ATTEMPTS = 10
"""How many processes one shard may kill, and how many times per actor the pool may restart without progress."""

ADVICE = "See the logs of the Ray workers; the usual cause is too little memory."
SHARDS_IN_FLIGHT = 2
PAUSE_SECONDS = 0.1

MakeShardMaker = Callable[[RolloutSpec, StoreIdentity], Any]


def compute_on_actors(spec: RolloutSpec, plan: Plan, maker: MakeShardMaker = ShardMaker) -> Generator[ShardOutcome]:
    """Publish the shards of ``plan.todo`` and yield each outcome. Closing the generator ends the actors.

    ``maker`` makes the shards in an actor; tests replace it.
    """
    group = choose_actors(spec)
    actors = most(group.for_work(len(plan.todo)).actors)
    # The ledger runs on the driver's node, whose loss ends the job anyway. A restarted ledger counts from zero, which
    # only delays giving up on a shard that kills its process.
    driver_node = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    options = {"num_cpus": 0, "max_restarts": -1, "max_task_retries": -1, "scheduling_strategy": driver_node}
    ledger = ray.remote(AttemptLedger).options(**options).remote(actors)
    pool = ray.data.ActorPoolStrategy(
        size=actors,
        max_tasks_in_flight_per_actor=SHARDS_IN_FLIGHT,
        max_concurrent_calls_per_actor=SHARDS_IN_FLIGHT,
        enable_true_multi_threading=True,
    )
    results = each(
        [shard.to_json() for shard in plan.todo],
        ShardActor,
        pause_seconds=PAUSE_SECONDS,
        compute=pool,
        fn_constructor_kwargs={"spec": spec, "identity": plan.identity, "ledger": ledger, "maker": maker},
        **group.resources.remote_options,
    )
    rows = iter(results.iter_rows())
    try:
        # Closing the iterator early ends the actors. An exception raised in an actor would not end them: their CPUs
        # would stay in use until nothing refers to the exception and the pipeline. So actors return failures as rows.
        with contextlib.closing(rows):
            for row in rows:
                if row["failure"]:
                    raise RolloutError(row["failure"])
                yield ShardOutcome.model_validate_json(row["outcome"])
        return
    except ray.exceptions.RayError as error:
        failure = f"The rollout failed in Ray: {one_line(str(error)[-300:])}"
    del results, rows
    gc.collect()  # the failed pipeline is a reference cycle
    raise RolloutError(failure)


def endpoint_rms_on_ray(spec: RolloutSpec, identity: StoreIdentity) -> float:
    """Compute ``endpoint_rms`` with the resources of an actor, because the driver may have no GPU."""
    task = ray.remote(endpoint_rms).options(**choose_actors(spec).resources.remote_options)
    try:
        return float(ray.get(task.remote(spec, identity)))
    except ray.exceptions.RayError as error:
        raise RolloutError(f"The comparison with float32 failed: {cluster.innermost(error)}") from error


class AttemptLedger:
    """Counts attempts per shard, in a process that survives the actors."""

    def __init__(self, actors: int) -> None:
        self.actors = actors
        self.begun: set[str] = set()
        self.attempts: dict[str, int] = {}
        self.starts_since_progress = 0

    def started(self) -> str | None:
        """Count the start of an actor. Return an error message if too many actors died in a row, otherwise None."""
        self.starts_since_progress += 1
        if self.starts_since_progress > (1 + MAX_ATTEMPTS) * self.actors:
            shards = f"while making {', '.join(sorted(self.begun))}" if self.begun else "before starting a shard"
            return f"{self.starts_since_progress} actors died in a row {shards}. {ADVICE}"
        return None

    def begin(self, shard: str) -> bool:
        """Count the start of a shard. Return whether it is suspect, because a process died while making it."""
        is_suspect = shard in self.begun
        self.begun.add(shard)
        return is_suspect

    def begin_suspect(self, shard: str) -> str | None:
        """Count an attempt at a suspect shard. Return an error message if it killed too many processes, or None."""
        self.attempts[shard] = self.attempts.get(shard, 0) + 1
        if self.attempts[shard] > MAX_ATTEMPTS:
            return f"{shard} failed: {MAX_ATTEMPTS} processes died while making it. {ADVICE}"
        return None

    def finish(self, shard: str) -> None:
        """Record that a shard has been published."""
        self.begun.discard(shard)
        self.attempts.pop(shard, None)
        self.starts_since_progress = 0


class ShardActor:
    """An actor that loads the teacher once and makes one shard per call. Two calls may run concurrently."""

    def __init__(self, spec: RolloutSpec, identity: StoreIdentity, ledger: Any, maker: MakeShardMaker) -> None:
        hide_unassigned_gpus()
        self.ledger, self.suspect_lock = ledger, threading.Lock()
        self.failure: str | None = ray.get(ledger.started.remote())
        if not self.failure:
            try:
                self.maker = maker(spec, identity)
            except DistillKacError as error:
                self.failure = str(error)

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, list[str]]:
        """Make one shard. Return its ``ShardOutcome``, or an error message that ends the rollout."""
        try:
            return {"outcome": [self._make(Shard.from_json(batch["item"][0])).model_dump_json()], "failure": [""]}
        except RolloutError as error:
            # The driver sees the failure at the end of the block. Skip the other shards of the block.
            self.failure = str(error)
            return {"outcome": [""], "failure": [self.failure]}

    def _make(self, shard: Shard) -> ShardOutcome:
        if self.failure:
            raise RolloutError(self.failure)
        is_suspect = ray.get(self.ledger.begin.remote(shard.name))
        # A dead process may have been making two shards. Making them one at a time shows which shard kills processes.
        with self.suspect_lock if is_suspect else contextlib.nullcontext():
            failure = ray.get(self.ledger.begin_suspect.remote(shard.name)) if is_suspect else None
            if failure:
                raise RolloutError(failure)
            outcome: ShardOutcome = self.maker.make(shard)
            ray.get(self.ledger.finish.remote(shard.name))
        return outcome

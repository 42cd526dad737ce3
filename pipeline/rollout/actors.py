"""The shards of a rollout on an actor pool of Ray Data.

What Ray does by default, and what is done about it (Ray 2.60):
- Actors of a pool restart and retry for ever (max_restarts = max_task_retries = -1; map_batches deprecates others).
  That suits a lost node, not a shard that kills its process: the ``Ledger`` counts attempts outside the processes that
  die, and ends the job with the shard's name.
- ``max_errored_blocks`` would drop blocks in silence: it stays 0.
- ``write_parquet`` names files by a new uuid each run and appends: a second run would double everything. Not used.
- ``CheckpointConfig`` resume adds an actor pool of its own and hangs on two CPUs. Not used: the shards are the record.
- A pool of ``min_size`` to ``max_size`` actors that take two shards each never grows (its threshold, 1.75 tasks a
  call, is out of reach). A range is therefore a pool of its largest size: those actors work that a node has room
  for, the pending ones tell the autoscaler (two 1-CPU nodes, 80 shards of a second, the second node joining after 18
  seconds: its actor began 8 seconds later, every shard once; as a pool of 1 to 3 the first actor did all).
- An actor whose node is lost keeps its place in the pool and its shards (ray-project/ray #62746). They come last: idle
  actors end with the last shard that nobody has, which makes the room to start it again (the same run, the second node
  lost in the middle: two shards were computed 20 seconds after the others, every shard once).
- A write stage behind a pool that takes every CPU starves: actors publish by themselves. They take two shards at a
  time, so that the upload of one runs while the other is computed.
"""

import contextlib
import gc
import threading
from collections.abc import Callable, Generator
from typing import Any, Protocol

import numpy as np
import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from kac.util.errors import DistillKacError, one_line
from kac.util.options import most
from pipeline.cluster import connection as cluster
from pipeline.cluster.actor_place import choose_place
from pipeline.cluster.ray_data import each
from pipeline.config.specs import RolloutSpec
from pipeline.rollout.plan import Plan
from pipeline.rollout.shards import Outcome, ShardMaker
from pipeline.rollout.teacher import RolloutError, endpoint_rms
from pipeline.store.layout import Shard, StoreIdentity

MAX_ATTEMPTS = 10
"""How many processes one shard may kill, and how many actors in a row may die before any shard is finished."""

ADVICE = "see the logs of the workers, often memory"
SHARDS_IN_FLIGHT = 2
PAUSE_SECONDS = 0.1


class Maker(Protocol):
    """Makes shards: a ``ShardMaker``."""

    def make(self, shard: Shard) -> Outcome:
        """Bring the shard into the store."""


def compute_on_actors(
    spec: RolloutSpec,
    plan: Plan,
    maker: Callable[[RolloutSpec, StoreIdentity], Maker] = ShardMaker,
    pause_seconds: float = PAUSE_SECONDS,
) -> Generator[Outcome]:
    """Compute or adopt every shard that is to be done, each as it is published; the actors end when this is closed.

    Args:
        maker: what an actor makes its shards with; the benchmark has one that does no work, and leaves no pause.
        pause_seconds: see ``each``.

    Raises:
        RolloutError: a shard failed; the message names it.
    """
    place = choose_place(spec)
    actors = most(place.for_work(len(plan.todo)).actors)
    # On the driver's node: if that goes, so does the job. A restarted ledger counts anew: a shard that kills its
    # process is given up later.
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    lasting = {"num_cpus": 0, "max_restarts": -1, "max_task_retries": -1, "scheduling_strategy": here}
    ledger = ray.remote(Ledger).options(**lasting).remote(actors)
    pool = ray.data.ActorPoolStrategy(
        size=actors,
        max_tasks_in_flight_per_actor=SHARDS_IN_FLIGHT,
        max_concurrent_calls_per_actor=SHARDS_IN_FLIGHT,
        enable_true_multi_threading=True,
    )
    made = each(
        [shard.as_text() for shard in plan.todo],
        ShardActor,
        pause_seconds=pause_seconds,
        compute=pool,
        fn_constructor_kwargs={"spec": spec, "identity": plan.identity, "ledger": ledger, "maker": maker},
        **place.share.remote_options,
    )
    rows = iter(made.iter_rows())
    try:
        # Closed before their end, the rows take their actors with them. An error raised in an actor would not: Ray
        # Data lets go of the actors, whose CPUs stay taken until nothing refers to that error and to the pipeline.
        with contextlib.closing(rows):
            for row in rows:
                if row["failure"]:
                    raise RolloutError(row["failure"])
                yield Outcome.model_validate_json(row["outcome"])
        return
    except ray.exceptions.RayError as error:
        failure = f"the rollout failed in Ray: {one_line(str(error)[-300:])}"
    del made, rows
    gc.collect()  # the failed pipeline refers to itself
    raise RolloutError(failure)


def endpoint_rms_on_ray(spec: RolloutSpec, plan: Plan) -> float:
    """``endpoint_rms`` where the actors will run: the driver may have no GPU.

    Raises:
        RolloutError: it failed.
    """
    task = ray.remote(endpoint_rms).options(**choose_place(spec).share.remote_options)
    try:
        return float(ray.get(task.remote(spec, plan.identity)))
    except ray.exceptions.RayError as error:
        raise RolloutError(f"the comparison with float32 failed: {cluster.innermost(error)}") from error


class Ledger:
    """Counts attempts where a dying actor cannot take the count along."""

    def __init__(self, actors: int) -> None:
        self.actors = actors
        self.begun: set[str] = set()
        self.attempts: dict[str, int] = {}
        self.starts_since_progress = 0

    def started(self) -> str | None:
        """An actor started. Returns why it must not, if too many died in a row."""
        self.starts_since_progress += 1
        if self.starts_since_progress > (1 + MAX_ATTEMPTS) * self.actors:
            tried = f"last tried: {', '.join(sorted(self.begun))}" if self.begun else "before any was begun"
            return f"{self.starts_since_progress} actors died in a row without finishing a shard ({tried}): {ADVICE}"
        return None

    def begin(self, shard: str) -> bool:
        """An actor takes a shard. Returns whether it is suspect: it was in a process that died."""
        is_suspect = shard in self.begun
        self.begun.add(shard)
        return is_suspect

    def begin_alone(self, shard: str) -> str | None:
        """A suspect is begun while no other suspect is. Returns why it must not, if it took too many processes down."""
        self.attempts[shard] = self.attempts.get(shard, 0) + 1
        if self.attempts[shard] > MAX_ATTEMPTS:
            return f"{shard}: its process died {MAX_ATTEMPTS} times: {ADVICE}"
        return None

    def finish(self, shard: str) -> None:
        """A shard is published."""
        self.begun.discard(shard)
        self.attempts.pop(shard, None)
        self.starts_since_progress = 0


class ShardActor:
    """An actor: loads the frozen teacher once, then makes one planned shard a call. Two calls may run at once."""

    def __init__(
        self,
        spec: RolloutSpec,
        identity: StoreIdentity,
        ledger: Any,
        maker: Callable[[RolloutSpec, StoreIdentity], Maker],
    ) -> None:
        self.alone = threading.Lock()
        self.refusal: str | None = ray.get(ledger.started.remote())
        if self.refusal:
            return
        try:
            self.ledger, self.maker = ledger, maker(spec, identity)
        except DistillKacError as error:
            self.refusal = str(error)

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, list[str]]:
        """A planned shard in, its ``Outcome`` out, or why the rollout cannot go on."""
        try:
            return {"outcome": [self._make(Shard.of_text(batch["item"][0])).model_dump_json()], "failure": [""]}
        except RolloutError as error:
            # The driver sees it once its block is done: the block's other shards must not be computed for nothing.
            self.refusal = str(error)
            return {"outcome": [""], "failure": [self.refusal]}

    def _make(self, shard: Shard) -> Outcome:
        if self.refusal:
            raise RolloutError(self.refusal)
        is_suspect = ray.get(self.ledger.begin.remote(shard.name))
        # Of two shards that were in a process when it died, only one killed it: now they go one after the other.
        with self.alone if is_suspect else contextlib.nullcontext():
            refusal = ray.get(self.ledger.begin_alone.remote(shard.name)) if is_suspect else None
            if refusal:
                raise RolloutError(refusal)
            outcome = self.maker.make(shard)
            ray.get(self.ledger.finish.remote(shard.name))
        return outcome

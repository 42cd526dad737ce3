"""Rollouts with injected faults: actors that die, hang, raise or produce NaN, and jobs that use such actors.

The file ``STORE.fault`` next to the store enables the fault. After a test removes this file, the command succeeds:

    python -m tests.pipeline.faulty hang-in-shard    [options of jobs.rollout]
    python -m tests.pipeline.faulty hang-in-manifest [options of jobs.rollout]
    python -m tests.pipeline.faulty lose-node        [options of jobs.rollout]
"""

import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import ray

from jobs.command import main
from kac.util import files
from kac.util.errors import DistillKacError
from pipeline.config import RolloutSpec
from pipeline.rollout import actors, rollout
from pipeline.rollout.shard_maker import RolloutError, Rows, ShardOutcome
from pipeline.store.layout import MANIFEST, Shard, StoreIdentity
from pipeline.store.manifest import list_shards

FAULTY_SHARD = 4
QUICK_ATTEMPTS = 2
S3_ATTEMPTS = 2


def fault_file(store: str) -> Path:
    """Return the file that enables faults while it exists."""
    return Path(f"{store}.fault")


def hung_file(store: str) -> Path:
    """Return the file to which a hanging process writes its process id."""
    return Path(f"{store}.hung")


class RaisingActor(actors.ShardActor):
    """Raises on one shard."""

    def __init__(self, spec: RolloutSpec, **others: Any) -> None:
        super().__init__(spec, **others)
        self.spec, self.follow = spec, self.maker.teacher.follow
        self.maker.teacher.follow = self.follow_with_fault  # type: ignore[method-assign]

    def follow_with_fault(self, guidance: float, ids: range) -> Rows:
        rows = self.follow(guidance, ids)
        is_faulty = guidance == 0.0 and ids.start == FAULTY_SHARD * self.spec.shard_size
        return self.fault(rows) if is_faulty and fault_file(self.spec.store).exists() else rows

    def fault(self, rows: Rows) -> Rows:
        raise RuntimeError("the card fell off the bus\nwith a second line")


class NanActor(RaisingActor):
    """Turns the second and the last sample of one shard into NaN."""

    def fault(self, rows: Rows) -> Rows:
        rows["knot_02"][[1, -1]] = np.nan
        return rows


class DyingActor(RaisingActor):
    """Dies on one shard, like a process killed by the out-of-memory killer."""

    def fault(self, rows: Rows) -> Rows:
        os.kill(os.getpid(), signal.SIGKILL)
        return rows


class DyingMaker:
    """Dies in the constructor, like a process whose teacher does not fit into memory."""

    def __init__(self, spec: RolloutSpec, identity: StoreIdentity) -> None:
        os.kill(os.getpid(), signal.SIGKILL)


class RefusingMaker:
    """Raises a user error in the constructor, like a process on a node without the teacher."""

    def __init__(self, spec: RolloutSpec, identity: StoreIdentity) -> None:
        raise DistillKacError(f"{spec.teacher} is not a model folder.")


class BrokenMaker:
    """Raises an unexpected exception in the constructor."""

    def __init__(self, spec: RolloutSpec, identity: StoreIdentity) -> None:
        raise ZeroDivisionError("a bug")


class FailingMaker:
    """Fails on every shard, after writing a file for the shard."""

    def __init__(self, spec: RolloutSpec, identity: StoreIdentity) -> None:
        self.spec = spec

    def make(self, shard: Shard) -> ShardOutcome:
        """Write a file and raise."""
        Path(f"{self.spec.store}.{shard.start}").touch()
        raise RolloutError(f"{shard.name}: fails")


class ImpatientLedger(actors.AttemptLedger):
    """Gives up after fewer restarts, to shorten the test."""

    def __init__(self, count: int) -> None:
        actors.MAX_ATTEMPTS = QUICK_ATTEMPTS
        super().__init__(count)


class ImpatientActor(actors.ShardActor):
    """Gives up on S3 after fewer retries, to shorten the test."""

    def __init__(self, *options: Any, **others: Any) -> None:
        import s3fs

        files.S3_OPTIONS["config_kwargs"]["retries"]["total_max_attempts"] = S3_ATTEMPTS
        s3fs.S3FileSystem.retries = S3_ATTEMPTS
        super().__init__(*options, **others)


class HangingActor(actors.ShardActor):
    """Hangs after it has written its third shard, before publishing it."""

    def __init__(self, spec: RolloutSpec, **others: Any) -> None:
        super().__init__(spec, **others)
        hang_in_fsync(spec.store, "shard-", 3)


def hang_in_fsync(store: str, what: str, number: int) -> None:
    """In this process, make the ``number``-th fsync of a file whose name contains ``what`` hang."""
    fsync, calls = os.fsync, []

    def hang(descriptor: int) -> None:
        fsync(descriptor)
        if what not in os.readlink(f"/proc/self/fd/{descriptor}"):
            return
        calls.append(descriptor)
        if len(calls) >= number and fault_file(store).exists():
            hung_file(store).write_text(str(os.getpid()))
            threading.Event().wait()

    os.fsync = hang


def lose_node(spec: RolloutSpec) -> None:
    """Run a rollout on two worker nodes with one CPU each, and remove one node after the first shards."""
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    nodes = [cluster.add_node(num_cpus=1) for _ in range(2)]
    os.environ["RAY_ADDRESS"] = cluster.address

    def remove() -> None:
        while len(list_shards(spec.store)) < 3:
            time.sleep(0.02)
        all_actors = ray._private.state.actors().values()
        ledger_nodes = {
            actor["Address"]["NodeID"] for actor in all_actors if actor["ActorClassName"] == "AttemptLedger"
        }
        # Remove the node with the ledger if possible, because that is the hardest case.
        victim = next((node for node in nodes if node.node_id in ledger_nodes), nodes[0])
        cluster.remove_node(victim, allow_graceful=False)
        kind = "with" if victim.node_id in ledger_nodes else "without"
        print(f"removed a node {kind} the ledger after {len(list_shards(spec.store))} shards", flush=True)

    remover = threading.Thread(target=remove, daemon=True)
    remover.start()
    try:
        rollout(spec)
        remover.join(timeout=60)
    finally:
        ray.shutdown()
        cluster.shutdown()


def hang_in_shard(spec: RolloutSpec) -> None:
    """Run a rollout with actors that hang while they write a shard."""
    actors.ShardActor = HangingActor  # type: ignore[misc]
    rollout(spec)


def hang_in_manifest(spec: RolloutSpec) -> None:
    """Run a rollout that hangs after it has written the manifest, before publishing it."""
    hang_in_fsync(spec.store, MANIFEST, 1)
    rollout(spec)


JOBS = {"hang-in-shard": hang_in_shard, "hang-in-manifest": hang_in_manifest, "lose-node": lose_node}

if __name__ == "__main__":
    main(RolloutSpec, JOBS[sys.argv.pop(1)])

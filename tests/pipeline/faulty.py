"""Rollouts that fail on order: actors that die, hang, raise or produce NaN, and the driver of such a job.

A fault is switched on by a file beside the store, ``STORE.fault``, so that a test switches it off from outside and the
same command goes on without it:

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
from kac import files
from pipeline import rollout
from pipeline.config import RolloutSpec
from pipeline.store.layout import MANIFEST, StoreIdentity
from pipeline.store.manifest import list_shards

FAULTY_SHARD = 4
QUICK_ATTEMPTS = 2
S3_ATTEMPTS = 2


def fault_file(store: str) -> Path:
    """Faults happen while this file is there."""
    return Path(f"{store}.fault")


def hung_file(store: str) -> Path:
    """A process that hangs on order writes its process id here."""
    return Path(f"{store}.hung")


class RaisingRoller(rollout.ShardRoller):
    """Raises on one shard."""

    def __init__(self, spec: RolloutSpec, identity: StoreIdentity, ledger: Any) -> None:
        super().__init__(spec, identity, ledger)
        self.roll = self.roller.roll
        self.roller.roll = self.roll_with_fault  # type: ignore[method-assign]

    def roll_with_fault(self, guidance: float, ids: range) -> rollout.Rows:
        rows = self.roll(guidance, ids)
        if (
            guidance == 0.0
            and ids.start == FAULTY_SHARD * self.spec.shard_size
            and fault_file(self.spec.store).exists()
        ):
            return self.fault(rows)
        return rows

    def fault(self, rows: rollout.Rows) -> rollout.Rows:
        raise RuntimeError("the card fell off the bus\nwith a second line")


class NanRoller(RaisingRoller):
    """Makes NaN of the second and the last sample of one shard."""

    def fault(self, rows: rollout.Rows) -> rollout.Rows:
        rows.knots[2][[1, -1]] = np.nan
        return rows


class DyingRoller(RaisingRoller):
    """Dies on one shard, as under the out-of-memory killer."""

    def fault(self, rows: rollout.Rows) -> rollout.Rows:
        os.kill(os.getpid(), signal.SIGKILL)
        return rows


class ImpatientLedger(rollout.Ledger):
    """Gives up sooner, so that a test need not wait for ten restarts."""

    def __init__(self, actors: int) -> None:
        rollout.MAX_ATTEMPTS = QUICK_ATTEMPTS
        super().__init__(actors)


class ImpatientRoller(rollout.ShardRoller):
    """Gives up on S3 sooner, so that a test need not wait for all of the retries."""

    def __init__(self, spec: RolloutSpec, identity: StoreIdentity, ledger: Any) -> None:
        import s3fs

        files.S3_OPTIONS["config_kwargs"]["retries"]["max_attempts"] = S3_ATTEMPTS
        s3fs.S3FileSystem.retries = S3_ATTEMPTS
        super().__init__(spec, identity, ledger)


class HangingRoller(rollout.ShardRoller):
    """Hangs with its third shard written but not published."""

    def __init__(self, spec: RolloutSpec, identity: StoreIdentity, ledger: Any) -> None:
        super().__init__(spec, identity, ledger)
        hang_in_fsync(spec.store, "shard-", 3)


def hang_in_fsync(store: str, what: str, number: int) -> None:
    """From now on, the ``number``-th sync of a file named ``what`` in this process never returns."""
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
    """Roll out on two worker nodes of one CPU each; one of them goes once the first shards are there."""
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    nodes = [cluster.add_node(num_cpus=1) for _ in range(2)]
    os.environ["RAY_ADDRESS"] = cluster.address

    def remove() -> None:
        while len(list_shards(spec.store)) < 3:
            time.sleep(0.02)
        actors = ray._private.state.actors().values()
        homes = {actor["Address"]["NodeID"] for actor in actors if actor["ActorClassName"] == "Ledger"}
        # The node that keeps the count of attempts is the worst one to lose.
        victim = next((node for node in nodes if node.node_id in homes), nodes[0])
        cluster.remove_node(victim, allow_graceful=False)
        kept = "with" if victim.node_id in homes else "without"
        print(f"removed a node {kept} the ledger, {len(list_shards(spec.store))} shards there", flush=True)

    remover = threading.Thread(target=remove, daemon=True)
    remover.start()
    try:
        rollout.rollout(spec)
        remover.join(timeout=60)
    finally:
        ray.shutdown()
        cluster.shutdown()


def hang_in_shard(spec: RolloutSpec) -> None:
    """Roll out with actors that hang in the middle of a write."""
    rollout.ShardRoller = HangingRoller  # type: ignore[misc]
    rollout.rollout(spec)


def hang_in_manifest(spec: RolloutSpec) -> None:
    """Roll out and hang with the manifest written but not published."""
    hang_in_fsync(spec.store, MANIFEST, 1)
    rollout.rollout(spec)


JOBS = {"hang-in-shard": hang_in_shard, "hang-in-manifest": hang_in_manifest, "lose-node": lose_node}

if __name__ == "__main__":
    main(RolloutSpec, JOBS[sys.argv.pop(1)])

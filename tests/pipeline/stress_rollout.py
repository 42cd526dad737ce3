"""Kill random drivers and actors of a rollout, then compare its store with that of an undisturbed rollout.

This takes too long for the test suite.

python -m tests.pipeline.stress_rollout --kills 30 --seed 0
"""

import argparse
import random
import tempfile
import time

from pipeline.config import RolloutSpec
from tests.pipeline.compare import assert_same_store
from tests.pipeline.running import Job, Summary, end, named
from tests.pipeline.stores import make_teacher

DRIVER_SHARE = 0.3
MAX_PAUSE_SECONDS = 20
"""A driver publishes its first shard in about half of this time. Some kills come before that, most after it."""

TRAJECTORIES = 4000
"""Trajectories per guidance scale. A rollout that ends before all kills is extended by this number."""


def stress(folder: str, kills: int, seed: int) -> None:
    """Kill ``kills`` processes of a rollout, and compare its store with that of an undisturbed rollout."""
    rng = random.Random(seed)
    teacher = make_teacher(f"{folder}/teacher")
    options = {"shard_size": 50, "knots": 4, "solver_steps": 2000, "guidance": (0.0, 1.0)}
    spec = RolloutSpec(teacher=teacher, store=f"{folder}/stressed", trajectories=TRAJECTORIES, **options)
    job = Job(["jobs.rollout"], spec, None)
    drivers = actors = 0
    while drivers + actors < kills:
        time.sleep(rng.uniform(0.5, MAX_PAUSE_SECONDS))
        if job.is_over():
            job.finish()
            spec = spec.model_copy(update={"trajectories": spec.trajectories + TRAJECTORIES})
            job = Job(["jobs.rollout"], spec, None)
            print(f"finished; continuing to {spec.trajectories} trajectories per guidance scale", flush=True)
            continue
        if rng.random() < DRIVER_SHARE:
            job.kill_driver()
            drivers += 1
            job = Job(["jobs.rollout"], spec, None)
        elif victims := named(job.started(), "MapWorker"):
            end(rng.choice(victims).pid)
            actors += 1
        else:
            continue
        print(f"{drivers} drivers and {actors} actors killed", flush=True)
    summary = Summary(job.finish())
    undisturbed = spec.model_copy(update={"store": f"{folder}/undisturbed"})
    Job(["jobs.rollout"], undisturbed, None).finish()
    assert_same_store(spec.store, undisturbed.store)
    print(
        f"{drivers} drivers and {actors} actors killed; the last run computed {summary.computed} rows and reused "
        f"{summary.reused}; the store equals the undisturbed one"
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        stress(scratch, chosen.kills, chosen.seed)

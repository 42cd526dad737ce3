"""Random SIGKILLs of drivers and actors in one rollout, then the whole-store comparison; too long for the suite.

python -m tests.pipeline.stress_rollout --kills 30 --seed 0
"""

import argparse
import random
import tempfile
import time

from pipeline.config.specs import RolloutSpec
from tests.pipeline.compare import assert_same_store
from tests.pipeline.running import Job, Summary, end, named
from tests.pipeline.stores import make_teacher

DRIVER_SHARE = 0.3
LONGEST_CALM_SECONDS = 20
"""A driver needs about half of it to get to its first shard: some die before, most at work."""

TRAJECTORIES = 4000
"""A rollout that ends before its kills is raised by as many, as a user would raise it."""


def stress(folder: str, kills: int, seed: int) -> None:
    """Kill ``kills`` processes of one rollout, and hold the store against that of a rollout without faults."""
    dice = random.Random(seed)
    teacher = make_teacher(f"{folder}/teacher")
    options = {"shard_size": 50, "knots": 4, "solver_steps": 2000, "guidance": (0.0, 1.0)}
    spec = RolloutSpec(teacher=teacher, store=f"{folder}/stressed", trajectories=TRAJECTORIES, **options)
    job = Job(["jobs.rollout"], spec, None)
    drivers = actors = 0
    while drivers + actors < kills:
        time.sleep(dice.uniform(0.5, LONGEST_CALM_SECONDS))
        if job.is_over():
            job.finish()
            spec = spec.model_copy(update={"trajectories": spec.trajectories + TRAJECTORIES})
            job = Job(["jobs.rollout"], spec, None)
            print(f"finished, and raised to {spec.trajectories} trajectories a scale", flush=True)
            continue
        if dice.random() < DRIVER_SHARE:
            job.kill_driver()
            drivers += 1
            job = Job(["jobs.rollout"], spec, None)
        elif victims := named(job.started(), "MapWorker"):
            end(dice.choice(victims).pid)
            actors += 1
        else:
            continue
        print(f"{drivers} drivers and {actors} actors killed", flush=True)
    summary = Summary(job.finish())
    calm = spec.model_copy(update={"store": f"{folder}/calm"})
    Job(["jobs.rollout"], calm, None).finish()
    assert_same_store(spec.store, calm.store)
    print(
        f"{drivers} drivers and {actors} actors killed; the last run computed {summary.computed} rows and reused "
        f"{summary.reused}; the store equals the calm one"
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        stress(scratch, chosen.kills, chosen.seed)

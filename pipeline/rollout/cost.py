"""The cost of a rollout, logged before it starts, and the remaining time, logged after its first shard."""

import math
from collections.abc import Iterable

import numpy as np
import torch

from kac.model import ModelConfig
from kac.networks.cost import duration, network_cost, short
from kac.solvers import knot_times, solve
from pipeline.rollout.plan import Plan
from pipeline.rollout.shard_maker import ShardOutcome
from pipeline.store.layout import Shard, StoreIdentity


def describe_cost(plan: Plan, teacher: ModelConfig) -> str:
    """Describe the remaining work: trajectories, network calls, bytes, shards and FLOPs."""
    rows, calls = sum(shard.rows for shard in plan.todo), network_calls(plan.identity, plan.todo)
    cost = network_cost(teacher.network, teacher.sample_shape, teacher.num_classes)
    return (
        f"{rows:,} trajectories, {calls:,} network calls (two per guided evaluation), "
        f"{short(rows * row_bytes(plan.identity), 'B')} before compression in {len(plan.todo):,} shards "
        f"({len(plan.finished):,} already exist); {short(cost.parameters)} parameters, "
        f"{short(cost.flops_per_call, 'FLOP')} per call, {short(calls * cost.flops_per_call, 'FLOP')} in total"
    )


def network_calls(identity: StoreIdentity, shards: Iterable[Shard]) -> int:
    """Return the number of network calls that the shards need."""
    whole = identity.solver_steps if identity.source == "trajectory" else identity.solver_steps // identity.knots
    calls = solve(lambda x, t: x, torch.zeros(1, 1), knot_times(whole), identity.solver).nfe
    return sum(shard.rows * calls * (1 if shard.guidance == 0 else 2) for shard in shards)


def row_bytes(identity: StoreIdentity) -> int:
    """Return the size of a row before encoding and compression."""
    state = math.prod(identity.sample_shape) * np.dtype(identity.dtype).itemsize
    schema = identity.arrow_schema()
    scalars = sum(int(schema.field(name).type.bit_width) // 8 for name in identity.scalar_columns)
    return len(identity.knot_columns) * state + scalars


def describe_remaining(first: ShardOutcome, rows: int, actors: int) -> str:
    """Estimate the time for ``rows`` more rows from the first computed shard."""
    seconds = rows * first.compute_seconds / first.computed_rows / max(1, actors)
    return f"about {duration(seconds)} left"

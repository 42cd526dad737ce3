"""Rollout: follow the frozen teacher and publish its trajectories, shard by shard, into an endpoint store.

``stage`` is the whole of it; ``plan``, ``shards`` (with ``teacher``) and ``seal`` are its steps; ``actors`` does the
second on Ray.

Exactly once: the plan fixes the name of every shard. Whoever computes a shard also publishes it, whole or not at all,
and only then returns its receipt; a shard that is there is checked from end to end and adopted. The manifest, written
last, lists receipts alone.
"""

from pipeline.rollout.plan import Plan, identify, make_plan
from pipeline.rollout.seal import seal
from pipeline.rollout.shards import Outcome
from pipeline.rollout.stage import compute_shards, rollout
from pipeline.rollout.teacher import RolloutError

__all__ = ["Outcome", "Plan", "RolloutError", "compute_shards", "identify", "make_plan", "rollout", "seal"]

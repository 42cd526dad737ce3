"""Rollout: compute the trajectories of the frozen teacher and publish them as the shards of an endpoint store.

``stage`` runs the steps: ``plan``, ``shard_maker`` (with ``teacher``) and ``seal``. ``actors`` makes shards on Ray.

Each shard is computed exactly once. The plan fixes its name. The process that computes a shard also publishes it
atomically, and only then returns its receipt. An existing shard is checked from end to end and reused. The manifest is
written last and lists only receipts.
"""

from pipeline.rollout.plan import Plan, identify, make_plan
from pipeline.rollout.seal import seal
from pipeline.rollout.shard_maker import ShardOutcome
from pipeline.rollout.stage import compute_shards, rollout
from pipeline.rollout.teacher import RolloutError

__all__ = ["Plan", "RolloutError", "ShardOutcome", "compute_shards", "identify", "make_plan", "rollout", "seal"]

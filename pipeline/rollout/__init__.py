"""Rollout: compute the frozen teacher's trajectories and publish them as the shards of an endpoint store.

``rollout_stage`` runs the steps, ``plan`` plans and seals the store, ``shard_maker`` computes and publishes a shard,
and ``actors`` makes shards on Ray.

Each shard is computed exactly once. The plan determines the shard's name. The process that computes a shard also
publishes it atomically, and only then returns its receipt. An existing shard with a receipt of the same size is reused;
one without a receipt is checked in full first. The manifest is written last and lists only receipts.
"""

from pipeline.rollout.plan import Plan, make_plan, seal
from pipeline.rollout.rollout_stage import compute_shards, rollout
from pipeline.rollout.shard_maker import RolloutError, ShardOutcome

__all__ = ["Plan", "RolloutError", "ShardOutcome", "compute_shards", "make_plan", "rollout", "seal"]

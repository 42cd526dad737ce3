"""Each simulation runs at a small size."""

import json
from pathlib import Path

import pytest

from pipeline.store.manifest import plan_shards
from tests.scale.simulations import SHARD_ROWS, SIMULATIONS, outcome_of, store_scale


@pytest.mark.parametrize("name", SIMULATIONS)
def test_a_simulation_runs(name: str, ray_cluster: None, tmp_path: Path):
    costs = SIMULATIONS[name](str(tmp_path), 30)
    assert all(cost >= 0 for cost in costs.values())
    rates = [cost for what, cost in costs.items() if what.endswith(("/s", "bytes", "ns"))]
    assert rates and min(rates) > 0


def test_fake_receipts_are_as_long_as_real_ones(tmp_path: Path):
    few, many = (store_scale(str(tmp_path / str(n)), n)["manifest, bytes"] for n in (3, 30))
    more = plan_shards(0.0, range(3 * SHARD_ROWS, 30 * SHARD_ROWS), SHARD_ROWS)
    compact = sum(len(json.dumps(outcome_of(shard).receipt.model_dump())) for shard in more)
    # The manifest indents its 27 more receipts, so they are longer than compact JSON.
    assert compact < many - few < 1.3 * compact

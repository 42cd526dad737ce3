"""Simulations of scale for pipeline/SCALING.md: python -m tests.scale store-scale --shards 100000."""

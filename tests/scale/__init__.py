"""Simulations of large runs for pipeline/SCALING.md: python -m tests.scale store-scale --shards 100000."""

"""Evaluate: compare samples of a teacher and its students, drawn from the same noise, with held-out images."""

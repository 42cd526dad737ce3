"""Evaluate: score the teacher and its students against held-out images, from the same noise."""

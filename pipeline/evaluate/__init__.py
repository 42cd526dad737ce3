"""Evaluate a teacher and its students: sample all from the same noise, and compare with held-out images."""

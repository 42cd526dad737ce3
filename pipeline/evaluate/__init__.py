"""Evaluate: score the teacher and its students against held-out images, from the same noise.

stage.py        the stage
inputs.py       the models to compare: folders, the front of a sweep, or runs in MLflow
samples.py      samples, features and their statistics, cached in chunks
compute.py      computes the chunks in this process or on Ray actors that may be lost, and tries feature networks
scores.py       the scores, their record and their table
results.py      writes the results to files, and to the runs of the evaluation and of the models
"""

"""Evaluate: score the teacher and its students against held-out images, from the same noise.

stage.py          the stage
inputs.py         the models to compare: folders, the front of a sweep, or runs in MLflow
feature_trial.py  a trial run of the feature networks before any other work
sources.py        samples and features, cached in chunks
actors.py         computes the chunks in this process or on Ray actors
pool.py           a pool of Ray actors that replaces lost actors
gather.py         turns chunks into the inputs of metrics
scores.py         the scores, their record and their table
model_runs.py     adds scores to the runs of the evaluated models
"""

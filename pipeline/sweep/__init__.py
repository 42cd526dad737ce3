"""Sweep: many students of one store, as trials of Ray Tune.

stage.py    the stage: check, add missing guidance scales, run, evaluate, write the answer
checks.py   checks before the sweep begins
space.py    the students of the sweep: grid points, chains, and the ranges of a search
trials.py   the trials under Ray Tune
search.py   which trial starts next, and which stops early
ledger.py   the record of each trial, one file each in OUT/trials
answer/     the results: tables, plots and a page
"""

from pipeline.sweep.ledger import Ledger, TrialRecord
from pipeline.sweep.stage import sweep

__all__ = ["Ledger", "TrialRecord", "sweep"]

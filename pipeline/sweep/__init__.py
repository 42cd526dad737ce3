"""Sweep: many students of one store, as trials of Ray Tune.

space.py    which students: the points of a grid, chains of them, and what a search draws from
ledger.py   what is known of each trial, in a file of its own below OUT/trials
search.py   which trial is next, and which is stopped early
checks.py   what must hold before any of it runs
trials.py   the trials under Ray Tune, and what they share
stage.py    the stage: check, add what the store lacks, run, judge, answer
answer/     what the trials have shown: rows, tables, pictures, a page
"""

from pipeline.sweep.ledger import Ledger, TrialRecord
from pipeline.sweep.stage import sweep

__all__ = ["Ledger", "TrialRecord", "sweep"]

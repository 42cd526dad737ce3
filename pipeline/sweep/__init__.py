"""Sweep: many students of one store, as trials of Ray Tune.

sweep_stage.py     the stage: check, add missing guidance scales, run, evaluate, write the report
checks.py          checks before the sweep begins
planned_trials.py  the trials of a grid and its chains: names, specs, values
proposers.py       the distributions of a search, and the search algorithms: random, Optuna
trials.py          the trials under Ray Tune: the process of a trial, Tune's searcher, ASHA
ledger.py          the record of each trial, one file each in OUT/trials
report/            the results: tables, plots and a page
"""

from pipeline.sweep.ledger import Ledger, TrialRecord
from pipeline.sweep.sweep_stage import sweep

__all__ = ["Ledger", "TrialRecord", "sweep"]

"""Sweep: many students of one store, as trials of Ray Tune.

sweep_stage.py     the stage: check, add missing guidance scales, run, evaluate, write the report
checks.py          checks before the sweep begins
planned_trials.py  the trials of a grid and its chains: names, specs, values
proposers.py       the distributions of a search, and the search algorithms: random, Optuna
trials.py          the trials under Ray Tune: the process of a trial, Tune's searcher, ASHA
ledger.py          the record of each trial, one file each in OUT/trials
sweep_results.py   the trials with their metrics, the fronts of quality against cost, and the table
sweep_plots.py     the plots of the report
sweep_report.py    the report: its files and its page
"""

from pipeline.sweep.ledger import Ledger, TrialRecord
from pipeline.sweep.sweep_stage import sweep

__all__ = ["Ledger", "TrialRecord", "sweep"]

"""Sweep: train many students from one store, or many teachers on one dataset, as trials of Ray Tune.

sweep_stage.py     checks the sweep, adds missing inputs, runs and evaluates trials, and writes the report
trial_kind.py      defines the interface to what the trials train
student_trials.py  students: checks the store, adds guidance scales, shares columns, distills
teacher_trials.py  teachers: checks the data, measures the updates of a budget, teaches
checks.py          checks the options and the resources before the sweep begins
planned_trials.py  plans the trials of grids, chains and searches: their names, specs and values
proposers.py       parses a search's distributions, and defines the search algorithms: random, Optuna
trials.py          runs the trials under Tune, with a searcher and an ASHA scheduler that read and write the ledger
ledger.py          keeps each trial's record in a file in OUT/trials
sweep_results.py   ranks the trials, and computes the fronts of quality against cost and the table
sweep_plots.py     draws the report's plots
sweep_report.py    writes the report's files and page
"""

from pipeline.sweep.ledger import Ledger, TrialRecord
from pipeline.sweep.sweep_stage import sweep

__all__ = ["Ledger", "TrialRecord", "sweep"]

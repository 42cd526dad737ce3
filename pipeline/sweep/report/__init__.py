"""The report of a sweep: a table of its trials, the best trial, the front of quality against cost, plots and a page.

report_files.py  writes the files below, and the sweep's run
sweep_report.py  the results as data: rows, ranking, fronts
trial_table.py   the table of trials as text
sweep_plots.py   the plots
sweep_page.py    the page

OUT/answer.json                      the best trial, and the folders of the students on the front
OUT/trials.parquet, trials.csv       every trial: its values, its state and its metrics
OUT/report.html                      a self-contained page
OUT/pictures/*.png                   the plots of the page
"""

from pipeline.sweep.report.report_files import write_report

__all__ = ["write_report"]

"""The answer of a sweep: a table of its trials, the best trial, the front of quality against cost, plots and a page.

OUT/answer.json                      the best trial, and the folders of the students on the front
OUT/trials.parquet, trials.csv       every trial: its values, its state and its metrics
OUT/report.html                      a self-contained page
OUT/pictures/*.png                   the plots of the page
"""

from pipeline.sweep.answer.answer import write_answer

__all__ = ["write_answer"]

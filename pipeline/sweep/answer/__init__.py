"""What a sweep answers: its trials in one table, the best, the front of quality against cost, pictures and a page.

OUT/answer.json                      the best trial, and the folders of the students on the front
OUT/trials.parquet, trials.csv       every trial: what was varied, how it went, what was measured
OUT/report.html                      one page that stands alone
OUT/pictures/*.png                   its pictures
"""

from pipeline.sweep.answer.answer import write_answer

__all__ = ["write_answer"]

"""`python -m jobs.sweep --help`"""

from jobs.command import main
from pipeline.config import SweepSpec
from pipeline.sweep import sweep

if __name__ == "__main__":
    main(SweepSpec, sweep)

"""`python -m jobs.sweep --help`"""

from jobs.command import main
from pipeline.sweep import sweep
from pipeline.config import SweepSpec

if __name__ == "__main__":
    main(SweepSpec, sweep)

"""`python -m jobs.sample --help`"""

from jobs.command import main
from pipeline.sample import sample
from pipeline.config import SampleSpec

if __name__ == "__main__":
    main(SampleSpec, sample)

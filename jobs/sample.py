"""`python -m jobs.sample --help`"""

from jobs.command import main
from pipeline.config import SampleSpec
from pipeline.sample import sample

if __name__ == "__main__":
    main(SampleSpec, sample)

"""`python -m jobs.distill --help`"""

from jobs.command import main
from pipeline.config import DistillSpec
from pipeline.distill import distill

if __name__ == "__main__":
    main(DistillSpec, distill)

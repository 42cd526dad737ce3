"""`python -m jobs.distill --help`"""

from jobs.command import main
from pipeline.distill import distill
from pipeline.config import DistillSpec

if __name__ == "__main__":
    main(DistillSpec, distill)

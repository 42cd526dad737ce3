"""`python -m jobs.rollout --help`"""

from jobs.command import main
from pipeline.rollout import rollout
from pipeline.config import RolloutSpec

if __name__ == "__main__":
    main(RolloutSpec, rollout)

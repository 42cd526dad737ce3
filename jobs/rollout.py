"""`python -m jobs.rollout --help`"""

from jobs.command import main
from pipeline.config import RolloutSpec
from pipeline.rollout import rollout

if __name__ == "__main__":
    main(RolloutSpec, rollout)

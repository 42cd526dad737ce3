"""`python -m jobs.study --help`"""

from jobs.command import main
from pipeline.config import StudySpec
from pipeline.study import study

if __name__ == "__main__":
    main(StudySpec, study)

"""`python -m jobs.teach --help`"""

from jobs.command import main
from pipeline.teach import teach
from pipeline.config import TeachSpec

if __name__ == "__main__":
    main(TeachSpec, teach)

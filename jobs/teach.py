"""`python -m jobs.teach --help`"""

from jobs.command import main
from pipeline.config import TeachSpec
from pipeline.teach import teach

if __name__ == "__main__":
    main(TeachSpec, teach)

"""`python -m jobs.quickstart --help`"""

from jobs.command import main
from pipeline.quickstart import quickstart
from pipeline.config import QuickstartSpec

if __name__ == "__main__":
    main(QuickstartSpec, quickstart)

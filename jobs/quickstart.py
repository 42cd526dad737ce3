"""`python -m jobs.quickstart --help`"""

from jobs.command import main
from pipeline.config import QuickstartSpec
from pipeline.quickstart import quickstart

if __name__ == "__main__":
    main(QuickstartSpec, quickstart)

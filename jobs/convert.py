"""`python -m jobs.convert --help`"""

from jobs.command import main
from pipeline.config import ConvertSpec
from pipeline.convert import convert

if __name__ == "__main__":
    main(ConvertSpec, convert)

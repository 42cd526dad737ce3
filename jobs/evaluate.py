"""`python -m jobs.evaluate --help`"""

from jobs.command import main
from pipeline.evaluate import evaluate
from pipeline.config import EvaluateSpec

if __name__ == "__main__":
    main(EvaluateSpec, evaluate)

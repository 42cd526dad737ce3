"""`python -m jobs.evaluate --help`"""

from jobs.command import main
from pipeline.config import EvaluateSpec
from pipeline.evaluate.evaluate_stage import evaluate

if __name__ == "__main__":
    main(EvaluateSpec, evaluate)

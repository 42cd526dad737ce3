"""`python -m jobs.benchmark --help`"""

from jobs.command import main
from pipeline.benchmark import BenchmarkSpec, benchmark

if __name__ == "__main__":
    main(BenchmarkSpec, benchmark)

"""The command lines, for a shell or ``ray job submit``."""

import os

# Set this before torch loads OpenMP, whose threads spin by default while they wait. On a busy machine, spinning made a
# training update take 800 ms instead of 25 ms. With sleeping threads, an update takes 32 ms.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# By default, Ray deduplicates workers' similar log lines, and prints them late, in colour, often after the result.
os.environ.setdefault("RAY_DEDUP_LOGS", "0")

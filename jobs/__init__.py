"""What ``ray job submit`` runs."""

import os

# Before torch loads its OpenMP. By default its threads spin while they wait for each other: on a busy machine one
# training update took 800 ms that way instead of 25 ms; with threads that sleep it takes 32 ms.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# Ray holds back lines of workers that look alike, to print them later, coloured, and often after the result.
os.environ.setdefault("RAY_DEDUP_LOGS", "0")

"""Run one simulation and print its costs."""

import argparse
import tempfile

from pipeline.cluster import connection as cluster
from tests.scale.simulations import SIMULATIONS

if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m tests.scale")
    parser.add_argument("simulation", choices=SIMULATIONS)
    parser.add_argument("--shards", type=int, default=2000)
    options = parser.parse_args()
    cluster.connect()
    with tempfile.TemporaryDirectory() as folder:
        for what, cost in SIMULATIONS[options.simulation](folder, options.shards).items():
            print(f"{what:32} {cost:14,.3f}")

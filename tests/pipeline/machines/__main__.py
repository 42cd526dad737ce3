"""Command line for a cluster of simulated machines. It needs root.

python -m tests.pipeline.machines up                          # start the cluster; Ctrl-C stops it
python -m tests.pipeline.machines table                       # compare the digits' table with that of one machine
python -m tests.pipeline.machines faults [FAULT:STAGE ...]    # inject faults; prints JSON lines, then a table
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Sequence
from pathlib import Path

from tests.pipeline.machines import faults
from tests.pipeline.machines.cluster import Cluster, cluster_of_machines
from tests.pipeline.machines.network import ROOT, missing_support

PAIRS = [f"{fault}:{stage}" for stage in faults.STAGES for fault in faults.FAULTS]


def main() -> int:
    """Parse the command line and run the command."""
    parser = argparse.ArgumentParser(prog="python -m tests.pipeline.machines")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("up")
    commands.add_parser("table")
    run = commands.add_parser("faults")
    run.add_argument("pairs", nargs="*", metavar="FAULT:STAGE", help=f"default: all of {', '.join(PAIRS)}")
    options = parser.parse_args()
    pairs = getattr(options, "pairs", []) or PAIRS
    if unknown := sorted(set(pairs) - set(PAIRS)):
        parser.error(f"unknown: {', '.join(unknown)}. Choose from {', '.join(PAIRS)}.")
    if reason := missing_support():
        print(f"machines: {reason}", file=sys.stderr)
        return 2
    with cluster_of_machines() as cluster, tempfile.TemporaryDirectory(prefix="machines-") as folder:
        if options.command == "up":
            print(f"{cluster.job_server}: enter a machine by nsenter -a -t PID; Ctrl-C stops all machines", flush=True)
            print("\n".join(f"{machine.name} {machine.pid}" for machine in cluster.network.machines), flush=True)
            threading.Event().wait()
        if options.command == "table":
            return compare_tables(cluster, Path(folder))
        return run_faults(faults.Trials(cluster, Path(folder)), [tuple(pair.split(":")) for pair in pairs])


RECIPE = (
    "teach --out {place}/teach",
    "rollout --teacher {place}/teach --store {place}/store",
    "sweep --store {place}/store --out {place}/sweep --samples 0",
    "evaluate --teacher {place}/teach --students {place}/sweep --out {place}/evaluation",
)


def compare_tables(cluster: Cluster, folder: Path) -> int:
    """Run the digits' recipe on the cluster and with an embedded Ray here, and print both tables."""
    environment = {
        **{name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"},
        "MLFLOW_TRACKING_URI": f"sqlite:///{folder / 'mlflow.db'}",
        "DISTILLKAC_CACHE": str(folder / "cache"),
    }
    here = folder / "here"
    for line in RECIPE:
        stage, *options = line.split()
        command = [f"jobs.{stage}", "--config", "digits", *options]
        output = cluster.submit(*(word.format(place=cluster.path("table")) for word in command)).finish(3600)
        local = [sys.executable, "-m", *(word.format(place=here) for word in command)]
        subprocess.run(local, cwd=ROOT, env=environment, check=True, stdout=subprocess.DEVNULL)
        print(json.dumps({"finished": stage}), flush=True)
    there = cluster.download("table/evaluation", folder / "there")
    print(output, (here / "evaluation" / "table.txt").read_text(), sep="\n")
    print(f"largest relative difference: {faults.scores_difference(there, here / 'evaluation'):.2g}")
    return 0


def run_faults(trials: faults.Trials, pairs: Sequence[tuple[str, ...]]) -> int:
    """Inject each fault into its stage, continuing after failures, and return the exit code."""
    outcomes, failures = [], 0
    for fault, stage in pairs:
        try:
            trials.run_plain(stage)
            outcomes.append(trials.run(fault, stage))
            print(json.dumps(outcomes[-1]._asdict()), flush=True)
        except Exception:  # noqa: BLE001
            failures += 1
            print(json.dumps({"fault": fault, "stage": stage, "error": traceback.format_exc()}), flush=True)
            trials.mend()
    print(faults.format_table(outcomes))
    return 1 if failures else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)

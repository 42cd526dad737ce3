"""The cluster of machines from the command line, as root:

python -m tests.pipeline.machines up                                         # and down with Ctrl-C
python -m tests.pipeline.machines faults [FAULT:STAGE ...]    # JSON lines, then the table
"""

import argparse
import json
import sys
import tempfile
import threading
import traceback
from collections.abc import Sequence
from pathlib import Path

from tests.pipeline.machines import faults
from tests.pipeline.machines.cluster import cluster_of_machines
from tests.pipeline.machines.network import why_not

PAIRS = [f"{fault}:{stage}" for stage in faults.STAGES for fault in faults.FAULTS]


def main() -> int:
    """Parse the command line and run the command."""
    parser = argparse.ArgumentParser(prog="python -m tests.pipeline.machines")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("up")
    run = commands.add_parser("faults")
    run.add_argument("pairs", nargs="*", metavar="FAULT:STAGE", help=f"of {', '.join(PAIRS)}; default: all")
    options = parser.parse_args()
    pairs = getattr(options, "pairs", []) or PAIRS
    if wrong := sorted(set(pairs) - set(PAIRS)):
        parser.error(f"expected FAULT:STAGE of {', '.join(PAIRS)}, found {', '.join(wrong)}")
    if reason := why_not():
        print(f"machines: {reason}", file=sys.stderr)
        return 2
    with cluster_of_machines() as cluster, tempfile.TemporaryDirectory(prefix="machines-") as folder:
        if options.command == "up":
            print(f"{cluster.job_server}: enter a machine with nsenter -a -t PID; Ctrl-C ends all", flush=True)
            print("\n".join(f"{machine.name} {machine.pid}" for machine in cluster.network.machines), flush=True)
            threading.Event().wait()
        return run_faults(faults.Trials(cluster, Path(folder)), [tuple(pair.split(":")) for pair in pairs])


def run_faults(trials: faults.Trials, pairs: Sequence[tuple[str, ...]]) -> int:
    """Each fault in its stage; one that goes wrong does not keep the others from being tried."""
    outcomes, wrong = [], 0
    for fault, stage in pairs:
        try:
            trials.run_plain(stage)
            outcomes.append(trials.run(fault, stage))
            print(json.dumps(outcomes[-1]._asdict()), flush=True)
        except Exception:  # noqa: BLE001
            wrong += 1
            print(json.dumps({"fault": fault, "stage": stage, "error": traceback.format_exc()}), flush=True)
            trials.mend()
    print(faults.show(outcomes))
    return 1 if wrong else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)

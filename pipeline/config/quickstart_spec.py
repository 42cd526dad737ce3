"""The options of quickstart."""

from pydantic import PositiveInt

from kac.util.fingerprint import unhashed
from kac.util.path_options import output_path
from pipeline.config.shared_options import SEED
from pipeline.config.spec import Spec


class QuickstartSpec(Spec):
    """Run all stages on the handwritten digits, on one machine: teach, rollout, distill, refine, evaluate, report."""

    stage = "quickstart"
    out: str = output_path(..., "folder to write")
    seed: int = SEED
    trajectories: PositiveInt = unhashed(12000, "trajectories in the store")
    steps: tuple[PositiveInt, ...] = unhashed((1, 2, 4, 20), "step counts to evaluate", min_length=1)

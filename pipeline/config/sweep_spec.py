"""The options of sweep: of sweeps of students (the default), and of sweeps of teachers (``--stage teach``)."""

from itertools import pairwise
from typing import Any, ClassVar, Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, ValidationInfo, field_validator

from kac.sampling import TEACHER_STEPS
from kac.solvers import KnotGrid, SolverName
from kac.util.fingerprint import unhashed
from kac.util.options import Options
from kac.util.path_options import input_path, output_path
from pipeline.config.distill_spec import DistillSpec, StudentOptions
from pipeline.config.spec import (
    FEATURE_FILE,
    LABEL_SELECTOR,
    RESOURCES,
    Features,
    LabelSelector,
    RegisteredName,
    Spec,
    parse_pairs,
)
from pipeline.config.teach_spec import TeacherOptions, TeachSpec

STEP_COUNTS = (1, 2, 4, 20)
"""The default student steps of a sweep."""


class SweepOptions(Options):
    """The options that sweeps of students and sweeps of teachers share."""

    trained: ClassVar[type[DistillSpec] | type[TeachSpec]]
    """The spec of a trial."""
    fixed: ClassVar[type[Options]]
    """The options that every trial takes from the sweep, unless the trial's values contain them."""
    out: str = output_path(..., "folder to write: one model folder per trial, and the results")
    grid: dict[str, tuple[Any, ...]] = unhashed(
        {}, "axes of the grid: options of the trained stage, such as optimizer.learning-rate=1e-3,2e-3"
    )
    search: dict[str, str] = unhashed(
        {},
        "distributions to draw options from, such as 'optimizer.learning-rate=loguniform(1e-4,3e-3)'; also uniform, "
        "choice and randint (both ends included); trials also draw from the grid's axes",
    )
    trials: NonNegativeInt = unhashed(0, "number of trials of `search`; a rerun can add more")
    searcher: Literal["random", "optuna"] = unhashed("optuna", "search algorithm for `search`")
    asha: bool = unhashed(False, "stop bad trials early (asynchronous successive halving)")
    asha_metric: str = unhashed(
        "validation/energy_distance", "metric that ASHA and Optuna optimise, reported during training"
    )
    asha_factor: float = unhashed(3.0, "keep one of every N trials at each rung", gt=1)
    grace_updates: PositiveInt = unhashed(500, "updates before ASHA can stop a trial")
    metric: str | None = unhashed(
        None, "metric that selects the best model; default: the Frechet distance in the last space in `features`"
    )
    samples: NonNegativeInt = unhashed(2000, "samples per evaluated model; 0: models are not evaluated")
    features: Features = input_path(
        ("pixels", "classifier"),
        "feature spaces of the evaluation, as in jobs.evaluate",
        kind="file",
        pattern=FEATURE_FILE,
        min_length=1,
    )
    register: RegisteredName | None = unhashed(None, "register the best model in MLflow under this name")
    workers: int | None = unhashed(
        None, "Ray Train workers per trial; default: train in the trial's process", RESOURCES, ge=0
    )
    cpus_per_trial: PositiveFloat = unhashed(1.0, "CPUs per trial, or per worker if `workers` is set", RESOURCES)
    gpus_per_trial: float | None = unhashed(
        None,
        "GPUs per trial, or per worker if `workers` is set, such as 0.5; default: 1 if the cluster has GPUs, else 0",
        RESOURCES,
        ge=0,
    )
    label_selector: LabelSelector = LABEL_SELECTOR

    @field_validator("grid", "search", mode="before")
    @classmethod
    def _parse_axes(cls, given: Any, info: ValidationInfo) -> Any:
        """Convert FIELD=VALUE,VALUE words to a mapping. In a grid, a single value becomes an axis of one value."""
        given = parse_pairs(f"`{info.field_name}`", given)
        if info.field_name == "search" or not isinstance(given, dict):
            return given
        axes = {}
        for name, values in given.items():
            parts = [value.strip() for value in values.split(",")] if isinstance(values, str) else values
            axes[name] = tuple(parts) if isinstance(parts, list | tuple) else (parts,)
            if not axes[name] or any(value in ("", None) for value in axes[name]):
                raise ValueError(f"`grid` has no value for {name}. Give {name}=VALUE,VALUE.")
        return axes


class SweepSpec(StudentOptions, SweepOptions, Spec):
    """Distill many students from one store, evaluate them and report the best (Ray Tune).

    With --stage teach, train teachers instead: see --stage teach --help.
    """

    stage = "sweep"
    common = ("steps", "guidance", "grid", "chain", "search", "trials", "samples", "features", "seed", "register")
    trained, fixed = DistillSpec, StudentOptions
    steps: tuple[PositiveInt, ...] | None = unhashed(
        None,
        "student step counts: 1 2 is short for `grid` steps=1,2; an any-step student is trained once for all; default: "
        "1 2 4 20, or the counts in `chain`, or 4 if `search` is set",
        min_length=1,
    )
    guidance: tuple[float | Literal["all"], ...] | None = unhashed(
        None,
        "guidance scales: 0 1 is short for `grid` guidance=0,1; all: one student for all scales; default: 0",
        min_length=1,
    )
    chain: tuple[PositiveInt, ...] = unhashed(
        (), "step counts of a chain of students, such as 20 4 2 1; each starts from the previous one; added to the grid"
    )
    rollout: bool = unhashed(False, "first add missing guidance scales to the store")

    @field_validator("chain", mode="before")
    @classmethod
    def _split_commas(cls, given: Any) -> Any:
        """Accept 20,4,2,1 for 20 4 2 1."""
        if isinstance(given, list | tuple) and len(given) == 1 and "," in str(given[0]):
            return given[0].split(",")
        return given

    @field_validator("chain")
    @classmethod
    def _check_chain(cls, chain: tuple[int, ...]) -> tuple[int, ...]:
        if len(chain) == 1 or any(after >= before for before, after in pairwise(chain)):
            raise ValueError(
                f"`chain` is {' '.join(map(str, chain))}. Give two or more step counts, each smaller than the one "
                "before."
            )
        return chain


class TeachSweepSpec(TeacherOptions, SweepOptions, Spec):
    """Train many teachers on one dataset, evaluate them and report the best (Ray Tune)."""

    stage = "sweep"
    section = "teach"
    common = ("grid", "search", "trials", "budget_seconds", "samples", "features", "solver", "solver_steps", "seed")
    trained, fixed = TeachSpec, TeacherOptions
    budget_seconds: float | None = Field(
        None,
        gt=0,
        description="train each teacher for as many updates as it does in this many seconds, measured once before its "
        "first update; default: the trial's `optimizer.updates`",
    )
    solver: SolverName = unhashed("ab2", "solver of the evaluation")
    solver_steps: PositiveInt = unhashed(TEACHER_STEPS, "solver steps of the evaluation")
    knot_grid: KnotGrid = unhashed("uniform", "spacing of the evaluation's solver steps from t = 1 to t = 0")
    time_factor: float = unhashed(1.0, "time factor of the evaluation's sampling", gt=0, le=1)


AnySweep = SweepSpec | TeachSweepSpec

SWEEPS: dict[str, type[SweepSpec] | type[TeachSweepSpec]] = {"distill": SweepSpec, "teach": TeachSweepSpec}
"""The kinds of sweeps by the stage that their trials run: the values of ``--stage``."""

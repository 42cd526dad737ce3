"""The options of the stages: one frozen spec per stage."""

from pipeline.config.distill_spec import DistillSpec, StudentOptions
from pipeline.config.evaluate_spec import CLAIMS, Claim, EvaluateSpec, QuickstartSpec, SampleSpec, StudySpec
from pipeline.config.export_spec import ExportSpec
from pipeline.config.rollout_spec import RolloutRecipe, RolloutSpec
from pipeline.config.spec import ActorOptions, OptimizerConfig, Spec, WorkerOptions
from pipeline.config.sweep_spec import STEP_COUNTS, SWEEPS, AnySweep, SweepSpec, TeachSweepSpec
from pipeline.config.teach_spec import ConvertSpec, TeachSpec

__all__ = [
    "CLAIMS",
    "STEP_COUNTS",
    "SWEEPS",
    "ActorOptions",
    "AnySweep",
    "Claim",
    "ConvertSpec",
    "DistillSpec",
    "EvaluateSpec",
    "ExportSpec",
    "OptimizerConfig",
    "QuickstartSpec",
    "RolloutRecipe",
    "RolloutSpec",
    "SampleSpec",
    "Spec",
    "StudentOptions",
    "StudySpec",
    "SweepSpec",
    "TeachSpec",
    "TeachSweepSpec",
    "WorkerOptions",
]

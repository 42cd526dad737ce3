"""The options of the stages: one frozen spec per stage, each in a module of its own."""

from pipeline.config.convert_spec import ConvertSpec
from pipeline.config.distill_spec import DistillSpec, StudentOptions
from pipeline.config.evaluate_spec import EvaluateSpec
from pipeline.config.quickstart_spec import QuickstartSpec
from pipeline.config.rollout_spec import RolloutRecipe, RolloutSpec
from pipeline.config.sample_spec import SampleSpec
from pipeline.config.shared_options import ActorOptions, OptimizerConfig, WorkerOptions
from pipeline.config.spec import Spec
from pipeline.config.study_spec import CLAIMS, Claim, StudySpec
from pipeline.config.sweep_spec import STEP_COUNTS, SweepSpec
from pipeline.config.teach_spec import TeachSpec

__all__ = [
    "CLAIMS",
    "STEP_COUNTS",
    "ActorOptions",
    "Claim",
    "ConvertSpec",
    "DistillSpec",
    "EvaluateSpec",
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
    "WorkerOptions",
]

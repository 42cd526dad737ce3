"""Training, written once: a task builds a learner, a loop calls it, and a host runs the loop."""

from pipeline.training.hosts import choose_workers, train
from pipeline.training.learner import Learner, NetworkLearner, TrainedNetwork, Worker
from pipeline.training.loop import Job, Report, Task
from pipeline.training.model import write_model
from pipeline.training.randomness import EpochOrder, generator

__all__ = [
    "EpochOrder",
    "Job",
    "Learner",
    "NetworkLearner",
    "Report",
    "Task",
    "TrainedNetwork",
    "Worker",
    "choose_workers",
    "generator",
    "train",
    "write_model",
]

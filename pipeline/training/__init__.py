"""Training, written once: a task builds a learner, a loop calls it, and a host runs the loop."""

from pipeline.training.hosts import choose_workers, train
from pipeline.training.learner import EpochOrder, Learner, NetworkLearner, TrainedNetwork, Worker, generator
from pipeline.training.loop import Job, OnCheckpoint, Task

__all__ = [
    "EpochOrder",
    "Job",
    "Learner",
    "NetworkLearner",
    "OnCheckpoint",
    "Task",
    "TrainedNetwork",
    "Worker",
    "choose_workers",
    "generator",
    "train",
]

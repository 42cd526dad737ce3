"""The training code that all stages share: a task builds a learner, ``loop`` trains it, and ``hosts`` runs the loop."""

from pipeline.training.batches import MicroBatch, Worker
from pipeline.training.hosts import (
    OnReport,
    WorkerGroup,
    await_workers,
    check_batch_split,
    choose_workers,
    describe_cost,
    train,
    train_model,
)
from pipeline.training.learner import GUIDE, Learner, Losses
from pipeline.training.loop import Job, Task
from pipeline.training.validation import HeldOut, Validation

__all__ = [
    "GUIDE",
    "HeldOut",
    "Job",
    "Learner",
    "Losses",
    "MicroBatch",
    "OnReport",
    "Task",
    "Validation",
    "Worker",
    "WorkerGroup",
    "await_workers",
    "check_batch_split",
    "choose_workers",
    "describe_cost",
    "train",
    "train_model",
]

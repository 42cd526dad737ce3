"""Training, shared by all stages: a task builds a learner, the loop updates it, and a host runs the loop."""

from pipeline.training.cost import describe_cost, describe_workers, log_cost
from pipeline.training.hosts import OnReport, WorkerGroup, await_workers, check_batch_split, choose_workers, train
from pipeline.training.learner import (
    EpochOrder,
    Learner,
    MicroBatch,
    NetworkLearner,
    Progress,
    TrainedNetwork,
    Worker,
    seed_dropout,
    slot_generator,
    update_generator,
)
from pipeline.training.loop import Job, Task
from pipeline.training.prefetcher import on_device, pinned, prefetched
from pipeline.training.sheets import Sheets
from pipeline.training.validation import HeldOut, Validation

__all__ = [
    "EpochOrder",
    "HeldOut",
    "Job",
    "Learner",
    "MicroBatch",
    "NetworkLearner",
    "OnReport",
    "Progress",
    "Sheets",
    "Task",
    "TrainedNetwork",
    "Validation",
    "Worker",
    "WorkerGroup",
    "await_workers",
    "check_batch_split",
    "choose_workers",
    "describe_cost",
    "describe_workers",
    "log_cost",
    "on_device",
    "pinned",
    "prefetched",
    "seed_dropout",
    "slot_generator",
    "train",
    "update_generator",
]

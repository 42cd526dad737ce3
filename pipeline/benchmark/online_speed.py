"""Distillation from the store compared with distillation that runs the teacher in the training loop."""

from collections.abc import Callable

import torch
from torch import Tensor

from kac.conditioning import network_labels
from kac.data import open_dataset
from kac.guidance import guide
from kac.losses import Interval
from kac.model import Model, load_model
from kac.solvers import Method, knot_times, solve
from kac.util.device import default_device
from pipeline.benchmark.distill_speed import UNIT, speed, updates_of
from pipeline.benchmark.measurement import Measurement, interleave, one_thread
from pipeline.benchmark.setting import STUDENT_STEPS, Setting

ONLINE_UPDATES, SOLVER_STEPS = 20, 100


def measure(setting: Setting) -> list[Measurement]:
    """Compare training from the store with a teacher in the training loop."""
    updates, batch = updates_of(setting, setting.store().rows(0.0)), online_batches(setting)
    with one_thread():
        loaded, online = interleave(
            setting.spec.repeats,
            lambda: speed(setting, updates),
            lambda: speed(setting, ONLINE_UPDATES, batch=batch),
        )
    return [Measurement("store, loaded once / the teacher in the training loop", UNIT, loaded, online)]


def online_batches(setting: Setting) -> Callable[[int], Interval]:
    """Return a function that adds noise to data up to the start of an interval and runs the teacher to its end.

    This is Algorithm 1 of arXiv 2509.21513 with one interval per batch.
    """
    size, device = setting.spec.batch_size, default_device()
    teacher = load_model(setting.teacher, device)
    data, path = open_dataset(teacher.config.data).train, teacher.config.path.build()
    times = knot_times(STUDENT_STEPS).float()

    def batch(update: int) -> Interval:
        k = update % STUDENT_STEPS
        images, classes = (part.to(device) for part in data.rows(torch.randint(len(data), (size,))))
        label = network_labels(teacher.config, classes)
        t_start, t_end = (times[i].expand(size).to(device) for i in (k, k + 1))
        x_start = path.sample(images, t_start).x_t
        return Interval(x_start, endpoint(teacher, x_start, label, k), t_start, t_end, label, torch.zeros_like(t_start))

    return batch


@torch.no_grad()
def endpoint(teacher: Model, x_start: Tensor, label: Tensor, k: int, solver: Method = "ab2") -> Tensor:
    """The teacher's endpoint of the student's k-th interval: [batch, *sample]."""
    every = SOLVER_STEPS // STUDENT_STEPS
    times = knot_times(SOLVER_STEPS)[k * every : (k + 1) * every + 1]
    return solve(guide(teacher.network, 0.0, label), x_start, times, solver).x

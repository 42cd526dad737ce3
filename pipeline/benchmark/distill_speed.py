"""Distillation from the store, loaded once or streamed, against the same loop over tensors in memory."""

from pipeline.benchmark.measurement import Bar, Measurement, interleave, one_thread
from pipeline.benchmark.setting import STUDENT_STEPS, Setting
from pipeline.benchmark.training import UNIT, TensorTask, optimizer, store_task, task_speed, updates_of

LOADED_BAR, STREAMED_BAR = 0.95, 0.6
STREAMED_SHARE = 4
"""How many times larger than its memory budget the streamed store is."""


def measure(setting: Setting) -> list[Measurement]:
    """The store loaded once, and the store streamed by Ray Data, each against tensors in memory."""
    source = setting.store()
    every = source.identity.knots // STUDENT_STEPS
    whole = next(source.batches(source.rows(0.0), knots=range(0, source.identity.knots + 1, every)))
    updates = updates_of(setting, len(whole.label))
    budget = whole.knots.nbytes / STREAMED_SHARE / 2**30
    with one_thread():
        tensors, loaded, streamed = interleave(
            setting.spec.repeats,
            lambda: task_speed(TensorTask(optimizer(setting, updates), setting.teacher, whole.knots, whole.label)),
            lambda: task_speed(store_task(setting, source.path, updates)),
            lambda: task_speed(store_task(setting, source.path, updates, memory_gib=budget)),
        )
    return [
        Measurement("store, loaded once / tensors in memory", UNIT, loaded, tensors, Bar(">=", LOADED_BAR)),
        Measurement("store, streamed / tensors in memory", UNIT, streamed, tensors, Bar(">=", STREAMED_BAR)),
    ]

"""Distillation from the store against one without a store, with the teacher in the training loop."""

from pipeline.benchmark.measurement import Measurement, interleave, one_thread
from pipeline.benchmark.setting import Setting
from pipeline.benchmark.training import UNIT, OnlineTask, optimizer, store_task, task_speed, updates_of

ONLINE_UPDATES = 20


def measure(setting: Setting) -> list[Measurement]:
    """The store against a teacher inside the training loop."""
    source = setting.store()
    updates = updates_of(setting, source.rows(0.0))
    with one_thread():
        loaded, online = interleave(
            setting.spec.repeats,
            lambda: task_speed(store_task(setting, source.path, updates)),
            lambda: task_speed(OnlineTask(optimizer(setting, ONLINE_UPDATES), setting.teacher)),
        )
    return [Measurement("store, loaded once / the teacher in the training loop", UNIT, loaded, online)]

"""The cost of a draw and of a velocity of the Kac process, compared with a normal draw."""

from collections.abc import Callable

import torch

from kac.process import KacProcess
from pipeline.benchmark.measurement import Measurement, interleave, one_thread, seconds_per_call
from pipeline.benchmark.setting import Setting

ELEMENTS = 1_000_000
UNIT = "ns/element"


def measure(setting: Setting) -> list[Measurement]:
    """Measure on one thread, with a = 9, c = 3, uniform times in (0, 1) and float32."""
    process = KacProcess(a=9.0, c=3.0)
    generator = torch.Generator().manual_seed(0)
    t = torch.rand(ELEMENTS, generator=generator).clamp(min=1e-6)
    noise = process.sample(t, generator)
    with one_thread():
        normal, sample, velocity = interleave(
            setting.spec.repeats,
            lambda: _nanoseconds(lambda: torch.randn(ELEMENTS, generator=generator)),
            lambda: _nanoseconds(lambda: process.sample(t, generator)),
            lambda: _nanoseconds(lambda: process.velocity(noise.displacement, t, noise.is_atom)),
        )
    return [
        Measurement("exact draw of the process / a normal draw", UNIT, sample, normal),
        Measurement("velocity of the process / a normal draw", UNIT, velocity, normal),
    ]


def _nanoseconds(work: Callable[[], object]) -> float:
    return seconds_per_call(work) / ELEMENTS * 1e9

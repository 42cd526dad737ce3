"""Benchmark: the cost of distribution and of the store, as ratios that can be compared between machines.

Both sides of a ratio run alternately (A B A B ...), in the same process or in identical processes, so that other load
on the machine affects both sides. ``parts`` contains the measurements.
"""

import dataclasses
import json
import os
import platform
import statistics
import tempfile
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar, get_args

import torch
from pydantic import PositiveInt, model_validator

from kac.data import DataConfig
from kac.model import load_config, save_model, teacher_config
from kac.networks import MLPConfig, build_network
from kac.networks.network_kinds import NetworkChoice
from kac.path import PathConfig
from kac.util import files, probes
from kac.util.fingerprint import unhashed
from kac.util.log import log, progress_log
from kac.util.options import OptionStyle
from kac.util.path_options import check_output, input_path, output_path
from pipeline import store
from pipeline.cluster import connection as cluster
from pipeline.config import RolloutSpec, Spec
from pipeline.rollout import compute_shards, make_plan, seal

__all__ = ["BenchmarkSpec", "Measurement", "benchmark"]

Part = Literal["peak-memory", "rollout-speed", "distill-speed", "bytes-read", "bytes-stored", "online-speed", "gpu"]
DEFAULT_PARTS = tuple(part for part in get_args(Part) if part != "gpu")

CALLS_PER_SHARD, MIN_SHARDS = 4, 5
STORE_FACTOR = 3  # trajectories in the store / trajectories per actor

Value = TypeVar("Value")


class BenchmarkSpec(Spec):
    """Compare rollout, store and distillation with plain loops, as ratios (10 minutes on 2 CPUs)."""

    stage = "benchmark"
    only: tuple[Part, ...] = unhashed(
        DEFAULT_PARTS,
        "parts to measure; default: all but gpu, which measures built-in networks of several sizes in every precision",
        min_length=1,
    )
    repeats: PositiveInt = unhashed(5, "number of times to measure both sides of each ratio")
    trajectories: PositiveInt = unhashed(
        8192, "trajectories per actor in rollout-speed; the other parts use a store with three times as many"
    )
    batch_size: PositiveInt = unhashed(256, "trajectories per network call, and samples per update")
    teacher: str | None = input_path(None, "model folder of a teacher; default: untrained, with `network` and `data`")
    network: NetworkChoice = MLPConfig()
    data: DataConfig = DataConfig()
    folder: str | None = unhashed(None, "scratch folder that all nodes can access; default: a local temporary folder")
    json_file: Annotated[str | None, OptionStyle(name="json")] = output_path(
        None, "file to write all results to; - prints them instead of the table", kind="file"
    )

    @model_validator(mode="after")
    def _fits(self) -> "BenchmarkSpec":
        shard = CALLS_PER_SHARD * self.batch_size
        if self.trajectories % shard or self.trajectories < MIN_SHARDS * shard:
            raise ValueError(
                f"`trajectories` is {self.trajectories}, but must be a multiple of {shard} ({CALLS_PER_SHARD} times "
                f"`batch_size`) and at least {MIN_SHARDS * shard}."
            )
        return self


@dataclass(frozen=True)
class Measurement:
    """A quantity and an optional reference, each measured once per turn."""

    what: str
    unit: str
    values: tuple[float, ...]
    against: tuple[float, ...] = ()
    bar: str | None = None  # limit for the median ratio, such as ">= 0.95"

    @property
    def ratios(self) -> tuple[float, ...]:
        """One ratio per turn, or an empty tuple if there is no reference."""
        return tuple(a / b for a, b in zip(self.values, self.against, strict=True)) if self.against else ()

    @property
    def holds(self) -> bool | None:
        """Whether the median ratio meets the bar, or None if there is no bar."""
        if self.bar is None:
            return None
        ratio, (sign, limit) = statistics.median(self.ratios), self.bar.split()
        return ratio >= float(limit) if sign == ">=" else ratio <= float(limit)

    def record(self) -> dict[str, Any]:
        """The measurement as plain values for JSON."""
        return {
            **dataclasses.asdict(self),
            "ratios": self.ratios,
            "median_ratio": statistics.median(self.ratios) if self.ratios else None,
            "min_ratio": min(self.ratios, default=None),
            "max_ratio": max(self.ratios, default=None),
            "holds": self.holds,
        }


def benchmark(spec: BenchmarkSpec) -> dict[str, list[Measurement]]:
    """Measure the parts in ``spec.only``, log a table and write the JSON file. A missed bar is not an error.

    Raises:
        DistillKacError: the teacher or the scratch folder cannot be used.
    """
    cluster.connect()
    import pyarrow
    import ray

    from pipeline.benchmark.gpu import measure_gpu
    from pipeline.benchmark.parts import PARTS

    folder = files.join(cluster.absolute(spec.folder or tempfile.gettempdir()), f"benchmark-{uuid.uuid4().hex[:12]}")
    check_output("`folder`", folder, spec)
    probes.check_writable(folder)
    results: dict[str, list[Measurement]] = {}
    try:
        setting = make_setting(spec, folder)
        for part, measure in {**PARTS, "gpu": measure_gpu}.items():
            if part in spec.only:
                progress_log.info(f"benchmark: measuring {part}")
                results[part] = measure(setting)
    finally:
        files.remove_tree(folder)
    figures = [{"part": part, **each.record()} for part, measured in results.items() for each in measured]
    machine = {
        "platform": platform.platform(),
        "cpus_here": os.cpu_count(),
        "cluster": {name: ray.cluster_resources().get(name, 0.0) for name in ("CPU", "GPU")},
        "nodes": len(ray.nodes()),
        "python": platform.python_version(),
        **{package.__name__: package.__version__ for package in (torch, ray, pyarrow)},
    }
    record = {"machine": machine, "options": spec.model_dump(mode="json"), "measurements": figures}
    text = json.dumps(record, indent=2)
    log.info(text if spec.json_file == "-" else table(results))
    if spec.json_file not in {None, "-"}:
        files.write_bytes(cluster.absolute(spec.json_file), text.encode())
    return results


LINE = "| {:13} | {:60} | {:>9} | {:>9} | {:14} | {:>6} | {:>16} | {:>5} | {:>7} | {:6} |"
HEAD = ("part", "what", "value", "against", "unit", "ratio", "min..max", "turns", "bar", "")


def table(results: Mapping[str, Sequence[Measurement]]) -> str:
    """The measurements as a Markdown table, one line each, with medians over all turns."""

    def short(value: float) -> str:
        return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"

    lines: list[tuple[object, ...]] = [HEAD, ("---",) * len(HEAD)]
    for part, measurements in results.items():
        for m in measurements:
            value, against = (short(statistics.median(side)) if side else "" for side in (m.values, m.against))
            ratio = f"{statistics.median(m.ratios):.3f}" if m.ratios else ""
            low, high = (f"{end(m.ratios):.3f}" if m.ratios else short(end(m.values)) for end in (min, max))
            verdict = {True: "holds", False: "missed", None: ""}[m.holds]
            line = (part, m.what, value, against, m.unit, ratio, f"{low}..{high}", len(m.values), m.bar or "", verdict)
            lines.append(line)
    return "\n".join(LINE.format(*line) for line in lines)


@dataclass(frozen=True)
class Setting:
    """The options, scratch folder and teacher of a benchmark."""

    spec: BenchmarkSpec
    folder: str
    teacher: str

    def rollout_spec(self, name: str, **options: Any) -> RolloutSpec:
        """The spec of a rollout into the store ``name`` in the scratch folder; ``options`` override the defaults."""
        defaults = {
            "trajectories": self.spec.trajectories,
            "shard_size": CALLS_PER_SHARD * self.spec.batch_size,
            "batch_size": self.spec.batch_size,
        }
        return RolloutSpec(teacher=self.teacher, store=files.join(self.folder, name), **{**defaults, **options})

    def store(self) -> store.Store:
        """The store that the reading and training parts use. It is made once, with shards of the default size."""
        shard_size = RolloutSpec.model_fields["shard_size"].default
        size = {"trajectories": STORE_FACTOR * self.spec.trajectories, "shard_size": shard_size}
        # One solver step per knot is enough, because the values do not affect the reading speed.
        spec = self.rollout_spec("store", solver_steps=20, **size)
        plan = make_plan(spec)
        if not plan.is_done:
            seal(spec, plan, compute_shards(spec, plan))
        return store.open(spec.store)


def make_setting(spec: BenchmarkSpec, folder: str) -> Setting:
    """Check the given teacher, or write an untrained teacher, which is as fast as a trained teacher.

    Raises:
        CheckpointError: ``spec.teacher`` is not a model folder.
    """
    if spec.teacher is not None:
        load_config(cluster.absolute(spec.teacher))
        return Setting(spec, folder, cluster.absolute(spec.teacher))
    config = teacher_config(spec.network, PathConfig(), spec.data)
    torch.manual_seed(0)
    network = build_network(config.network, config.sample_shape, config.num_classes, config.path.build())
    # All-zero parameters, such as the last layer's, get random values. Otherwise all knots would be equal.
    for parameter in network.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.02)
    teacher = files.join(folder, "teacher")
    save_model(teacher, config, network.state_dict())
    return Setting(spec, folder, teacher)


def interleave(turns: int, *sides: Callable[[], Value]) -> list[tuple[Value, ...]]:
    """Call the sides alternately, A B A B ... Return one tuple of results per side."""
    rounds = [[side() for side in sides] for _ in range(turns)]
    return [tuple(values) for values in zip(*rounds, strict=True)]

"""The students of a sweep: the points of a grid, chains of step counts, and the distributions of a search."""

import difflib
import functools
import itertools
import math
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kac.util import files
from kac.util.errors import ArgumentError
from kac.util.fingerprint import hashed_fields
from kac.util.options import nested_models
from pipeline.config import STEP_COUNTS, DistillSpec, StudentOptions, SweepSpec

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution

NOT_VARIED = (
    "store",
    "out",
    "teacher",
    "dry_run",
    "workers",
    "gpu",
    "cpus_per_worker",
    "gpus_per_worker",
    "label_selector",
    "checkpoint_updates",
    "sample_updates",
    "memory_gib",
    "validation_updates",
    "register",
)
"""Fields that do not change the student, so a sweep cannot vary them."""


@dataclass(frozen=True)
class Point:
    """A student of the sweep."""

    name: str  # of its folder below `out`
    spec: DistillSpec
    values: dict[str, Any]  # varied fields by dotted name
    after: str | None = None  # name of its predecessor in a chain, whose student it starts from


def parse_distribution(field: str, text: str) -> "BaseDistribution":
    """Parse an expression such as ``loguniform(1e-4,3e-3)``. No code is evaluated.

    Raises:
        ArgumentError: the expression cannot be parsed.
    """
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    match = re.fullmatch(r"(uniform|loguniform|randint|choice)\((.+)\)", str(text).strip())
    parts = [part.strip() for part in match[2].split(",")] if match else []
    try:
        if match and match[1] == "choice" and all(parts):
            return CategoricalDistribution(parts)
        low, high = parts
        if match and match[1] == "randint" and int(low) <= int(high):
            return IntDistribution(int(low), int(high))
        is_log = match is not None and match[1] == "loguniform"
        if match and match[1] != "randint" and (0.0 if is_log else -math.inf) < float(low) < float(high) < math.inf:
            return FloatDistribution(float(low), float(high), log=is_log)
    except ValueError:
        pass
    raise ArgumentError(
        f"`search` cannot parse {text!r} for {field}. Use uniform(LOW,HIGH), loguniform(LOW,HIGH) with LOW above 0, "
        "randint(LOW,HIGH) or choice(VALUE,...)."
    )


def is_choice(distribution: "BaseDistribution") -> bool:
    """Whether a distribution is a choice of values instead of a range of numbers."""
    return hasattr(distribution, "choices")


def sample(distribution: Any, generator: random.Random) -> Any:
    """A random value of a distribution."""
    if is_choice(distribution):
        return generator.choice(distribution.choices)
    low, high = distribution.low, distribution.high
    if isinstance(low, int):
        return generator.randint(low, high)
    if distribution.log:
        return math.exp(generator.uniform(math.log(low), math.log(high)))
    return generator.uniform(low, high)


def axes_of(spec: SweepSpec) -> dict[str, tuple[Any, ...]]:
    """The axes of the grid with their values; guidance scales and step counts come first.

    Raises:
        ArgumentError: an axis is not a field of a student, or is given twice.
    """
    given: dict[str, tuple[Any, ...]] = {}
    for name in (*spec.grid, *spec.search):
        if field_named(name) in given:
            raise ArgumentError(f"`grid` and `search` give {name} twice. Give each field once.")
        given[field_named(name)] = spec.grid.get(name, ())
    for name, short in (("guidance", spec.guidance), ("steps", spec.steps)):
        if short is not None and name in given:
            raise ArgumentError(f"`{name}` is also in `grid` or `search`. Give its values once.")
    searched = {field_named(name) for name in spec.search}
    default_steps: tuple[int, ...] = spec.chain or (
        (DistillSpec.model_fields["steps"].default,) if spec.search else STEP_COUNTS
    )
    axes: dict[str, tuple[Any, ...]] = {
        "guidance": spec.guidance or (0.0,),
        "steps": spec.steps or default_steps,
        **given,
    }
    return {name: values for name, values in axes.items() if name not in searched}


def distributions_of(spec: SweepSpec) -> "dict[str, BaseDistribution]":
    """The distribution of each field of a search. Axes of the grid become choices.

    Raises:
        ArgumentError: an expression cannot be parsed, or ``axes_of`` raises.
    """
    from optuna.distributions import CategoricalDistribution

    searched = {field_named(name): parse_distribution(name, text) for name, text in spec.search.items()}
    return {**{name: CategoricalDistribution(values) for name, values in axes_of(spec).items()}, **searched}


def field_named(name: str) -> str:
    """The dotted name of a field, as in specs: "optimizer.learning-rate" becomes "optimizer.learning_rate".

    The name of an object stands for its kind: "objective" becomes "objective.kind".

    Raises:
        ArgumentError: a student has no such field, or the field does not change the student.
    """
    field = name.strip().lstrip("-").replace("-", "_")
    top, _, below = field.partition(".")
    allowed = [known for known in DistillSpec.model_fields if known not in NOT_VARIED]
    if top not in allowed:
        near = difflib.get_close_matches(top, allowed, n=1)
        raise ArgumentError(
            f"{name} is not a field that a sweep can vary.{f' Did you mean {near[0]}?' if near else ''} "
            f"Choose one of: {', '.join(allowed)}."
        )
    return field if below or not nested_models(DistillSpec.model_fields[top]) else f"{top}.kind"


def grid_points(spec: SweepSpec) -> list[Point]:
    """The points of the grid, then the points of the chains, each after its predecessor.

    Raises:
        ArgumentError: a point is not a valid spec, or ``axes_of`` raises.
    """
    axes = axes_of(spec)
    if spec.chain and spec.chain[0] not in {int(m) for m in axes["steps"]}:
        axes["steps"] = (*axes["steps"], spec.chain[0])
    points: dict[str, Point] = {}
    for chosen in itertools.product(*axes.values()):
        point = make_point(spec, dict(zip(axes, chosen, strict=True)))
        points.setdefault(point.name, point)
    if spec.chain:
        others = {name: values for name, values in axes.items() if name != "steps"}
        for chosen in itertools.product(*others.values()):
            for point in _chain(spec, dict(zip(others, chosen, strict=True))):
                points[point.name] = point
    return list(points.values())


def _chain(spec: SweepSpec, values: Mapping[str, Any]) -> Iterator[Point]:
    """The students of a chain without the first one, which is a point of the grid."""
    counts = spec.chain
    before = make_point(spec, {**values, "steps": counts[0]}).name
    for length in range(2, len(counts) + 1):
        chain = "-".join(map(str, counts[:length]))
        point = make_point(spec, {**values, "steps": counts[length - 1]}, head=f"chain-{chain}")
        init = files.join(spec.out, before)
        yield Point(
            point.name, point.spec.model_copy(update={"init": init}), {**point.values, "chain": chain}, after=before
        )
        before = point.name


def make_point(spec: SweepSpec, values: Mapping[str, Any], name: str = "", head: str = "") -> Point:
    """The point of the student with these values of its fields.

    Args:
        values: by dotted name.
        name: of its folder; built from the values if empty.
        head: beginning of a name that is built from the values.

    Raises:
        ArgumentError: the values conflict.
    """
    options: dict[str, Any] = {field: getattr(spec, field) for field in StudentOptions.model_fields}
    options["workers"] = spec.workers or 0
    if spec.workers:
        gpu = {"gpu": spec.gpus_per_trial > 0} if spec.gpus_per_trial is not None else {}
        share = {"gpus_per_worker": spec.gpus_per_trial} if spec.gpus_per_trial else {}
        options |= {"cpus_per_worker": spec.cpus_per_trial, "label_selector": spec.label_selector, **gpu, **share}
    if values.get("precision.dtype") == "auto":
        raise ArgumentError(
            "`precision.dtype` auto stands for one of the other types. Compare float32, tf32 and bfloat16 instead."
        )
    # The kind of an object comes first, because the other fields depend on it.
    for field in sorted(values, key=lambda field: not field.endswith(".kind")):
        options = _set(options, field.split("."), values[field])
    student = DistillSpec(out=spec.out, **options)
    is_any_step = student.objective.kind == "flow-map"
    varied = {
        field: functools.reduce(getattr, field.split("."), student)
        for field in values
        if name or not (is_any_step and field == "steps")
    }
    if not name:
        others = [(field, given) for field, given in values.items() if field not in {"steps", "guidance"}]
        parts = [head or ("any-steps" if is_any_step else f"steps-{student.steps}"), f"guidance-{student.guidance}"]
        name = "-".join([*parts, *(f"{_plain(field)}-{_plain(str(given))}" for field, given in others)])
    return Point(name, student.model_copy(update={"out": files.join(spec.out, name)}), varied)


def drawn_point(spec: SweepSpec, number: int, values: Mapping[str, Any]) -> Point:
    """The point of trial ``number`` of a search; raises as ``make_point``."""
    return make_point(spec, values, name=f"trial-{number:04d}")


def sample_points(spec: SweepSpec) -> list[Point]:
    """Sample points of a search, for checks: each field in turn takes its bounds or choices, the others their first.

    Raises:
        ArgumentError: a point is not valid.
    """
    tested = {
        name: one.choices if is_choice(one) else (one.low, one.high) for name, one in distributions_of(spec).items()
    }
    first = {name: values[0] for name, values in tested.items()}
    return [
        make_point(spec, {**first, name: value}, name="trial") for name, values in tested.items() for value in values
    ]


def identity(spec: SweepSpec) -> dict[str, Any]:
    """The part of a sweep's fingerprint that describes its students."""
    axes = {name: [str(value) for value in values] for name, values in axes_of(spec).items()}
    return {
        "grid": {name: _typed_text(values) for name, values in axes.items()},
        "search": {field_named(name): "".join(str(text).split()) for name, text in spec.search.items()},
        "chain": list(spec.chain),
    }


def _typed_text(values: Sequence[str]) -> str:
    """The values as text, in which 1 and 1.0 are equal."""
    return ",".join(f"{float(value):g}" if re.fullmatch(r"-?[\d.]+(e-?\d+)?", value) else value for value in values)


def _set(options: Mapping[str, Any], field: Sequence[str], value: Any) -> dict[str, Any]:
    """A copy of ``options`` with one nested field changed."""
    head, *rest = field
    if not rest:
        return {**options, head: value}
    nested = options.get(head, {})
    values = nested if isinstance(nested, dict) else hashed_fields(nested)
    if rest == ["kind"] and values.get("kind") != value:
        values = {}  # the other fields belong to another kind
    return {**options, head: _set(values, rest, value)}


def _plain(text: str) -> str:
    """The text without characters that a folder's name should not have."""
    return re.sub(r"[^\w.+-]", "-", text.replace("_", "-").replace(".", "-") if not text[:1].isdigit() else text)

"""The space of a sweep: the points of a grid, chains of step counts, and what a search draws values from."""

import difflib
import itertools
import math
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from kac.util import files
from kac.util.errors import ArgumentError
from kac.util.fingerprint import hashed_fields
from kac.util.options import nested_models
from pipeline.config.specs import STEP_COUNTS, DistillSpec, StudentOptions, SweepSpec

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
"""Fields that make no other student."""


@dataclass(frozen=True)
class Point:
    """A student of the sweep."""

    name: str  # of its folder below `out`
    spec: DistillSpec
    values: dict[str, Any]  # of the fields that vary, by their dotted names
    after: str | None = None  # the point whose student it starts from: its predecessor in a chain


class Draw(Protocol):
    """What a search draws a value from."""

    def sample(self, draws: random.Random) -> Any:
        """A value."""
        ...

    def ends(self) -> tuple[Any, ...]:
        """Values between which all are: what they allow, the others do too; all of them if they are choices."""
        ...


@dataclass(frozen=True)
class Uniform:
    """A number between two others, or its logarithm is."""

    low: float
    high: float
    is_log: bool = False

    def sample(self, draws: random.Random) -> float:
        """A value."""
        if self.is_log:
            return math.exp(draws.uniform(math.log(self.low), math.log(self.high)))
        return draws.uniform(self.low, self.high)

    def ends(self) -> tuple[float, ...]:
        """Values between which all are."""
        return (self.low, self.high)


@dataclass(frozen=True)
class Integers:
    """A whole number from the first to the last, both included."""

    low: int
    high: int

    def sample(self, draws: random.Random) -> int:
        """A value."""
        return draws.randint(self.low, self.high)

    def ends(self) -> tuple[int, ...]:
        """Values between which all are."""
        return (self.low, self.high)


@dataclass(frozen=True)
class Choice:
    """One of some values."""

    values: tuple[Any, ...]

    def sample(self, draws: random.Random) -> Any:
        """A value."""
        return draws.choice(self.values)

    def ends(self) -> tuple[Any, ...]:
        """Values between which all are."""
        return self.values


def parse_draw(field: str, text: str) -> Draw:
    """What an expression such as ``loguniform(1e-4,3e-3)`` stands for; nothing is evaluated.

    Raises:
        ArgumentError: it cannot be parsed.
    """
    match = re.fullmatch(r"(uniform|loguniform|randint|choice)\((.+)\)", str(text).strip())
    parts = [part.strip() for part in match[2].split(",")] if match else []
    try:
        if match and match[1] == "choice" and all(parts):
            return Choice(tuple(parts))
        low, high = parts
        if match and match[1] == "randint" and int(low) <= int(high):
            return Integers(int(low), int(high))
        is_log = match is not None and match[1] == "loguniform"
        if match and match[1] != "randint" and (0.0 if is_log else -math.inf) < float(low) < float(high) < math.inf:
            return Uniform(float(low), float(high), is_log)
    except ValueError:
        pass
    raise ArgumentError(
        f"`search` {field}: expected uniform(LOW,HIGH), loguniform(LOW,HIGH) with LOW above 0, randint(LOW,HIGH) or "
        f"choice(VALUE,...), found {text!r}"
    )


def axes_of(spec: SweepSpec) -> dict[str, tuple[Any, ...]]:
    """The axes of the grid, each with its values: guidance scales and step counts first.

    Raises:
        ArgumentError: an axis that is no field of a student, has no values or is given twice.
    """
    given: dict[str, tuple[Any, ...]] = {}
    for name in (*spec.grid, *spec.search):
        if field_named(name) in given:
            raise ArgumentError(f"`grid`, `search`: expected each field once, found {name} twice")
        given[field_named(name)] = spec.grid.get(name, ())
    for name, short in (("guidance", spec.guidance), ("steps", spec.steps)):
        if short is not None and name in given:
            raise ArgumentError(f"`{name}`: expected the values of {name} once, found them in `grid` or `search` too")
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


def draws_of(spec: SweepSpec) -> dict[str, Draw]:
    """What each field of a search is drawn from; the axes of its grid are choices.

    Raises:
        ArgumentError: an expression that cannot be parsed, or as ``axes_of``.
    """
    draws = {field_named(name): parse_draw(name, text) for name, text in spec.search.items()}
    return {**{name: Choice(values) for name, values in axes_of(spec).items()}, **draws}


def field_named(name: str) -> str:
    """The dotted name of a field as specs have it; an object is named by its kind.

    Raises:
        ArgumentError: a student has no such field, or it makes no other student.
    """
    field = name.strip().lstrip("-").replace("-", "_")
    top, _, below = field.partition(".")
    allowed = [known for known in DistillSpec.model_fields if known not in NOT_VARIED]
    if top not in allowed:
        near = difflib.get_close_matches(top, allowed, n=1)
        raise ArgumentError(
            f"{name}: expected a field of jobs.distill that changes its student ({', '.join(allowed)})"
            f"{f', perhaps {near[0]}' if near else ''}, found {top}"
        )
    return field if below or not nested_models(DistillSpec.model_fields[top]) else f"{top}.kind"


def grid_points(spec: SweepSpec) -> list[Point]:
    """The points of the grid, and those of the chains, after those that they start from.

    Raises:
        ArgumentError: a point that is no valid spec, or as ``axes_of``.
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
    """The students of a chain but its first, which is a point of the grid."""
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
    """The student with these values of its fields.

    Args:
        name: of its folder; default: made of the values. head: what such a name begins with.

    Raises:
        ArgumentError: they do not go together.
    """
    options: dict[str, Any] = {field: getattr(spec, field) for field in StudentOptions.model_fields}
    options["workers"] = spec.workers or 0
    if spec.workers:
        gpu = {"gpu": spec.gpus_per_trial > 0} if spec.gpus_per_trial is not None else {}
        share = {"gpus_per_worker": spec.gpus_per_trial} if spec.gpus_per_trial else {}
        options |= {"cpus_per_worker": spec.cpus_per_trial, "label_selector": spec.label_selector, **gpu, **share}
    if values.get("precision.dtype") == "auto":
        raise ArgumentError("precision.dtype: expected types to be compared, found auto, which stands for one of them")
    # A kind comes first: the other fields of its object are that kind's.
    for field in sorted(values, key=lambda field: not field.endswith(".kind")):
        options = _with(options, field.split("."), values[field])
    student = DistillSpec(out=spec.out, **options)
    is_any_step = student.objective.kind == "flow-map"
    varied = {field: _value(student, field) for field in values if name or not (is_any_step and field == "steps")}
    if not name:
        others = [(field, given) for field, given in values.items() if field not in {"steps", "guidance"}]
        parts = [head or ("any-steps" if is_any_step else f"steps-{student.steps}"), f"guidance-{student.guidance}"]
        name = "-".join([*parts, *(f"{_plain(field)}-{_plain(str(given))}" for field, given in others)])
    return Point(name, student.model_copy(update={"out": files.join(spec.out, name)}), varied)


def drawn_point(spec: SweepSpec, number: int, values: Mapping[str, Any]) -> Point:
    """The student of a search's trial of this number; raises as ``make_point``."""
    return make_point(spec, values, name=f"trial-{number:04d}")


def sample_points(spec: SweepSpec) -> list[Point]:
    """Points of a search that are valid if all are: each field at the ends of its range, the others at their first.

    Raises:
        ArgumentError: one that is not.
    """
    draws = draws_of(spec)
    first = {name: draw.ends()[0] for name, draw in draws.items()}
    return [
        make_point(spec, {**first, name: value}, name="trial") for name, draw in draws.items() for value in draw.ends()
    ]


def identity(spec: SweepSpec) -> dict[str, Any]:
    """What the space of a sweep is, for its fingerprint."""
    axes = {name: [str(value) for value in values] for name, values in axes_of(spec).items()}
    return {
        "grid": {name: _typed_text(values) for name, values in axes.items()},
        "search": {field_named(name): "".join(str(text).split()) for name, text in spec.search.items()},
        "chain": list(spec.chain),
    }


def _typed_text(values: Sequence[str]) -> str:
    """The values in words, in which 1 and 1.0 are the same."""
    return ",".join(f"{float(value):g}" if re.fullmatch(r"-?[\d.]+(e-?\d+)?", value) else value for value in values)


def _with(options: Mapping[str, Any], field: Sequence[str], value: Any) -> dict[str, Any]:
    head, *rest = field
    if not rest:
        return {**options, head: value}
    nested = options.get(head, {})
    values = nested if isinstance(nested, dict) else hashed_fields(nested)
    if rest == ["kind"] and values.get("kind") != value:
        values = {}  # the fields of another kind are not this one's
    return {**options, head: _with(values, rest, value)}


def _value(spec: DistillSpec, field: str) -> Any:
    value: Any = spec
    for name in field.split("."):
        value = getattr(value, name)
    return value


def _plain(text: str) -> str:
    return re.sub(r"[^\w.+-]", "-", text.replace("_", "-").replace(".", "-") if not text[:1].isdigit() else text)

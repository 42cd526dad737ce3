"""The trials of a sweep before they run, one student each: a grid, chains of step counts, and trials of a search."""

import difflib
import functools
import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kac.util import files
from kac.util.errors import ArgumentError
from kac.util.fingerprint import hashed_fields
from kac.util.options import nested_models
from pipeline.config import STEP_COUNTS, DistillSpec, StudentOptions, SweepSpec

VARIED = (*hashed_fields(DistillSpec(store="", out="")), "init")
"""Fields that change the student, so a sweep can vary them."""


@dataclass(frozen=True)
class PlannedTrial:
    """A student that the sweep trains."""

    name: str  # of its folder below `out`
    spec: DistillSpec
    values: dict[str, Any]  # varied fields by dotted name
    after: str | None = None  # name of its predecessor in a chain, whose student it starts from


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


def field_named(name: str) -> str:
    """The dotted name of a field, as in specs: "optimizer.learning-rate" becomes "optimizer.learning_rate".

    The name of an object stands for its kind: "objective" becomes "objective.kind".

    Raises:
        ArgumentError: a student has no such field, or the field does not change the student.
    """
    field = name.strip().lstrip("-").replace("-", "_")
    top, _, below = field.partition(".")
    if top not in VARIED:
        near = difflib.get_close_matches(top, VARIED, n=1)
        raise ArgumentError(
            f"{name} is not a field that a sweep can vary.{f' Did you mean {near[0]}?' if near else ''} "
            f"Choose one of: {', '.join(VARIED)}."
        )
    return field if below or not nested_models(DistillSpec.model_fields[top]) else f"{top}.kind"


def grid_trials(spec: SweepSpec) -> list[PlannedTrial]:
    """The trials of the grid, then the trials of the chains, each after its predecessor.

    Raises:
        ArgumentError: a student is not valid, or ``axes_of`` raises.
    """
    axes = axes_of(spec)
    if spec.chain and spec.chain[0] not in {int(m) for m in axes["steps"]}:
        axes["steps"] = (*axes["steps"], spec.chain[0])
    trials: dict[str, PlannedTrial] = {}
    for chosen in itertools.product(*axes.values()):
        trial = plan_trial(spec, dict(zip(axes, chosen, strict=True)))
        trials.setdefault(trial.name, trial)
    if spec.chain:
        others = {name: values for name, values in axes.items() if name != "steps"}
        for chosen in itertools.product(*others.values()):
            for trial in _chain(spec, dict(zip(others, chosen, strict=True))):
                trials[trial.name] = trial
    return list(trials.values())


def _chain(spec: SweepSpec, values: Mapping[str, Any]) -> Iterator[PlannedTrial]:
    """The trials of a chain without the first one, which is in the grid."""
    counts = spec.chain
    before = plan_trial(spec, {**values, "steps": counts[0]}).name
    for length in range(2, len(counts) + 1):
        chain = "-".join(map(str, counts[:length]))
        trial = plan_trial(spec, {**values, "steps": counts[length - 1]}, head=f"chain-{chain}")
        init = files.join(spec.out, before)
        yield PlannedTrial(
            trial.name, trial.spec.model_copy(update={"init": init}), {**trial.values, "chain": chain}, after=before
        )
        before = trial.name


def plan_trial(spec: SweepSpec, values: Mapping[str, Any], name: str = "", head: str = "") -> PlannedTrial:
    """The trial with these values of its student's fields.

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
    return PlannedTrial(name, student.model_copy(update={"out": files.join(spec.out, name)}), varied)


def search_name(number: int) -> str:
    """The name of trial ``number`` of a search."""
    return f"trial-{number:04d}"


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

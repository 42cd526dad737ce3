"""Plans a sweep's trials, one per student or teacher, for grids, for chains of step counts, and for searches."""

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
from pipeline.config import STEP_COUNTS, AnySweep, DistillSpec, SweepSpec, TeachSpec

VARIED = {
    DistillSpec: (*hashed_fields(DistillSpec(store="", out="")), "init"),
    TeachSpec: (*hashed_fields(TeachSpec(out="")),),
}
"""Fields that a sweep can vary, because they change the trained model."""

UPDATES = "optimizer.updates"


@dataclass(frozen=True)
class PlannedTrial:
    """A model that the sweep trains."""

    name: str  # name of the model's folder below `out`
    spec: Any  # a DistillSpec or a TeachSpec
    values: dict[str, Any]  # varied fields by dotted name
    after: str | None = None  # predecessor in a chain; training starts from the predecessor's student


def axes_of(spec: AnySweep) -> dict[str, tuple[Any, ...]]:
    """The axes of the grid with their values. For students, guidance scales and step counts come first."""
    searched = [field_named(spec, name) for name in spec.search]
    named = [*searched, *(field_named(spec, name) for name in spec.grid)]
    for name in named:
        if named.count(name) > 1:
            raise ArgumentError(f"`grid` and `search` give {name} twice. Give each field once.")
    axes: dict[str, tuple[Any, ...]] = {}
    if isinstance(spec, SweepSpec):
        default_steps = spec.chain or ((DistillSpec.model_fields["steps"].default,) if spec.search else STEP_COUNTS)
        for name, short, default in (("guidance", spec.guidance, (0.0,)), ("steps", spec.steps, default_steps)):
            if short is not None and name in named:
                raise ArgumentError(f"`{name}` is also in `grid` or `search`. Give its values once.")
            axes[name] = short or default
    axes |= {field_named(spec, name): values for name, values in spec.grid.items()}
    if not named and not axes:
        raise ArgumentError("`grid` or `search` is required. Give fields to vary, such as `grid` path.a=9,25.")
    return {name: values for name, values in axes.items() if name not in searched}


def field_named(spec: AnySweep, name: str) -> str:
    """The dotted name of a field, as in specs: "optimizer.learning-rate" becomes "optimizer.learning_rate".

    The name of an object stands for its kind: "objective" becomes "objective.kind".
    """
    field = name.strip().lstrip("-").replace("-", "_")
    top, _, below = field.partition(".")
    varied = VARIED[spec.trained]
    if top not in varied:
        near = difflib.get_close_matches(top, varied, n=1)
        raise ArgumentError(
            f"{name} is not a field that a sweep can vary.{f' Did you mean {near[0]}?' if near else ''} "
            f"Choose one of: {', '.join(varied)}."
        )
    return field if below or not nested_models(spec.trained.model_fields[top]) else f"{top}.kind"


def grid_trials(spec: AnySweep) -> list[PlannedTrial]:
    """The trials of the grid, then the trials of the chains, each after its predecessor."""
    axes, chain = axes_of(spec), spec.chain if isinstance(spec, SweepSpec) else ()
    if chain and str(chain[0]) not in map(normal_text, axes["steps"]):
        axes["steps"] = (*axes["steps"], chain[0])
    trials: dict[str, PlannedTrial] = {}
    for values in _products(axes):
        trial = plan_trial(spec, values)
        trials.setdefault(trial.name, trial)
    if chain:
        del axes["steps"]
        trials |= {trial.name: trial for values in _products(axes) for trial in _chain(spec, chain, values)}
    return list(trials.values())


def _products(axes: Mapping[str, Sequence[Any]]) -> Iterator[dict[str, Any]]:
    return (dict(zip(axes, chosen, strict=True)) for chosen in itertools.product(*axes.values()))


def _chain(spec: AnySweep, counts: Sequence[int], values: Mapping[str, Any]) -> Iterator[PlannedTrial]:
    """The trials of a chain except the first trial, which is in the grid."""
    before = plan_trial(spec, {**values, "steps": counts[0]}).name
    for length in range(2, len(counts) + 1):
        chain = "-".join(map(str, counts[:length]))
        trial = plan_trial(spec, {**values, "steps": counts[length - 1]}, head=f"chain-{chain}")
        student = trial.spec.model_copy(update={"init": files.join(spec.out, before)})
        yield PlannedTrial(trial.name, student, {**trial.values, "chain": chain}, after=before)
        before = trial.name


def plan_trial(spec: AnySweep, values: Mapping[str, Any], name: str = "", head: str = "") -> PlannedTrial:
    """Plan a trial. ``values`` are fields of its spec, by dotted name.

    If ``name`` is empty, the folder's name consists of ``head`` and the values.
    """
    options: dict[str, Any] = {field: getattr(spec, field) for field in spec.fixed.model_fields}
    options["workers"] = spec.workers or 0
    if spec.workers:
        options |= {"cpus_per_worker": spec.cpus_per_trial, "label_selector": spec.label_selector}
    if spec.workers and spec.gpus_per_trial is not None:
        options |= {"gpu": spec.gpus_per_trial > 0, "gpus_per_worker": spec.gpus_per_trial or 1.0}
    if values.get("precision.dtype") == "auto":
        raise ArgumentError(
            "`precision.dtype` auto stands for one of the other types. Compare float32, tf32 and bfloat16 instead."
        )
    # The kind of an object comes first, because the other fields depend on it.
    for field in sorted(values, key=lambda field: not field.endswith(".kind")):
        options = _set(options, field.split("."), values[field])
    trained = spec.trained(out=spec.out, **options)
    is_any_step = isinstance(trained, DistillSpec) and trained.objective.is_any_step
    varied = {
        field: functools.reduce(getattr, field.split("."), trained)
        for field in values
        if name or not (is_any_step and field == "steps")
    }
    if not name:
        parts, others = [], dict(values)
        if isinstance(trained, DistillSpec):
            parts = [head or ("any-steps" if is_any_step else f"steps-{trained.steps}"), f"guidance-{trained.guidance}"]
            others = {field: given for field, given in values.items() if field not in {"steps", "guidance"}}
        name = "-".join([*parts, *(f"{_plain(field)}-{_plain(str(given))}" for field, given in others.items())])
    return PlannedTrial(name, trained.model_copy(update={"out": files.join(spec.out, name)}), varied)


def search_name(number: int) -> str:
    """The name of trial ``number`` of a search."""
    return f"trial-{number:04d}"


def identity(spec: AnySweep) -> dict[str, Any]:
    """The part of a sweep's fingerprint that describes its trials."""
    return {
        "grid": {name: ",".join(map(normal_text, values)) for name, values in axes_of(spec).items()},
        "search": {field_named(spec, name): "".join(str(text).split()) for name, text in spec.search.items()},
        **({"chain": list(spec.chain)} if isinstance(spec, SweepSpec) else {}),
    }


def normal_text(value: Any) -> str:
    """The value as text. Equal numbers, such as 1 and 1.0, give equal texts."""
    text = str(value)
    try:
        number = float(text) if re.fullmatch(r"-?[\d.]+(e-?\d+)?", text) else None
    except ValueError:  # such as 1.2.3
        number = None
    if number is None:
        return text
    return short if float(short := f"{number:g}") == number else repr(number)


def _set(options: Mapping[str, Any], field: Sequence[str], value: Any) -> dict[str, Any]:
    """A copy of ``options`` with one nested field changed."""
    head, *rest = field
    if not rest:
        return {**options, head: value}
    nested = options.get(head, {})
    values = nested if isinstance(nested, dict) else hashed_fields(nested)
    if rest == ["kind"] and values.get("kind") != value:
        values = {}  # the other fields belong to a different kind
    return {**options, head: _set(values, rest, value)}


def _plain(text: str) -> str:
    """The text as part of a folder's name."""
    return re.sub(r"[^\w.+-]", "-", text.replace("_", "-").replace(".", "-") if not text[:1].isdigit() else text)

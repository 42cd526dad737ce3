"""Every option of every job accepts valid values of every form of its type, on a command line and in a file."""

import importlib
import json
import pkgutil
import typing
from collections.abc import Iterator
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, Literal

import annotated_types
import pytest
import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo

import jobs
from jobs.parsing import parse
from kac.data.dataset_kinds import FILE_KINDS
from kac.networks.outside import OutsideConfig
from kac.util.options import Range, nested_models
from pipeline.config import CLAIMS, Spec

for module in pkgutil.iter_modules(jobs.__path__):
    importlib.import_module(f"jobs.{module.name}")


def subclasses(spec_type: type[Spec]) -> Iterator[type[Spec]]:
    for other in spec_type.__subclasses__():
        if other.__module__.startswith("pipeline."):
            yield other
        yield from subclasses(other)


SPECS = sorted(dict.fromkeys(subclasses(Spec)), key=lambda spec: spec.__name__)

REQUIRED: dict[str, dict[str, Any]] = {
    "BenchmarkSpec": {},
    "CheckSpec": {},
    "CloseDeadSpec": {},
    "ConvertSpec": {"checkpoint": "c", "out": "o", "data": "digits"},
    "DescribeSpec": {"store": "s"},
    "DistillSpec": {"store": "s", "out": "o"},
    "EvaluateSpec": {"teacher": "t", "out": "o"},
    "ExportSpec": {"model": "m", "out": "o"},
    "MergeSpec": {"stores": ["s"], "into": "i"},
    "QuickstartSpec": {"out": "o"},
    "RolloutSpec": {"teacher": "t", "store": "s"},
    "SampleSpec": {"model": "m", "out": "o"},
    "StudySpec": {"teacher": "t", "out": "o"},
    "SweepSpec": {"store": "s", "out": "o"},
    "SyncSpec": {},
    "TeachSpec": {"out": "o"},
    "TeachSweepSpec": {"out": "o"},
    "VerifySpec": {"store": "s"},
}

ARGUMENTS = {"width": 64, "levels": [1, 2], "name": "on", "flag": True, "rate": 1e-3, "no": None}

VALUES: dict[str, list[Any]] = {
    "SweepSpec.grid": [{"steps": ("1", "2"), "optimizer.learning-rate": ("1e-3",)}],
    "TeachSweepSpec.grid": [{"path.a": ("9", "25"), "path.clock": ("quadratic",)}],
    "TeachSweepSpec.search": [{"path.a": "loguniform(1,100)"}],
    "TeachSweepSpec.features": [("pixels",), ("a/net.pt", "package.module:factory")],
    "TeachSweepSpec.register": ["a name", None],
    "SweepSpec.search": [{"optimizer.learning-rate": "loguniform(1e-4,3e-3)"}],
    "SweepSpec.chain": [(4, 2, 1)],
    "EvaluateSpec.features": [("pixels",), ("a/net.pt", "package.module:factory")],
    "SweepSpec.features": [("pixels",), ("a/net.pt", "package.module:factory")],
    "BenchmarkSpec.only": [("bytes-read",), ("rollout-speed", "bytes-read")],
    "BenchmarkSpec.trajectories": [10 * 1024],
    "RolloutSpec.first_sample": [1024],
    "RolloutSpec.license": ["cc-by-4.0"],
    "StudySpec.claims": [("speed", "plane"), CLAIMS],
    "DataConfig.root": ["a folder", "s3://bucket/a=b"],
    "DataConfig.factory": ["a.b:c"],
    "DataConfig.arguments": [ARGUMENTS],
    "OutsideConfig.module": ["a.b:c"],
    "OutsideConfig.arguments": [ARGUMENTS],
    "OptimizerConfig.accumulation": [2],
    "DistillSpec.register": ["a name", None],
    "ExportSpec.push_to_hub": ["owner/name", None],
    "SweepSpec.register": ["a name", None],
    "RolloutSpec.knots": [10],
    "RolloutSpec.shard_size": [512],
    "OptimizerConfig.batch_size": [64],
    "RolloutSpec.solver_steps": [40],
    "UNetConfig.channels": [(64,), (32, 64)],
    "UNetConfig.groups": [8],
    "DiTConfig.head_channels": [8],
    "BenchmarkSpec.batch_size": [128],
}
"""Valid values of options whose type allows invalid ones."""

BESIDE: dict[str, dict[str, Any]] = {
    "DataConfig.root": {"kind": "folder"},
    "DataConfig.autoencoder": {"kind": "digits"},
    "DataConfig.factory": {"kind": "outside"},
    "DataConfig.arguments": {"kind": "outside", "factory": "a:b"},
    "DataConfig.size": {"kind": "folder", "root": "r"},
    "DataConfig.channels": {"kind": "folder", "root": "r"},
    "DataConfig.image_column": {"kind": "parquet", "root": "r"},
    "DataConfig.label_column": {"kind": "parquet", "root": "r"},
    "DataConfig.horizontal_flip": {"kind": "folder", "root": "r"},
    **{f"OutsideConfig.{name}": {"module": "a:b"} for name in OutsideConfig.model_fields},
    "EvaluateSpec.teacher": {"runs": ("r",)},
}
"""Other options that an option needs."""

REFUSED = [
    ("TeachSpec", "conditions"),  # a teacher has no conditions
    ("TeachSweepSpec", "conditions"),
    ("ConvertSpec", "conditions"),
    ("BenchmarkSpec", "OutsideConfig.conditions"),
    ("TeachSpec", "OutsideConfig.labels", "without_null"),  # refused unless --label-dropout is 0
]
"""Options and values that have a valid type but are refused."""


class Case(typing.NamedTuple):
    """Values of one model that can be given together."""

    spec_type: type[Spec]
    path: tuple[str, ...]  # the fields that lead to the model
    values: dict[str, Any]
    beside: dict[str, Any]  # other values that the model then needs

    def __str__(self) -> str:
        return "-".join(map(str, (self.spec_type.__name__, *self.path, *self.beside.values(), *self.values.values())))


def values_of(annotation: Any, constraints: list[Any]) -> list[Any]:
    """Return valid values of a type, at least one of each form."""
    origin, parts = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Annotated:
        return values_of(parts[0], [*constraints, *parts[1:]])
    if origin is Literal:
        return list(parts)
    if origin is tuple:
        one = values_of(parts[0], [])
        return [tuple(one[:1]), tuple(one)]
    if origin is dict:
        return [{"ray.io/node-group": "a-b", "spot": "!true"}]
    if parts:  # a union
        return [value for part in parts for value in values_of(part, constraints)]
    return {
        bool: lambda: [True, False],
        int: lambda: [_within(constraints, [7, 1, 0, -3])],
        float: lambda: [_within(constraints, [-1e-3, 2.5e-3, 1.5]), _within(constraints, [1e-3, 2.0])],
        str: lambda: ["words with spaces", "s3://bucket/a=b"],
        NoneType: lambda: [None],
        Range: lambda: [Range(2, 8)],
    }[annotation]()


def _within(constraints: list[Any], candidates: list[Any]) -> Any:
    def fits(value: Any) -> bool:
        return all(
            not (isinstance(each, annotated_types.Gt) and not value > each.gt)
            and not (isinstance(each, annotated_types.Ge) and not value >= each.ge)
            and not (isinstance(each, annotated_types.Lt) and not value < each.lt)
            and not (isinstance(each, annotated_types.Le) and not value <= each.le)
            for each in constraints
        )

    return next(value for value in candidates if fits(value))


def cases_of(spec_type: type[Spec], model: type[BaseModel], path: tuple[str, ...] = ()) -> Iterator[Case]:
    """Yield every value of every option of the model at ``path``, and of every kind of a union."""
    spec = spec_type.__name__
    together: dict[str, dict[str, list[Any]]] = {}
    for name, field in model.model_fields.items():
        option, kinds = f"{model.__name__}.{name}", nested_models(field)
        for kind in kinds:
            chosen = {"kind": kind.model_fields["kind"].default} if len(kinds) > 1 else {}
            for case in cases_of(spec_type, kind, (*path, name)):
                is_own = len(case.path) == len(path) + 1
                yield case._replace(beside={**chosen, **case.beside}) if is_own else case
        if kinds:
            continue
        given = VALUES.get(option) or values_of(field.annotation, field.metadata)
        is_output = "writes" in (field.json_schema_extra or {})
        for value in [value and f"{value} out" for value in given] if is_output else given:
            if not any(case in REFUSED for case in [(spec, name), (spec, option), (spec, option, value)]):
                beside = BESIDE.get(option, {})
                if option == "DataConfig.kind":
                    beside = {"root": "r"} if value in FILE_KINDS else {"factory": "a:b"} if value == "outside" else {}
                together.setdefault(json.dumps(beside), {}).setdefault(name, []).append(value)
    for beside, values in together.items():
        for number in range(max(map(len, values.values()))):
            yield Case(spec_type, path, {k: v[number % len(v)] for k, v in values.items()}, json.loads(beside))


CASES = [case for spec_type in SPECS for case in cases_of(spec_type, spec_type)]


def nested(case: Case) -> dict[str, Any]:
    """Return all values of a case, nested as in a file."""
    values = {**case.beside, **case.values}
    for name in reversed(case.path):
        values = {name: values}
    required = {name: value for name, value in REQUIRED[case.spec_type.__name__].items() if name not in values}
    return {**required, **values}


def words_of(spec_type: type[Spec], values: dict[str, Any], prefix: str = "--") -> tuple[list[str], list[str]]:
    """Return the command line for these values, as a list of positional words and a list of all other words."""
    positional: list[str] = []
    words: list[str] = []
    for name, value in values.items():
        field = spec_type.model_fields.get(name) if prefix == "--" else None
        many = [word(one) for one in value] if isinstance(value, list | tuple) else [word(value)]
        if isinstance(value, dict) and field is not None and nested_models(field):
            words += words_of(spec_type, value, f"{prefix}{name.replace('_', '-')}.")[1]
            continue
        if isinstance(value, dict):
            many = [f"{key}={text(one)}" for key, one in value.items()]
        if field is not None and is_positional(field):
            positional += many
        elif (
            field is not None and field.annotation is bool and any(map(is_positional, spec_type.model_fields.values()))
        ):
            words += [option_of(name, prefix)] * value
        else:
            words += [option_of(name, prefix), *many]
    return positional, words


def is_positional(field: FieldInfo) -> bool:
    return any(getattr(mark, "positional", False) for mark in field.metadata)


def option_of(name: str, prefix: str) -> str:
    return prefix + {"as_json": "json", "json_file": "json"}.get(name, name).replace("_", "-")


def word(value: Any) -> str:
    return str(value).replace("0.001", "1e-3") if isinstance(value, float) else str(value)


def text(value: Any) -> str:
    """Format the value of ``NAME=VALUE``."""
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    return value if isinstance(value, str) else word(value) if isinstance(value, float) else json.dumps(value)


def in_file(value: Any) -> Any:
    """Convert a value to types that YAML can represent."""
    if isinstance(value, dict):
        return {name.replace("_", "-"): in_file(each) for name, each in value.items()}
    if isinstance(value, tuple | list):
        return [in_file(each) for each in value]
    return str(value) if isinstance(value, Range) else value


def as_words(spec: Spec) -> Spec:
    """Replace a grid's values with text, because a grid keeps numbers from a file but text from a command line."""
    grid = {name: tuple(map(str, values)) for name, values in getattr(spec, "grid", {}).items()}
    return spec.model_copy(update={"grid": grid}) if grid else spec


def test_every_job_is_covered(project_root: Path):
    assert {spec.__name__ for spec in SPECS} == set(REQUIRED)
    modules = {path.stem for path in (project_root / "jobs").glob("*.py")}
    with_commands, not_jobs = {"cluster", "runs", "store"}, {"__init__", "command", "config_files", "parsing"}
    assert modules - {spec.stage for spec in SPECS} == with_commands | not_jobs


@pytest.mark.parametrize("case", CASES, ids=str)
def test_options_are_the_same_on_a_command_line_and_in_a_file(case: Case, tmp_path: Path):
    given = nested(case)
    positional, words = words_of(case.spec_type, given)
    spec = parse(case.spec_type, positional + words, "python -m jobs.test")
    check(spec, case)
    file = tmp_path / "options.yaml"
    file.write_text(yaml.safe_dump(in_file(given)).replace("0.001\n", "1e-3\n"))
    assert as_words(parse(case.spec_type, ["--config", str(file)], "python -m jobs.test")) == as_words(spec)
    check(case.spec_type(**given), case)


def check(spec: Any, case: Case) -> None:
    for name in case.path:
        spec = getattr(spec, name)
    for name, value in case.values.items():
        found = getattr(spec, name)
        assert (name, type(found), found) == (name, type(value), value)

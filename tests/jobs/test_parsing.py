"""A spec and its errors are the same from Python, a command line and a file."""

import re
import shlex
import typing
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
import yaml
from pydantic import BeforeValidator, Field, PositiveInt, model_validator
from pydantic.fields import FieldInfo

from jobs.parsing import parse
from kac.util.errors import ArgumentError, as_options
from kac.util.options import Kinded, Options, OptionStyle, Range, expand_kind, flatten, nested_models
from pipeline import config
from pipeline.benchmark import BenchmarkSpec
from pipeline.config import EvaluateSpec, Spec, SweepSpec, TeachSpec
from pipeline.store.describe import DescribeSpec
from pipeline.store.merge import MergeSpec
from pipeline.store.verify import VerifySpec
from pipeline.sweep.planned_trials import grid_trials


class Attention(Options):
    """Attention options."""

    heads: PositiveInt = Field(4, description="number of heads")
    window: int | None = Field(7, description="size of the window")


class Dense(Kinded):
    """A dense network."""

    kind: Literal["dense", "thin"] = Field("dense", description="dense: wide layers; thin: narrow ones")
    width: PositiveInt = Field(192, description="units per layer")


class Grid(Kinded):
    """A network on a grid."""

    kind: Literal["grid"] = Field("grid", description="grid: for images")
    patch_size: PositiveInt = Field(2, description="pixels per patch")
    channels: tuple[PositiveInt, ...] = Field((8, 16), description="channels of each level")
    attention: Attention = Attention(heads=8)

    @model_validator(mode="after")
    def _fits(self) -> "Grid":
        if self.patch_size == 13:
            raise ValueError("`patch_size` must not be 13.")
        return self


Network = Annotated[Dense | Grid, Field(discriminator="kind"), BeforeValidator(expand_kind)]


class Data(Kinded):
    """A dataset."""

    kind: Literal["digits", "moons"] = Field("digits", description="the dataset")
    root: str | None = Field(None, description="its folder")


class Training(Options):
    """Training options."""

    updates: PositiveInt = Field(3000, description="optimizer updates")
    learning_rate: float = Field(1e-3, gt=0, description="peak learning rate")


class TrainSpec(Spec):
    """Train something."""

    stage = "train"
    out: str = Field(description="folder to write")
    data: Data = Data()
    network: Network = Dense(width=64)
    optimizer: Training = Training(updates=50)
    labels: tuple[int, ...] | None = Field((1, 2), description="classes")
    guidance: tuple[float, ...] = Field((0.0,), description="scales")
    gpu: bool | None = Field(None, description="use a GPU")
    compile: bool = Field(False, description="compile the network")
    solver: Literal["euler", "ab2"] = Field("ab2", description="the solver")


class RequiredSpec(Spec):
    """No option has a default."""

    stage = "required"
    network: Network
    training: Training


def options(text: str, spec_type: type[Spec] = TrainSpec) -> Any:
    return parse(spec_type, shlex.split(text), "python -m jobs.test")


def refusal(text: str, spec_type: type[Spec] = TrainSpec) -> str:
    """Return the error message for a command line, as a job prints it."""
    with pytest.raises(ArgumentError) as error:
        options(text, spec_type)
    assert "\n" not in str(error.value)
    return as_options(str(error.value))


@pytest.fixture
def write(tmp_path: Path):
    def to_file(body: str) -> Path:
        file = tmp_path / "options.yaml"
        file.write_text(body)
        return file

    return to_file


# One spec, three ways

FASTER = Training(updates=50, learning_rate=0.5)

SAME = [
    ("", "{}", {}),
    ("--network.width 8", "network: {width: 8}", {"network": Dense(width=8)}),
    ("--network dense", "network: dense", {"network": Dense(width=64)}),
    ("--network.kind dense", "network: {kind: dense}", {"network": {"kind": "dense", "width": 64}}),
    ("--network thin", "network: thin", {"network": "thin"}),
    ("--network grid", "network: grid", {"network": "grid"}),
    ("--network grid", "network: {kind: grid}", {"network": Grid(attention=Attention(heads=8))}),
    (
        "--network.patch-size=4 --network grid --network.channels 1 2 3 --network.attention.window None",
        "network: {kind: grid, patch-size: 4, channels: [1, 2, 3], attention: {window: null}}",
        {"network": Grid(patch_size=4, channels=(1, 2, 3), attention=Attention(heads=8, window=None))},
    ),
    ("--data moons", "data: moons", {"data": "moons"}),
    ("--data.kind moons", "data: {kind: moons}", {"data": {"kind": "moons"}}),
    ("--data.root None --data=moons", "data: {root: null, kind: moons}", {"data": Data(kind="moons")}),
    ("--optimizer.learning-rate 5e-1", "optimizer: {learning-rate: 5e-1}", {"optimizer": FASTER}),
    ("--optimizer.learning_rate .5", "optimizer: {learning_rate: 0.5}", {"optimizer": FASTER}),
    ("--labels", "labels: []", {"labels": ()}),
    ("--labels 3", "labels: [3]", {"labels": (3,)}),
    ("--labels -3 4", "labels: [-3, 4]", {"labels": (-3, 4)}),
    ("--labels None", "labels: null", {"labels": None}),
    ("--guidance 0 1.5", "guidance: [0, 1.5]", {"guidance": (0.0, 1.5)}),
    ("--gpu True", "gpu: true", {"gpu": True}),
    ("--gpu False --compile True", "{gpu: false, compile: true}", {"gpu": False, "compile": True}),
    ("--gpu None", "gpu: null", {"gpu": None}),
]  # fmt: skip


@pytest.mark.parametrize(("words", "body", "values"), SAME, ids=[words for words, _, _ in SAME])
def test_a_spec_is_the_same_from_a_command_line_a_file_and_python(words: str, body: str, values: dict, write):
    made = TrainSpec(out="o", **values)
    assert options(f"--out o {words}") == made
    assert options(f"--out o --config {write(body)}") == made
    assert options(f"--config={write(body)} --out o {words}") == made


def test_a_kind_can_be_required():
    assert options("--network grid --training.updates 5", RequiredSpec).network == Grid()
    assert refusal("--training.updates 5", RequiredSpec) == "--network is required."
    assert refusal("--network grid", RequiredSpec) == "--training is required."
    assert options("--network.width 5 --training.updates 5", RequiredSpec).network == Dense(width=5)


def test_single_options_of_the_command_line_override_the_file(write):
    file = write("out: there\noptimizer: {updates: 7, learning_rate: 0.5}\nlabels: [1]\nsolver: euler")
    made = options(f"--optimizer.updates 9 --config {file} --labels 5 6")
    assert made == TrainSpec(
        out="there", optimizer=Training(updates=9, learning_rate=0.5), labels=(5, 6), solver="euler"
    )


def test_a_different_kind_replaces_the_kind_of_the_file_and_its_options(write):
    file = write("{out: o, network: {kind: grid, patch-size: 4}}")
    assert options(f"--config {file} --network.patch-size 5").network == Grid(patch_size=5)
    assert options(f"--config {file} --network.attention.heads 2").network == Grid(
        patch_size=4, attention=Attention(heads=2)
    )
    assert options(f"--config {file} --network dense").network == Dense(width=64)
    assert options(f"--config {write('{out: o, network: grid}')} --network.patch-size 5").network == Grid(patch_size=5)


def test_a_file_option_that_the_chosen_kind_lacks_is_refused(write):
    file = write("{out: o, network: {width: 4}}")
    assert options(f"--config {file}").network == Dense(width=4)
    assert refusal(f"--config {file} --network grid").startswith(f"--config {file}: --network.width is unknown")


def test_the_last_value_wins_and_an_equals_sign_takes_any_text():
    assert options("--out a --out b").out == "b"
    assert options("--out a --labels 5 --labels 6 7").labels == (5, 6, 7)  # lists are joined
    assert options("--out=--b --solver=euler").out == "--b"
    assert options("--out -5").out == "-5"
    assert options("--out -").out == "-"
    assert options("--out 3").out == "3"
    assert options("--out True").out == "True"
    assert options("--out ''").out == ""


# Refusals


@pytest.mark.parametrize(
    ("text", "option", "part"),
    [
        ("", "--out", "required"),
        ("--out", "--out", "needs a value"),
        ("--out --gpu True", "--out", "needs a value"),
        ("--out o --network", "--network", "needs a value"),
        ("--out o --optimizer.learning_rate", "--optimizer.learning-rate", "needs a value"),
        ("--out o --gpu", "--gpu", "needs a value"),
        ("--out o --config", "--config", "needs a value"),
        ("--out o --config --gpu True", "--config", "needs a value"),
        ("--out o --config a.yaml --config=b.yaml", "--config", "twice"),
        ("--out o p", "'p'", "--help"),
        ("--out o --colour red", "--colour", "unknown"),
        ("--out o -x", "-x", "unknown"),
        ("--out o --optimiser.updates=3", "--optimiser.updates", "--optimizer.updates?"),
        ("--out o --network.patch-size 3", "--network.patch-size", "unknown"),
        ("--out o --network grid --network.width 3", "--network.width", "unknown"),
        ("--out o --network tree", "--network.kind", "'tree'"),
        ("--out o --data sun", "--data.kind", "'sun'"),
        ("--out o --help=x", "-h/--help", "takes no value"),
        ("--out o --solver rk4", "--solver", "'rk4'"),
        ("--out o --gpu maybe", "--gpu", "'maybe'"),
        ("--out o --optimizer.updates 0", "--optimizer.updates", "'0', but should be greater than 0"),
        ("--out o --optimizer.learning-rate -inf", "--optimizer.learning-rate", "needs a value"),
        ("--out o --guidance 0 nan", "--guidance", "'nan'"),
        ("--out o --network.width None", "--network.width", "None"),
        ("--out o --network grid --network.channels 1 0", "--network.channels", "'0'"),
        ("--out o --network grid --network.attention.heads 0", "--network.attention.heads", "'0'"),
        ("--out o --network grid --network.patch-size 13", "--network.patch-size", "13"),
    ],
)  # fmt: skip
def test_an_error_is_one_line_that_names_the_whole_option(text: str, option: str, part: str, capfd):
    message = refusal(text)
    assert message.split()[0] == option
    assert part in message
    assert message[-1] in ".?"
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("body", "option", "part"),
    [
        ("colour: red", "--config FILE: --colour", "unknown"),
        ("optimizer: {speed: 3}", "--config FILE: --optimizer.speed", "unknown"),
        ("network: {kind: grid, attention: {head-s: 3}}", "--config FILE: --network.attention.head-s", "unknown"),
        ("network: {kind: grid, width: 3}", "--config FILE: --network.width", "unknown"),
        ("config: other.yaml", "--config FILE: --config", "unknown"),
        ("optimizer: {updates: 0}", "--optimizer.updates", "greater than 0"),
        ("optimizer: null", "--optimizer", "None"),
        ("optimizer: 3", "--optimizer", "3"),
        ("network: tree", "--network.kind", "'tree'"),
        ("network: {kind: [a]}", "--network.kind", ""),
        ("labels: 3", "--labels", "a list"),
        ("solver: null", "--solver", "None"),
        ("- a list", "--config FILE", "list"),
        ("labels: [", "--config FILE", "YAML"),
        ("7", "--config FILE", "int"),
        ("optimizer: {learning-rate: 3, learning_rate: 4}", "--config:", "learning-rate and learning_rate"),
        ("optimizer: {updates: 3, updates: 4}", "--config FILE", "updates is given twice"),
    ],
)  # fmt: skip
def test_an_error_in_a_file_is_one_line(body: str, option: str, part: str, write):
    file = write(body)
    message = refusal(f"--out o --config {file}")
    assert message.startswith(option.replace("FILE", str(file)) + " ")
    assert part in message


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("010", 10),
        ("1_000", 1000),
        ("1e-3", 0.001),
        ("-.5", -0.5),
        ("true", True),
        ("no", "no"),
        ("On", "On"),
        ("None", None),
        ("~", None),
        ("", None),
        ("2024-01-01", "2024-01-01"),
        ("2:8", "2:8"),
        ("'8'", "8"),
        ("[a, 1]", ["a", 1]),
    ],
)
def test_a_plain_scalar_of_a_file_means_the_same_as_on_the_command_line(written: str, meant: Any, write):
    file = write(f"{{out: o, network: {{kind: outside, module: 'a:b', arguments: {{some-thing: {written}}}}}}}")
    (found,) = parse(TeachSpec, ["--config", str(file)], "prog").network.arguments.items()
    assert found == ("some-thing", meant)
    assert type(found[1]) is type(meant)


def test_the_keys_of_a_mapping_option_stay_unchanged(write):
    file = write("{out: o, label-selector: {ray.io/node-group: gpu}}")
    assert parse(TeachSpec, ["--config", str(file)], "prog").label_selector == {"ray.io/node-group": "gpu"}


def test_a_grid_in_a_file_or_on_the_command_line_gives_the_same_trial_folders(write):
    rates = "1e-3", "2.0e-3", "0.003"
    file = write(f"{{store: s, out: o, grid: {{optimizer.learning-rate: [{', '.join(rates)}]}}}}")
    words = ["--store", "s", "--out", "o", "--grid", f"optimizer.learning-rate={','.join(rates)}"]
    points = [grid_trials(parse(SweepSpec, given, "prog")) for given in (["--config", str(file)], words)]
    assert points[0] == points[1]


def test_a_bad_value_of_the_file_is_not_hidden_by_an_option(write):
    file = write("optimizer: 3")
    assert refusal(f"--out o --config {file} --optimizer.updates 4").startswith("--optimizer is 3")


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path):
    assert refusal(f"--out o --config {tmp_path}").startswith(f"--config {tmp_path} is a folder")
    assert refusal("--out o --config=").startswith("--config is empty")
    assert "File name too long" in refusal(f"--out o --config {'a' * 300}")
    (tmp_path / "image.yaml").write_bytes(b"\x89PNG\xff")
    assert "'utf-8' codec" in refusal(f"--out o --config {tmp_path}/image.yaml")


# The help


def help_of(text: str, spec_type: type[Spec], capsys: pytest.CaptureFixture) -> str:
    """Return the help text, on one line."""
    with pytest.raises(SystemExit) as stop:
        options(f"{text} --help", spec_type)
    assert stop.value.code == 0
    out, err = capsys.readouterr()
    assert err == ""
    return " ".join(out.split())


SPECS = [
    *(value for value in vars(config).values() if isinstance(value, type) and issubclass(value, Spec)),
    BenchmarkSpec,
    DescribeSpec,
    VerifySpec,
    MergeSpec,
    TrainSpec,
    RequiredSpec,
]
SPECS.remove(Spec)


def is_positional(field: FieldInfo | None) -> bool:
    return field is not None and any(getattr(mark, "positional", False) for mark in field.metadata)


def leaves(models: list[type[Any]], where: str = "--"):
    """Yield every option of the first model with its field; for a union, the options of its default model."""
    for name, field in models[0].model_fields.items():
        option = where + name.replace("_", "-")
        nested = nested_models(field)
        if nested:
            yield from leaves([type(field.default)] if isinstance(field.default, Options) else nested, f"{option}.")
        else:
            yield option, field


@pytest.mark.parametrize("spec_type", SPECS, ids=lambda spec: spec.__name__)
def test_the_help_has_every_option_with_its_description(spec_type: type[Spec], capsys: pytest.CaptureFixture):
    text = help_of("", spec_type, capsys)
    assert " ".join(spec_type.__doc__.split()) in text
    assert "--config RECIPE|FILE.yaml recipe (celeba64, " in text
    for option, field in leaves([spec_type]):
        assert field.description, f"{option} has no description"
        if is_positional(field):
            assert "STORE" in text
        elif option.endswith(".kind"):
            assert f"{option.removesuffix('.kind')} {{" in text
        else:
            assert {"--as-json": "--json", "--json-file": "--json"}.get(option, option) in text.split()
        about = as_options(field.description).partition("; default: ")[0]
        assert "".join(about.split()) in "".join(text.split())  # the help also breaks lines inside words


def test_the_help_shows_the_options_of_the_chosen_kind_and_names_the_other_kinds(capsys: pytest.CaptureFixture, write):
    kinds = "--network {dense,thin,grid} dense: wide layers; thin: narrow ones; grid: for images (default: dense)"
    dense = help_of("", TrainSpec, capsys)
    assert kinds in dense
    assert "--network.width" in dense
    assert "--network.patch-size" not in dense
    for text in ("--network grid", "--network.kind=grid", f"--config {write('network: grid')}"):
        grid = help_of(text, TrainSpec, capsys)
        assert kinds.replace("default: dense", "default: grid") in grid
        assert "--network.width" not in grid
        assert "--network.attention.heads INT number of heads (default: 8)" in grid


def test_the_help_shows_defaults_and_values_of_the_file(capsys: pytest.CaptureFixture, write):
    text = help_of("--labels 5", TrainSpec, capsys)
    for part in (
        "--out STR folder to write (required)",
        "--network.width INT units per layer (default: 64)",
        "--optimizer.updates INT optimizer updates (default: 50)",
        "--labels [INT ...] classes (default: 1 2)",
        "--gpu {True,False} use a GPU (default: None)",
        "--solver {euler,ab2} the solver (default: ab2)",
    ):
        assert part in text
    text = help_of(f"--config {write('{out: o, optimizer: {updates: 9}}')}", TrainSpec, capsys)
    assert "folder to write (default: o)" in text
    assert "optimizer updates (default: 9)" in text


@pytest.mark.parametrize("spec_type", SPECS, ids=lambda spec: spec.__name__)
def test_the_help_lists_required_options_then_config_then_common_options(spec_type: type[Spec], capsys):
    with pytest.raises(SystemExit):
        options("--help", spec_type)
    listed, fields = re.findall(r"^  (--\S+)", capsys.readouterr().out, re.MULTILINE), spec_type.model_fields
    required = [name for name, field in fields.items() if field.is_required() and not nested_models(field)]
    names = [name for name in (*required, "config", *spec_type.common) if not is_positional(fields.get(name))]
    ranks = [listed.index(f"--{name.replace('_', '-')}") for name in names]
    assert ranks == sorted(ranks)


def test_a_group_of_options_has_its_own_section_and_no_prefix(capsys: pytest.CaptureFixture):
    text = help_of("", TeachSpec, capsys)
    assert text.index("resources:") < text.index("--workers INT|MIN:MAX")
    assert parse(TeachSpec, ["--out", "o", "--workers", "2:8", "--seed", "3"], "prog").workers == Range(2, 8)


def test_the_description_explains_a_default_of_none(capsys: pytest.CaptureFixture):
    of_gpu = help_of("", EvaluateSpec, capsys).split("--gpu ")[1].split("--")[0]
    assert "(default: True if the cluster has GPUs now)" in of_gpu
    assert "None" not in of_gpu


# Every spec of the project


def required(spec_type: type[Spec]) -> dict[str, Any]:
    fields = {name: field for name, field in spec_type.model_fields.items() if field.is_required()}
    values = {
        name: (f"a-{name}",) if typing.get_origin(field.annotation) is tuple else f"a-{name}"
        for name, field in fields.items()
    }
    values |= {name: nested_models(field)[0]() for name, field in fields.items() if nested_models(field)}
    several = {RequiredSpec: {"network": Grid(), "training": Training()}, EvaluateSpec: {"teacher": "t"}}
    return values | several.get(spec_type, {})


@pytest.mark.parametrize("spec_type", SPECS, ids=lambda spec: spec.__name__)
def test_every_default_can_be_given_explicitly(spec_type: type[Spec], write):
    """Giving every default explicitly, on the command line or in a file, yields the default spec."""
    made = spec_type(**required(spec_type))
    values = made.model_dump(mode="json")
    assert options(f"--config {write(yaml.safe_dump(values))}", spec_type) == made
    positional, words = [], []
    for name, value in flatten(values).items():
        field = spec_type.model_fields.get(name)
        many = [str(one) for one in (value if isinstance(value, list) else [value])]
        if is_positional(field):
            positional += many
        elif name != "as_json" and not (spec_type is VerifySpec and name == "repair"):
            words += [f"--{'json' if name == 'json_file' else name}", *many]
    assert parse(spec_type, positional + words, "python -m jobs.test") == made


class Everything(TrainSpec):
    """An option whose name differs from its field."""

    as_json: Annotated[str, OptionStyle("json")] = Field("x", description="a name that the model cannot use")


def test_an_option_can_have_a_different_name_than_its_field():
    assert options("--out o --json y", Everything).as_json == "y"


def test_a_bool_without_a_value_is_true():
    for words in (["--dry-run"], ["--dry-run", "True"], ["--dry-run", "--seed", "3"]):
        assert parse(TeachSpec, ["--out", "o", *words], "prog").dry_run is True
    assert parse(TeachSpec, ["--out", "o", "--dry-run", "False"], "prog").dry_run is False

"""A spec is the same from Python, a command line and a file, and so is what refuses it."""

import shlex
import typing
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
import tyro
import yaml
from pydantic import BeforeValidator, Field, PositiveInt, model_validator

from jobs import parsing
from jobs.parsing import parse
from kac.options import Kinded, OptionError, Options, flatten, kind_alone, nested_models
from pipeline import config
from pipeline.benchmark import BenchmarkSpec
from pipeline.config import EvaluateSpec, Spec, SweepSpec, TeachSpec
from pipeline.store.describe import DescribeSpec
from pipeline.store.merge import MergeSpec
from pipeline.store.verify import VerifySpec
from pipeline.sweep.space import grid_points


class Attention(Options):
    """How it attends."""

    heads: PositiveInt = Field(4, description="number of heads")
    window: int | None = Field(7, description="size of the window")


class Dense(Kinded):
    """A dense network."""

    kind: Literal["dense", "thin"] = Field("dense", description="dense: all of it; thin: less of it")
    width: PositiveInt = Field(192, description="how wide")


class Grid(Kinded):
    """A network on a grid."""

    kind: Literal["grid"] = Field("grid", description="grid: for images")
    patch_size: PositiveInt = Field(2, description="pixels a patch")
    channels: tuple[PositiveInt, ...] = Field((8, 16), description="channels of each level")
    attention: Attention = Attention(heads=8)

    @model_validator(mode="after")
    def _fits(self) -> "Grid":
        if self.patch_size == 13:
            raise ValueError("--patch-size: expected another number than 13, found 13")
        return self


Network = Annotated[Dense | Grid, Field(discriminator="kind"), BeforeValidator(kind_alone)]


class Data(Kinded):
    """Which dataset."""

    kind: Literal["digits", "moons"] = Field("digits", description="the dataset")
    root: str | None = Field(None, description="where it lies")


class Training(Options):
    """How it is trained."""

    updates: PositiveInt = Field(3000, description="optimizer updates")
    learning_rate: float = Field(1e-3, gt=0, description="the peak")


class TrainSpec(Spec):
    """Train something."""

    stage = "train"
    out: str = Field(description="folder to write")
    data: Data = Data()
    network: Network = Dense(width=64)
    optimizer: Training = Training(updates=50)
    labels: tuple[int, ...] | None = Field((1, 2), description="classes")
    guidance: tuple[float, ...] = Field((0.0,), description="scales")
    gpu: bool | None = Field(None, description="whether on a GPU")
    compile: bool = Field(False, description="whether compiled")
    solver: Literal["euler", "ab2"] = Field("ab2", description="which solver")


class RequiredSpec(Spec):
    """Nothing has a default."""

    stage = "required"
    network: Network
    training: Training


def options(text: str, spec_type: type[Spec] = TrainSpec) -> Any:
    return parse(spec_type, shlex.split(text), "python -m jobs.test")


def refusal(text: str, spec_type: type[Spec] = TrainSpec) -> str:
    with pytest.raises(OptionError) as error:
        options(text, spec_type)
    assert "\n" not in str(error.value)
    return str(error.value)


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
    assert refusal("--training.updates 5", RequiredSpec) == "--network: expected a value, found none: see --help"
    assert refusal("--network grid", RequiredSpec) == "--training: expected a value, found none: see --help"
    assert options("--network.width 5 --training.updates 5", RequiredSpec).network == Dense(width=5)


def test_the_command_line_overrides_the_file_one_by_one(write):
    file = write("out: there\noptimizer: {updates: 7, learning_rate: 0.5}\nlabels: [1]\nsolver: euler")
    made = options(f"--optimizer.updates 9 --config {file} --labels 5 6")
    assert made == TrainSpec(
        out="there", optimizer=Training(updates=9, learning_rate=0.5), labels=(5, 6), solver="euler"
    )


def test_another_kind_replaces_that_of_the_file_with_its_options(write):
    file = write("{out: o, network: {kind: grid, patch-size: 4}}")
    assert options(f"--config {file} --network.patch-size 5").network == Grid(patch_size=5)
    assert options(f"--config {file} --network.attention.heads 2").network == Grid(
        patch_size=4, attention=Attention(heads=2)
    )
    assert options(f"--config {file} --network dense").network == Dense(width=64)
    assert options(f"--config {write('{out: o, network: grid}')} --network.patch-size 5").network == Grid(patch_size=5)


def test_an_option_of_the_file_that_the_kind_does_not_have_is_refused(write):
    file = write("{out: o, network: {width: 4}}")
    assert options(f"--config {file}").network == Dense(width=4)
    assert refusal(f"--config {file} --network grid") == (
        f"--config {file}: --network.width: unknown option: see --help"
    )


def test_the_last_one_wins_and_an_equals_sign_takes_any_word():
    assert options("--out a --out b").out == "b"
    assert options("--out=--b --solver=euler").out == "--b"
    assert options("--out -5").out == "-5"
    assert options("--out 3").out == "3"
    assert options("--out True").out == "True"
    assert options("--out ''").out == ""


# Refusals


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "--out: expected a value, found none: see --help"),
        ("--out", "--out: expected a value, found none: see --help"),
        ("--out --gpu True", "--out: expected a value, found none: see --help"),
        ("--out o --network", "--network: expected a value, found none: see --help"),
        ("--out o --optimizer.learning_rate", "--optimizer.learning_rate: expected a value, found none: see --help"),
        ("--out o --gpu", "--gpu: expected a value, found none: see --help"),
        ("--out o --config", "--config: expected a value, found none: see --help"),
        ("--out o --config --gpu True", "--config: expected a value, found none: see --help"),
        ("--out o --config a.yaml --config=b.yaml", "--config: expected one recipe or YAML file, found several"),
        ("--out o p", "expected an option, found 'p': see --help"),
        ("--out o --colour red", "--colour: unknown option: see --help"),
        ("--out o -x", "-x: unknown option: see --help"),
        ("--out o --optimiser.updates=3", "--optimiser.updates: unknown option, perhaps --optimizer.updates: see"),
        ("--out o --network.patch-size 3", "--network.patch-size: unknown option: see --help"),
        ("--out o --network grid --network.width 3", "--network.width: unknown option: see --help"),
        ("--out o --network tree", "--network.kind: input should be 'dense', 'thin', 'grid', found 'tree'"),
        ("--out o --data sun", "--data.kind: input should be 'digits' or 'moons', found 'sun'"),
        ("--out o --solver rk4", "--solver: input should be 'euler' or 'ab2', found 'rk4'"),
        ("--out o --gpu maybe", "--gpu: input should be a valid boolean, unable to interpret input, found 'maybe'"),
        ("--out o --optimizer.updates 0", "--optimizer.updates: input should be greater than 0, found '0'"),
        ("--out o --optimizer.learning-rate -inf", "--optimizer.learning-rate: expected a value, found none: see"),
        ("--out o --guidance 0 nan", "--guidance: input should be a finite number, found 'nan'"),
        ("--out o --network.width None", "--network.width: input should be a valid integer"),
        ("--out o --network grid --network.channels 1 0", "--network.channels: input should be greater than 0"),
        ("--out o --network grid --network.attention.heads 0", "--network.attention.heads: input should be"),
        ("--out o --network grid --network.patch-size 13", "--network.patch-size: expected another number"),
    ],
)  # fmt: skip
def test_a_refusal_is_one_line_that_names_the_whole_option(text: str, message: str, capfd):
    assert refusal(text).startswith(message)
    assert capfd.readouterr() == ("", ""), "tyro says nothing by itself"


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("colour: red", "--config FILE: --colour: unknown option: see --help"),
        ("optimizer: {speed: 3}", "--config FILE: --optimizer.speed: unknown option: see --help"),
        ("network: {kind: grid, attention: {head-s: 3}}", "--config FILE: --network.attention.head-s: unknown option"),
        ("network: {kind: grid, width: 3}", "--config FILE: --network.width: unknown option: see --help"),
        ("config: other.yaml", "--config FILE: --config: unknown option: see --help"),
        ("optimizer: {updates: 0}", "--optimizer.updates: input should be greater than 0, found 0"),
        ("optimizer: null", "--optimizer: input should be named values, found None"),
        ("optimizer: 3", "--optimizer: input should be named values, found 3"),
        ("network: tree", "--network.kind: input should be 'dense', 'thin', 'grid', found 'tree'"),
        ("network: {kind: [a]}", "--network.kind"),
        ("labels: 3", "--labels: input should be a list, found 3"),
        ("solver: null", "--solver: input should be 'euler' or 'ab2', found None"),
        ("- a list", "--config FILE: expected a mapping of options, found list"),
        ("labels: [", "--config FILE: expected a YAML file, found: while parsing"),
        ("7", "--config FILE: expected a mapping of options, found int"),
        ("optimizer: {learning-rate: 3, learning_rate: 4}", "--config: learning-rate and learning_rate are one option"),
        ("optimizer: {updates: 3, updates: 4}", "--config FILE: expected a YAML file, found: updates is given twice"),
    ],
)  # fmt: skip
def test_a_file_is_refused_in_one_line(body: str, message: str, write):
    file = write(body)
    assert refusal(f"--out o --config {file}").startswith(message.replace("FILE", str(file)))


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
def test_a_plain_word_of_a_file_means_what_it_means_on_the_command_line(written: str, meant: Any, write):
    file = write(f"{{out: o, network: {{kind: outside, module: 'a:b', arguments: {{some-thing: {written}}}}}}}")
    (found,) = parse(TeachSpec, ["--config", str(file)], "prog").network.arguments.items()
    assert found == ("some-thing", meant)
    assert type(found[1]) is type(meant)


def test_the_keys_of_an_option_that_is_a_mapping_stay_as_they_are(write):
    file = write("{out: o, label-selector: {ray.io/node-group: gpu}}")
    assert parse(TeachSpec, ["--config", str(file)], "prog").label_selector == {"ray.io/node-group": "gpu"}


def test_trials_have_the_same_folders_whether_a_grid_is_in_a_file_or_on_the_command_line(write):
    rates = "1e-3", "2.0e-3", "0.003"
    file = write(f"{{store: s, out: o, grid: {{optimizer.learning-rate: [{', '.join(rates)}]}}}}")
    words = ["--store", "s", "--out", "o", "--grid", f"optimizer.learning-rate={','.join(rates)}"]
    points = [grid_points(parse(SweepSpec, given, "prog")) for given in (["--config", str(file)], words)]
    assert points[0] == points[1]


def test_a_bad_value_of_the_file_is_not_hidden_by_an_option(write):
    file = write("optimizer: 3")
    assert refusal(f"--out o --config {file} --optimizer.updates 4").startswith("--optimizer: input should be")


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path):
    assert refusal(f"--out o --config {tmp_path}").startswith(f"--config {tmp_path} is a folder")
    assert refusal("--out o --config=").startswith("--config is empty")
    (tmp_path / "image.yaml").write_bytes(b"\x89PNG\xff")
    assert "expected a YAML file, found: 'utf-8' codec" in refusal(f"--out o --config {tmp_path}/image.yaml")


# The help


def help_of(text: str, spec_type: type[Spec], capsys: pytest.CaptureFixture) -> str:
    """The words of the help, without the lines that tyro draws around them."""
    with pytest.raises(SystemExit) as stop:
        options(f"{text} --help", spec_type)
    assert stop.value.code == 0
    out, err = capsys.readouterr()
    assert err == ""
    return " ".join(word for word in out.split() if not set(word) <= set("│╭╮╰╯─"))


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


def leaves(models: list[type[Any]], where: str = "--"):
    """Every option of the first model with its field, and of several models the kinds and the default one's."""
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
    assert "--config RECIPE|FILE.yaml a recipe (celeba64, " in text
    for option, field in leaves([spec_type]):
        assert field.description, f"{option} has no description"
        if parsing.POSITIONAL in field.metadata:
            assert "STORE" in text
        else:
            assert {"--as-json": "--json", "--json-file": "--json"}.get(option, option) in text.split()
        assert " ".join(field.description.split()) in text
        assert not option.endswith(".kind") or f"{option.removesuffix('.kind')} {{" in text, "the short form"


def test_the_help_is_that_of_the_kind_that_is_chosen_and_names_the_others(capsys: pytest.CaptureFixture, write):
    kinds = "--network.kind {dense,thin,grid} dense: all of it; thin: less of it; grid: for images (default: dense)"
    dense = help_of("", TrainSpec, capsys)
    assert kinds in dense
    assert "--network.width" in dense
    assert "--network.patch-size" not in dense
    for text in ("--network grid", "--network.kind=grid", f"--config {write('network: grid')}"):
        grid = help_of(text, TrainSpec, capsys)
        assert kinds.replace("default: dense", "default: grid") in grid
        assert "--network.width" not in grid
        assert "--network.attention.heads INT number of heads (default: 8)" in grid


def test_the_help_shows_defaults_those_of_the_file_too(capsys: pytest.CaptureFixture, write):
    text = help_of("--labels 5", TrainSpec, capsys)
    for part in (
        "--out STR folder to write (required)",
        "--network.width INT how wide (default: 64)",
        "--optimizer.updates INT optimizer updates (default: 50)",
        "--labels [INT ...]|None classes (default: 1 2)",
        "--gpu {True,False}|None whether on a GPU (default: None)",
        "--solver {euler,ab2} which solver (default: ab2)",
    ):
        assert part in text
    text = help_of(f"--config {write('{out: o, optimizer: {updates: 9}}')}", TrainSpec, capsys)
    assert "folder to write (default: o)" in text
    assert "optimizer updates (default: 9)" in text


# Every spec of the project


def required(spec_type: type[Spec]) -> dict[str, Any]:
    fields = {name: field for name, field in spec_type.model_fields.items() if field.is_required()}
    values = {
        name: (f"a-{name}",) if typing.get_origin(field.annotation) is tuple else f"a-{name}"
        for name, field in fields.items()
    }
    values |= {name: nested_models(field)[0]() for name, field in fields.items() if nested_models(field)}
    several = {RequiredSpec: {"network": Grid(), "training": Training()}, EvaluateSpec: {"teacher": "s"}}
    return values | several.get(spec_type, {})


@pytest.mark.parametrize("spec_type", SPECS, ids=lambda spec: spec.__name__)
def test_every_option_can_be_spelled_out(spec_type: type[Spec], write):
    """All words for all defaults give the spec of the defaults, and so does a file of them."""
    made = spec_type(**required(spec_type))
    values = made.model_dump(mode="json")
    assert options(f"--config {write(yaml.safe_dump(values))}", spec_type) == made
    positional, words = [], []
    for name, value in flatten(values).items():
        field = spec_type.model_fields.get(name)
        many = [str(one) for one in (value if isinstance(value, list) else [value])]
        if field and parsing.POSITIONAL in field.metadata:
            positional += many
        elif name != "as_json" and not (spec_type is VerifySpec and name == "repair"):
            words += [f"--{'json' if name == 'json_file' else name}", *many]
    assert parse(spec_type, positional + words, "python -m jobs.test") == made


# What this rests on: fails when tyro changes


def test_tyro_returns_what_is_given_nested_and_the_words_that_are_left():
    mirror = parsing._mirror([TrainSpec], {})
    given = {"out": "o", "optimizer": {"updates": "3"}, "labels": ["1", "2"], "data": {}, "network": {"kind": "dense"}}
    words = ["--out=o", "--optimizer.updates", "3", "--labels", "1", "2", "--network", "dense", "--no", "way"]
    assert tyro.cli(mirror, args=words, return_unknown_args=True) == (given, ["--no", "way"])


def test_tyro_never_sees_an_option_without_its_value(capfd):
    """It would draw a box and exit."""
    mirror = parsing._mirror([Everything], {})
    for option, count in parsing._options(mirror):
        if count == 1:
            for after in ("", " --out o", " -x", " --"):
                assert refusal(option + after, Everything) == f"{option}: expected a value, found none: see --help"
        elif count == "*":
            options(f"--out o {option}", Everything)
    assert capfd.readouterr() == ("", "")


class Everything(TrainSpec):
    """All sorts of options, and a name of its own."""

    as_json: Annotated[str, tyro.conf.arg(name="json")] = Field("x", description="a name that the model cannot use")


def test_an_option_can_have_another_name_than_its_field():
    assert options("--out o --json y", Everything).as_json == "y"


def test_a_truth_value_may_stand_alone():
    for words in (["--dry-run"], ["--dry-run", "True"], ["--dry-run", "--seed", "3"]):
        assert parse(TeachSpec, ["--out", "o", *words], "prog").dry_run is True
    assert parse(TeachSpec, ["--out", "o", "--dry-run", "False"], "prog").dry_run is False

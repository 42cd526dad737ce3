"""Modules from outside: called their way, and behind our interface like any other network."""

import json
from typing import Any

import pytest
import torch
from torch import nn

from jobs.parsing import parse
from kac.data import DataConfig
from kac.guidance import check_guidance, guide
from kac.model import load_model, save_model, teacher_config
from kac.networks import OutsideConfig, build_network, load_weights
from kac.networks.adopt import adopt, try_out
from kac.networks.cost import network_cost
from kac.networks.velocity import NetworkModule
from kac.path import PathConfig
from kac.precision import Precision
from kac.util.errors import ArgumentError, CheckpointError
from pipeline.config.specs import TeachSpec
from tests.kac.outside_modules import Field
from tests.kac.weights_files import file_of

HERE = "tests.kac.outside_modules"
CLASSES = 2


def config(name: str = "Field", **options: Any) -> OutsideConfig:
    return OutsideConfig(module=f"{HERE}:{name}", **options)


def built(name: str = "Field", shape: tuple[int, ...] = (2,), **options: Any) -> NetworkModule:
    torch.manual_seed(0)
    return build_network(config(name, **options), shape, CLASSES).eval()


def batch(count: int = 5, shape: tuple[int, ...] = (2,)) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return (
        torch.randn(count, *shape, generator=generator),
        torch.rand(count, generator=generator),
        torch.arange(count) % (CLASSES + 1),
    )


def refusal(name: str, **options: Any) -> str:
    with pytest.raises(ArgumentError) as error:
        built(name, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


# How it is called


def test_the_velocity_is_the_modules_own():
    network, (x, t, label) = built(), batch()
    assert torch.equal(network(x, t, label), network.inner(x, t, label))
    assert (network.null_label, network.takes) == (CLASSES, ())


def test_data_at_1_is_called_at_1_minus_t_and_turned_round():
    network, (x, t, label) = built(time="data_at_1"), batch()
    assert torch.equal(network(x, t, label), -network.inner(x, 1 - t, label))


def test_both_conventions_follow_one_path():
    """dx/dt of x = (1 - t) data + t noise is noise - data, whichever end the module counts from."""

    class Straight(nn.Module):
        def __init__(self, data_at_1: bool) -> None:
            super().__init__()
            self.data_at_1 = data_at_1

        def forward(self, x, t, label):
            """Data are zeros: x is t noise, where t is that of the noise."""
            noise = x / (1 - t if self.data_at_1 else t)[:, None]
            return -noise if self.data_at_1 else noise

    fields = []
    for time in ("data_at_0", "data_at_1"):
        network = built(time=time)
        network.inner = Straight(time == "data_at_1")
        x, t, label = batch()
        fields.append(network(x, t, label))
    assert torch.allclose(*fields, rtol=1e-5)


@pytest.mark.parametrize("time", ["data_at_0", "data_at_1"])
def test_times_are_scaled_after_they_are_turned_round(time: str):
    network, (x, t, label) = built(time=time, time_scale=1000), batch()
    sign, there = (1, t) if time == "data_at_0" else (-1, 1 - t)
    assert torch.equal(network(x, t, label), sign * network.inner(x, 1000 * there, label))


@pytest.mark.parametrize("t", [torch.tensor(0.3), torch.tensor([0.3]), torch.tensor(0.3, dtype=torch.float64)])
def test_the_module_gets_a_time_a_sample_in_single_precision(t: torch.Tensor):
    """``Field`` itself refuses others."""
    network, (x, _, label) = built(), batch()
    assert torch.equal(network(x, t, label), network(x, torch.full((5,), 0.3), label))


def test_a_module_without_labels_is_called_without():
    network, (x, t, label) = built("Blind", labels="none"), batch()
    assert torch.equal(network(x, t, label), x * t[:, None])
    assert torch.allclose(guide(network, 2.0, label)(x, t), x * t[:, None])


def test_guidance_of_a_module_without_a_null_label_is_refused():
    network, (x, t, _) = built(labels="without_null", arguments={"classes": CLASSES}), batch()
    label = torch.zeros(5, dtype=torch.int64)
    message = r"^`guidance` 1\.5: this network has no null label"
    assert torch.equal(guide(network, 0.0, label)(x, t), network(x, t, label))
    for wrapped in (network, Precision(dtype="bfloat16", compile=False).wrap(network)):
        with pytest.raises(ArgumentError, match=message):
            guide(wrapped, 1.5, label)
    teacher = teacher_config(config(labels="without_null"), PathConfig(), DataConfig(kind="moons"))
    with pytest.raises(ArgumentError, match=message):
        check_guidance(teacher, (0.0, 1.5))
    check_guidance(teacher, (0.0,))


@pytest.mark.parametrize("kind", ["tensor", "tuple", "output"])
def test_a_velocity_may_come_in_a_tuple_or_as_sample(kind: str):
    x, t, label = batch()
    assert torch.equal(built("Odd", arguments={"kind": kind})(x, t, label), x)


@pytest.mark.parametrize(
    ("kind", "found"), [("flat", r"\[10\]"), ("nothing", "NoneType"), ("empty", "NoneType"), ("tensor", None)]
)
def test_something_else_than_a_velocity_is_refused(kind: str, found: str | None):
    network = built("Odd", arguments={"kind": kind})
    if found is None:
        try_out(network, config("Odd", arguments={"kind": kind}), (2,), CLASSES)
        return
    message = rf"^`network.module` tests.kac.outside_modules:Odd: expected a velocity of shape \[5, 2\], found {found}$"
    with pytest.raises(ArgumentError, match=message):
        network(*batch())
    with pytest.raises(ArgumentError, match="expected a velocity of shape"):
        try_out(network, config("Odd", arguments={"kind": kind}), (2,), CLASSES)


@pytest.mark.parametrize(
    ("kind", "found"),
    [("infinite", "found NaN or infinity"), ("raises", "found RuntimeError: expected something else")],
)
def test_a_module_that_does_not_work_is_found_out(kind: str, found: str):
    with pytest.raises(CheckpointError, match=found) as error:
        try_out(built("Odd", arguments={"kind": kind}), config("Odd", arguments={"kind": kind}), (2,), CLASSES)
    assert "\n" not in str(error.value)


def test_a_module_with_random_numbers_that_are_not_saved_is_found_out():
    """Every process that loads it would have another teacher."""
    for is_kept in (True, False):
        asked = config("Fourier", arguments={"is_kept": is_kept})
        network = build_network(asked, (2,), CLASSES)
        if is_kept:
            try_out(network, asked, (2,), CLASSES)
        else:
            with pytest.raises(CheckpointError, match=r"Fourier to give the same velocities whenever.*: make them buf"):
                try_out(network, asked, (2,), CLASSES)


# How it is found


@pytest.mark.parametrize("name", ["annotated", "annotated_late", "Field"])
def test_classes_and_annotated_functions_are_factories(name: str):
    network = built(name, shape=(4,), arguments={"size": 4})
    assert isinstance(network.inner, Field)
    assert network(*batch(shape=(4,))).shape == (5, 4)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("nothing", {}, "expected package.module:factory, found module 'tests.kac.outside_modules' has no attribute"),
        ("A_NUMBER", {}, "expected a class of nn.Module, or a function annotated to return one (def factory(...) -> "),
        ("Output", {}, "expected a class of nn.Module, or a function annotated to return one"),
        ("not_annotated", {}, "expected a class of nn.Module, or a function annotated to return one"),
        ("falsely_annotated", {}, "expected an nn.Module of it, found str"),
        ("without_parameters", {}, "expected a module with parameters, found none"),
        ("Field", {"arguments": {"depth": 3}}, "expected it to make an nn.Module, found TypeError: Field.__init__()"),
        ("Field", {"arguments": {"size": "big"}}, "expected it to make an nn.Module, found TypeError: "),
    ],
)  # fmt: skip
def test_what_cannot_be_had_is_refused_in_one_line(name: str, options: dict[str, Any], message: str):
    assert refusal(name, **options).startswith(f"`network.module` {HERE}:{name}: {message}")


def test_a_module_that_is_not_installed_is_named():
    with pytest.raises(
        ArgumentError, match=r"^`network.module` no.such:net: expected package.*found No module named 'no'"
    ):
        build_network(OutsideConfig(module="no.such:net"), (2,), CLASSES)


def test_a_folder_can_call_no_other_function_than_a_factory_of_modules(tmp_path):
    """Whoever wrote its config.json would otherwise choose what is run here."""
    made = saved(tmp_path / "model")
    values = json.loads((tmp_path / "model" / "config.json").read_text())
    trap = tmp_path / "trap"
    values["network"] = {"kind": "outside", "module": "os:mkdir", "arguments": {"path": str(trap)}}
    (tmp_path / "model" / "config.json").write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match=r"config.json: `network.module` os:mkdir: expected a class of nn.Module"):
        load_model(str(tmp_path / "model"))
    assert not trap.exists()
    assert isinstance(made, NetworkModule)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"module": "no_colon"}, "`module`: expected package.module:factory, found 'no_colon'"),
        ({"conditions": ("end_time",)}, "`conditions`: expected none, since a module from outside takes time and"),
        ({"arguments": ("width",)}, "`arguments`: expected NAME=VALUE, found"),
        ({"arguments": ("a-b=3",)}, "`arguments`: expected NAME=VALUE, found"),
        ({"arguments": ("a=[1",)}, "`arguments`: expected lists and mappings as JSON has them, found"),
        ({"arguments": {"a": {1, 2}}}, "`arguments`: expected numbers, text, truth values, lists and mappings of them"),
        ({"arguments": {"a": float("nan")}}, "`arguments`: expected numbers, text, truth values, lists"),
        ({"time_scale": 0}, "`time_scale`: input should be greater than 0".replace("_", "-")),
        ({"labels": "some"}, "`labels`: input should be 'with_null', 'without_null' or 'none'"),
    ],
    ids=str,
)  # fmt: skip
def test_bad_options_are_refused(options: dict[str, Any], message: str):
    with pytest.raises(ArgumentError) as error:
        OutsideConfig(**{"module": "a:b", **options})
    assert str(error.value).startswith(message)


def test_an_objectives_conditions_are_refused_too():
    """A student's config is its teacher's with the objective's conditions, unchecked."""
    asked = config().model_copy(update={"conditions": ("end_time", "guidance")})
    with pytest.raises(ArgumentError, match=r"^`network.conditions`: expected none.*found end_time, guidance"):
        build_network(asked, (2,), CLASSES)


def test_arguments_are_the_same_from_words_a_file_and_python(tmp_path):
    plain = {"size": 3, "levels": [1, 2], "rate": 0.001, "name": "abc", "on": True, "off": False, "none": None}
    words = ["size=3", "levels=(1,2)", "rate=1e-3", "name=abc", "on=true", "off=False", "none=null"]
    expected = config(arguments=plain)
    assert config(arguments=words) == expected
    command = ["--out", "o", "--network", "outside", "--network.module", f"{HERE}:Field"]
    assert parse(TeachSpec, [*command, "--network.arguments", *words], "prog").network == expected
    file = tmp_path / "options.yaml"
    file.write_text(json.dumps({"network": {"kind": "outside", "module": f"{HERE}:Field", "arguments": plain}}))
    given = parse(TeachSpec, ["--config", str(file), "--out", "o"], "prog").network
    assert given == expected
    again = parse(TeachSpec, ["--config", str(file), "--out", "o", "--network.arguments", "size=4"], "prog").network
    assert again.arguments == {"size": 4}
    assert parse(TeachSpec, command, "prog").network.arguments == {}


def test_teaching_a_network_without_null_label_drops_no_labels():
    network = config(labels="without_null")
    with pytest.raises(ArgumentError, match=r"`label_dropout`: expected 0, since this network has no null label.*0\.1"):
        TeachSpec(out="o", network=network)
    assert TeachSpec(out="o", network=network, label_dropout=0).network == network


# Folders, cost, training


def saved(folder: Any, **options: Any) -> NetworkModule:
    network = built(**options)
    teacher = teacher_config(config(**options), PathConfig(), DataConfig(kind="moons"))
    save_model(str(folder), teacher, network.state_dict())
    return network


def test_a_loaded_folder_is_the_saved_module(tmp_path):
    network = saved(tmp_path / "model", arguments={"scale": 2.0}, time="data_at_1")
    network.inner.version.fill_(3)
    loaded, found = load_model(str(tmp_path / "model"))
    assert torch.equal(loaded(*batch()), network(*batch()))
    assert found.network == config(arguments={"scale": 2.0}, time="data_at_1")
    assert loaded.inner.version.item() == 7
    assert loaded.inner.version.dtype == torch.int64


def test_a_folder_whose_module_is_gone_is_refused_in_one_line(tmp_path):
    saved(tmp_path / "model")
    file = tmp_path / "model" / "config.json"
    file.write_text(file.read_text().replace(f"{HERE}:Field", "gone.away:Field"))
    with pytest.raises(CheckpointError, match=r"config.json: `network.module` gone.away:Field: expected package"):
        load_model(str(tmp_path / "model"))


def test_the_cost_of_a_module_that_needs_numbers():
    cost = network_cost(config(), (2,), CLASSES)
    assert cost == (3 * 2 + 2 + 3 * 2, 2 * 3 * 2)


def test_attention_is_counted_on_the_cpu_too():
    places, channels = 64, 8
    projections = places * (channels + 3 * channels**2 + channels**2 + channels)
    attention = 2 * places**2 * channels
    cost = network_cost(config("Attending"), (1, 8, 8), CLASSES)
    assert cost.flops_per_call == 2 * (projections + attention)


def test_students_start_from_it_and_every_parameter_learns():
    teacher, student = built(), build_network(config(), (2,), CLASSES)
    load_weights(student, teacher.state_dict())
    student.train()
    student(*batch()).square().sum().backward()
    assert torch.equal(student(*batch()), teacher(*batch()))
    assert all(parameter.grad is not None and bool(parameter.grad.any()) for parameter in student.parameters())


def test_weights_are_loaded_strictly_into_the_module():
    network, other = built(), built(arguments={"scale": 1.0})
    weights = {f"module.{name}": value + 1 for name, value in other.inner.state_dict().items()}
    found = adopt(network, config(), (2,), file_of(weights))
    assert found == ("module", f"weights of {HERE}:Field", "classes_and_null")
    assert torch.equal(network.inner.linear.weight, other.inner.linear.weight + 1)
    del weights["module.classes.weight"]
    with pytest.raises(CheckpointError, match=r"do not fit tests.*:Field: classes.weight missing \(1"):
        adopt(network, config(), (2,), file_of(weights))


def test_diffusers_own_module_is_one(tmp_path):
    """A class of an installed library needs no code of one's own."""
    arguments = {
        "sample_size": 8,
        "in_channels": 1,
        "out_channels": 1,
        "block_out_channels": [32],
        "layers_per_block": 1,
        "down_block_types": ["DownBlock2D"],
        "up_block_types": ["UpBlock2D"],
        "num_class_embeds": CLASSES,
    }
    asked = OutsideConfig(module="diffusers:UNet2DModel", arguments=arguments, labels="without_null", time_scale=1000)
    network, (x, t, _) = build_network(asked, (1, 8, 8), CLASSES).eval(), batch(shape=(1, 8, 8))
    label = torch.zeros(5, dtype=torch.int64)
    assert torch.equal(network(x, t, label), network.inner(x, 1000 * t, class_labels=label).sample)

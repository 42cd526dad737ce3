"""Networks of kind ``outside``: how user modules are called, found, saved and loaded."""

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
from kac.networks.cost import network_cost, training_memory
from kac.networks.velocity import NetworkModule
from kac.path import PathConfig
from kac.precision import Precision
from kac.util.errors import ArgumentError, CheckpointError
from pipeline.config import TeachSpec
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


# Calls


def test_the_velocity_is_that_of_the_module():
    network, (x, t, label) = built(), batch()
    assert torch.equal(network(x, t, label), network.inner(x, t, label))
    assert (network.null_label, network.takes) == (CLASSES, ())


def test_a_module_with_data_at_1_is_called_at_1_minus_t_and_negated():
    network, (x, t, label) = built(time="data_at_1"), batch()
    assert torch.equal(network(x, t, label), -network.inner(x, 1 - t, label))


def test_both_conventions_of_time_describe_the_same_path():
    """For x = (1 - t) data + t noise, dx/dt is noise - data in either convention."""

    class Straight(nn.Module):
        def __init__(self, data_at_1: bool) -> None:
            super().__init__()
            self.data_at_1 = data_at_1

        def forward(self, x, t, label):
            """Return the velocity for data of zeros: noise, where x = t noise (t reversed if ``data_at_1``)."""
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
def test_times_are_scaled_after_they_are_reversed(time: str):
    network, (x, t, label) = built(time=time, time_scale=1000), batch()
    sign, time_of_module = (1, t) if time == "data_at_0" else (-1, 1 - t)
    assert torch.equal(network(x, t, label), sign * network.inner(x, 1000 * time_of_module, label))


@pytest.mark.parametrize("t", [torch.tensor(0.3), torch.tensor([0.3]), torch.tensor(0.3, dtype=torch.float64)])
def test_the_module_gets_one_time_per_sample_in_single_precision(t: torch.Tensor):
    """``Field`` asserts the type and shape of its times."""
    network, (x, _, label) = built(), batch()
    assert torch.equal(network(x, t, label), network(x, torch.full((5,), 0.3), label))


def test_a_module_without_labels_is_called_without_labels():
    network, (x, t, label) = built("Blind", labels="none"), batch()
    assert torch.equal(network(x, t, label), x * t[:, None])
    assert torch.allclose(guide(network, 2.0, label)(x, t), x * t[:, None])


def test_guidance_of_a_module_without_a_null_label_is_refused():
    network, (x, t, _) = built(labels="without_null", arguments={"classes": CLASSES}), batch()
    label = torch.zeros(5, dtype=torch.int64)
    assert torch.equal(guide(network, 0.0, label)(x, t), network(x, t, label))
    for wrapped in (network, Precision(dtype="bfloat16", compile=False).wrap(network)):
        with pytest.raises(ArgumentError, match=r"`guidance`.*1\.5"):
            guide(wrapped, 1.5, label)
    teacher = teacher_config(config(labels="without_null"), PathConfig(), DataConfig(kind="moons"))
    with pytest.raises(ArgumentError, match=r"`guidance`.*1\.5"):
        check_guidance(teacher, (0.0, 1.5))
    check_guidance(teacher, (0.0,))


@pytest.mark.parametrize("kind", ["tensor", "tuple", "output"])
def test_a_velocity_may_be_in_a_tuple_or_an_attribute_sample(kind: str):
    x, t, label = batch()
    assert torch.equal(built("Returns", arguments={"kind": kind})(x, t, label), x)


@pytest.mark.parametrize(
    ("kind", "found"), [("flat", r"\[10\]"), ("nothing", "NoneType"), ("empty", "NoneType"), ("tensor", None)]
)
def test_an_output_that_is_not_a_velocity_is_refused(kind: str, found: str | None):
    network = built("Returns", arguments={"kind": kind})
    if found is None:
        try_out(network, config("Returns", arguments={"kind": kind}), (2,), CLASSES)
        return
    with pytest.raises(ArgumentError, match=rf"^`network.module` {HERE}:Returns .*{found}.*\[5, 2\]"):
        network(*batch())
    with pytest.raises(ArgumentError, match=r"`network\.module`"):
        try_out(network, config("Returns", arguments={"kind": kind}), (2,), CLASSES)


@pytest.mark.parametrize(
    ("kind", "found"),
    [("infinite", "NaN or infinity"), ("raises", "RuntimeError: broken module")],
)
def test_a_module_that_does_not_work_is_refused(kind: str, found: str):
    with pytest.raises(CheckpointError, match=found) as error:
        try_out(built("Returns", arguments={"kind": kind}), config("Returns", arguments={"kind": kind}), (2,), CLASSES)
    assert "\n" not in str(error.value)


def test_a_module_with_random_numbers_that_are_not_saved_is_refused():
    """Otherwise each process would load a different teacher."""
    for is_kept in (True, False):
        network_config = config("Fourier", arguments={"is_kept": is_kept})
        network = build_network(network_config, (2,), CLASSES)
        if is_kept:
            try_out(network, network_config, (2,), CLASSES)
        else:
            with pytest.raises(CheckpointError, match=r":Fourier .*buffers"):
                try_out(network, network_config, (2,), CLASSES)


# Import paths and options


@pytest.mark.parametrize("name", ["annotated", "annotated_late", "Field"])
def test_classes_and_annotated_functions_are_factories(name: str):
    network = built(name, shape=(4,), arguments={"size": 4})
    assert isinstance(network.inner, Field)
    assert network(*batch(shape=(4,))).shape == (5, 4)


@pytest.mark.parametrize(
    ("name", "arguments", "reason"),
    [
        ("nothing", {}, "has no attribute 'nothing'"),
        ("A_NUMBER", {}, "nn.Module"),
        ("Output", {}, "nn.Module"),
        ("not_annotated", {}, "nn.Module"),
        ("wrongly_annotated", {}, "str"),
        ("without_parameters", {}, "no parameters"),
        ("Field", {"depth": 3}, "TypeError: Field.__init__()"),
        ("Field", {"size": "big"}, "TypeError: "),
    ],
)
def test_a_bad_factory_is_refused_in_one_line(name: str, arguments: dict[str, Any], reason: str):
    message = refusal(name, arguments=arguments)
    assert message.startswith(f"`network.module` {HERE}:{name} ")
    assert reason in message


def test_a_module_that_is_not_installed_is_named():
    with pytest.raises(ArgumentError, match=r"^`network.module` no.such:net .*No module named 'no'"):
        build_network(OutsideConfig(module="no.such:net"), (2,), CLASSES)


def test_a_model_folder_can_call_only_factories_of_modules(tmp_path):
    """Otherwise the author of its config.json could run any function."""
    network = saved(tmp_path / "model")
    values = json.loads((tmp_path / "model" / "config.json").read_text())
    trap = tmp_path / "trap"
    values["network"] = {"kind": "outside", "module": "os:mkdir", "arguments": {"path": str(trap)}}
    (tmp_path / "model" / "config.json").write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match=r"config\.json.*`network\.module` os:mkdir .*nn.Module"):
        load_model(str(tmp_path / "model"))
    assert not trap.exists()
    assert isinstance(network, NetworkModule)


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("module", "no_colon", "package.module:factory"),
        ("conditions", ("end_time",), "end_time"),
        ("arguments", ("width",), "NAME=VALUE"),
        ("arguments", ("width=3", "width=4"), "width is given twice"),
        ("arguments", ("a-b=3",), "NAME=VALUE"),
        ("arguments", ("a=[1",), "JSON"),
        ("arguments", {"a": {1, 2}}, "numbers"),
        ("arguments", {"a": float("nan")}, "numbers"),
        ("time_scale", 0, "0"),
        ("labels", "some", "with_null"),
    ],
    ids=str,
)
def test_a_bad_option_is_refused(option: str, value: Any, message: str):
    with pytest.raises(ArgumentError, match=message) as error:
        OutsideConfig(**{"module": "a:b", option: value})
    assert error.value.name == option


def test_the_conditions_of_an_objective_are_refused():
    """A student's config is a copy of its teacher's, with other conditions. The copy is not validated."""
    student = config().model_copy(update={"conditions": ("end_time", "guidance")})
    with pytest.raises(ArgumentError, match="end_time, guidance") as error:
        build_network(student, (2,), CLASSES)
    assert error.value.name == "network.conditions"


def test_arguments_are_the_same_from_a_command_line_a_file_and_python(tmp_path):
    plain = {"size": 3, "levels": [1, 2], "rate": 0.001, "name": "abc", "on": True, "off": False, "none": None}
    words = ["size=3", "levels=(1,2)", "rate=1e-3", "name=abc", "on=true", "off=False", "none=null"]
    expected = config(arguments=plain)
    assert config(arguments=words) == expected
    command = ["--out", "o", "--network", "outside", "--network.module", f"{HERE}:Field"]
    assert parse(TeachSpec, [*command, "--network.arguments", *words], "prog").network == expected
    file = tmp_path / "options.yaml"
    file.write_text(json.dumps({"network": {"kind": "outside", "module": f"{HERE}:Field", "arguments": plain}}))
    assert parse(TeachSpec, ["--config", str(file), "--out", "o"], "prog").network == expected
    overridden = parse(
        TeachSpec, ["--config", str(file), "--out", "o", "--network.arguments", "size=4"], "prog"
    ).network
    assert overridden.arguments == {"size": 4}
    assert parse(TeachSpec, command, "prog").network.arguments == {}


def test_teaching_a_network_without_null_label_drops_no_labels():
    network = config(labels="without_null")
    with pytest.raises(ArgumentError, match=r"0\.1") as error:
        TeachSpec(out="o", network=network)
    assert error.value.name == "label_dropout"
    assert TeachSpec(out="o", network=network, label_dropout=0).network == network


# Model folders, cost, training


def saved(folder: Any, **options: Any) -> NetworkModule:
    network = built(**options)
    teacher = teacher_config(config(**options), PathConfig(), DataConfig(kind="moons"))
    save_model(str(folder), teacher, network.state_dict())
    return network


def test_a_loaded_model_equals_the_saved_module(tmp_path):
    network = saved(tmp_path / "model", arguments={"scale": 2.0}, time="data_at_1")
    network.inner.version.fill_(3)
    loaded, found = load_model(str(tmp_path / "model"))
    assert torch.equal(loaded(*batch()), network(*batch()))
    assert found.network == config(arguments={"scale": 2.0}, time="data_at_1")
    assert loaded.inner.version.item() == 7
    assert loaded.inner.version.dtype == torch.int64


def test_a_model_whose_module_is_missing_is_refused_in_one_line(tmp_path):
    saved(tmp_path / "model")
    file = tmp_path / "model" / "config.json"
    file.write_text(file.read_text().replace(f"{HERE}:Field", "gone.away:Field"))
    with pytest.raises(CheckpointError, match=r"config\.json.*`network\.module` gone\.away:Field "):
        load_model(str(tmp_path / "model"))


def test_the_cost_of_a_module_that_reads_values():
    cost = network_cost(config(), (2,), CLASSES)
    assert cost == (3 * 2 + 2 + 3 * 2, 2 * 3 * 2)


def test_attention_is_counted_on_the_cpu_too():
    places, channels = 64, 8
    projections = places * (channels + 3 * channels**2 + channels**2 + channels)
    attention = 2 * places**2 * channels
    assert training_memory(config("Attending"), (1, 8, 8), CLASSES).per_sample > 0
    cost = network_cost(config("Attending"), (1, 8, 8), CLASSES)
    assert cost.flops_per_call == 2 * (projections + attention)


def test_a_student_starts_from_the_module_and_every_parameter_gets_a_gradient():
    teacher, student = built(), build_network(config(), (2,), CLASSES)
    load_weights(student, teacher.state_dict())
    student.train()
    student(*batch()).square().sum().backward()
    assert torch.equal(student(*batch()), teacher(*batch()))
    assert all(parameter.grad is not None and bool(parameter.grad.any()) for parameter in student.parameters())


def test_weights_are_loaded_strictly_into_the_module():
    network, other = built(), built(arguments={"scale": 1.0})
    weights = {f"module.{name}": value + 1 for name, value in other.inner.state_dict().items()}
    adopted = adopt(network, config(), (2,), file_of(weights))
    assert adopted == ("module", f"weights of {HERE}:Field", "classes_and_null")
    assert torch.equal(network.inner.linear.weight, other.inner.linear.weight + 1)
    del weights["module.classes.weight"]
    with pytest.raises(CheckpointError, match=r":Field.* classes.weight is missing"):
        adopt(network, config(), (2,), file_of(weights))


def test_a_class_of_diffusers_can_be_the_module(tmp_path):
    """A class from an installed library needs no code of the user."""
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
    network_config = OutsideConfig(
        module="diffusers:UNet2DModel", arguments=arguments, labels="without_null", time_scale=1000
    )
    network, (x, t, _) = build_network(network_config, (1, 8, 8), CLASSES).eval(), batch(shape=(1, 8, 8))
    label = torch.zeros(5, dtype=torch.int64)
    assert torch.equal(network(x, t, label), network.inner(x, 1000 * t, class_labels=label).sample)

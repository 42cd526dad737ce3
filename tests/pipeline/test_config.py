"""Specs: every option has a description, and written fingerprints never change."""

from typing import Any

import pytest
from pydantic import BaseModel, create_model

from jobs.parsing import parse
from kac.path import FORMER_DEFAULTS, PathConfig
from kac.util.errors import ArgumentError
from kac.util.fingerprint import hashed_fields, hashed_values
from kac.util.options import Options, nested_models
from pipeline import config
from pipeline.benchmark import BenchmarkSpec
from pipeline.config import ConvertSpec, DistillSpec, EvaluateSpec, OptimizerConfig, RolloutSpec, Spec, TeachSpec
from pipeline.store import StoreIdentity

IDENTITY: dict[str, Any] = {
    "teacher_sha256": "t" * 64,
    "path": PathConfig(a=9, c=3, clock="linear"),
    "sample_shape": (1, 8, 8),
    "class_frequencies": (0.5, 0.5),
}

WRITTEN: dict[str, tuple[Any, str]] = {
    "teach": (
        TeachSpec(out="o", path=FORMER_DEFAULTS),
        "6489defee6af942208d7fb384f04d68b280ea99dffafd4bd485def9c1dca9efa",
    ),
    "teach, other options": (
        TeachSpec(
            out="o",
            data="moons",
            path={"kind": "kac", "a": 25.0, "c": 2.0, "clock": "quadratic"},
            network={"kind": "mlp", "width": 32, "depth": 1},
            optimizer={"updates": 10, "beta2": 0.95},
            label_dropout=0.2,
            seed=3,
        ),
        "ba04fd9ae77023cbf7f670b29e9ab4f57bd2aa02e06c5e007e2785c7841b40dc",
    ),
    "convert": (
        ConvertSpec(
            checkpoint="c",
            out="o",
            data="digits",
            path=FORMER_DEFAULTS,
            network={"kind": "outside", "module": "a:b", "arguments": {"width": 8}},
            key="ema",
        ),
        "aefacd6c1062954fdaf867f142f5a46d55b51d253fbb7f349be91648f2e76f64",
    ),
    "distill": (DistillSpec(store="s", out="o"), "eff105f6efb7a7bdb533782eaa24bf8803e33e75bfb54444ffac9384b338b988"),
    "distill, other options": (
        DistillSpec(store="s", out="o", steps=1, guidance=1.5, optimizer=OptimizerConfig()),
        "7877541f76781fccd6a0576bb202670becd4117cbc809e91fb91f28df802c277",
    ),
    "evaluate": (
        EvaluateSpec(teacher="t", out="o"),
        "24a670777623d9d1e8ccee397bdc2a7653a02a9c0b245057f364bd571031c67a",
    ),
    "store": (StoreIdentity(**IDENTITY), "3976d4d3a9ecff3dc2c33fc6bf72784c192ecc917762132bbcd13d69d5e301db"),
    "store, other options": (
        StoreIdentity(
            **{**IDENTITY, "path": PathConfig(kind="gaussian", a=9, c=3, clock="linear")},
            source="forward",
            knots=4,
            solver="heun",
            solver_steps=8,
            seed=7,
            shard_size=32,
            dtype="float16",
            precision={"dtype": "bfloat16"},
            data_sha256="d" * 64,
        ),
        "530b91491e311ccf31b782174e549dbb2c86176997a035959a5304c2503f5ff8",
    ),
}
"""Fingerprints of outputs that users keep. Changing a fingerprint would make these outputs unusable."""


@pytest.mark.parametrize("name", WRITTEN)
def test_a_fingerprint_that_was_written_never_changes(name: str):
    spec, written = WRITTEN[name]
    assert spec.fingerprint() == written


def test_neutral_values_never_change():
    """A default can change if the neutral value stays: ``Field(new, json_schema_extra={"neutral": old})``."""
    explicit = {
        "source": "trajectory",
        "knots": 20,
        "knot_grid": "uniform",
        "solver": "ab2",
        "solver_steps": 100,
        "time_factor": 1.0,
        "precision": {"dtype": "float32"},
        "seed": 0,
        "shard_size": 1024,
        "dtype": "float32",
    }
    assert hashed_values(StoreIdentity(**IDENTITY, **explicit)).keys() == IDENTITY.keys()
    teach = {
        "data": {"kind": "digits"},
        "path": {"kind": "kac", "a": 9.0, "c": 3.0, "signal": "linear", "clock": "linear"},
        "network": {"kind": "mlp", "conditions": (), "width": 192, "depth": 3},
        "optimizer": {
            "updates": 3000,
            "batch_size": 256,
            "learning_rate": 4e-3,
            "warmup_updates": 100,
            "beta2": 0.99,
            "weight_decay": 0.0,
            "max_gradient_norm": 1.0,
            "ema_decay": 0.999,
        },
        "precision": {"dtype": "float32"},
        "label_dropout": 0.1,
        "seed": 0,
    }
    assert hashed_values(TeachSpec(out="o", **teach)) == {}
    distill = {
        "guidance": 0.0,
        "steps": 4,
        "objective": {"kind": "endpoint"},
        "optimizer": {**teach["optimizer"], "updates": 2000, "learning_rate": 3e-3, "warmup_updates": 50},
        "precision": {"dtype": "float32"},
        "seed": 0,
    }
    assert hashed_values(DistillSpec(store="s", out="o", **distill)) == {}


def models() -> list[type[BaseModel]]:
    """Return all option models of the specs and of a store's identity."""
    exported = [value for value in vars(config).values() if isinstance(value, type) and issubclass(value, Options)]
    specs = [spec for spec in exported if spec is not Spec]
    nested = [model for spec in specs for field in spec.model_fields.values() for model in nested_models(field)]
    return list(dict.fromkeys([*specs, *nested, StoreIdentity, BenchmarkSpec]))


MINIMAL: dict[str, dict[str, Any]] = {
    "TeachSpec": {"out": "o"},
    "ConvertSpec": {"checkpoint": "c", "out": "o", "data": "digits"},
    "RolloutSpec": {"teacher": "t", "store": "s"},
    "DistillSpec": {"store": "s", "out": "o"},
    "StudentOptions": {"store": "s"},
    "SweepSpec": {"store": "s", "out": "o"},
    "TeachSweepSpec": {"out": "o"},
    "EvaluateSpec": {"teacher": "t", "out": "o"},
    "StudySpec": {"teacher": "t", "out": "o"},
    "SampleSpec": {"model": "m", "out": "o"},
    "ExportSpec": {"model": "m", "out": "o"},
    "QuickstartSpec": {"out": "o"},
    "OutsideConfig": {"module": "package:Class"},
    "StoreIdentity": IDENTITY,
}


@pytest.mark.parametrize("model", models(), ids=lambda model: model.__name__)
def test_a_new_option_changes_no_fingerprint(model: type[BaseModel]):
    values = MINIMAL.get(model.__name__, {})
    later = create_model(model.__name__, __base__=model, added_later=(float, 0.5))
    assert "added_later" in hashed_fields(later(**values))
    assert hashed_values(later(**values)) == hashed_values(model(**values))
    if hasattr(model, "fingerprint"):
        assert later(**values).fingerprint() == model(**values).fingerprint()
        assert later(**values, added_later=0.6).fingerprint() != model(**values).fingerprint()


def test_the_hashed_options_of_a_rollout_are_part_of_the_stores_identity():
    hashed = set(hashed_fields(RolloutSpec(teacher="t", store="s")))
    assert hashed == set(config.RolloutRecipe.model_fields)
    assert hashed < set(StoreIdentity.model_fields)


def test_every_field_of_every_spec_has_a_description():
    missing = [
        f"{model.__name__}.{name}"
        for model in models()
        for name, field in model.model_fields.items()
        if model is not StoreIdentity
        and not field.description
        and not (isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel))
    ]
    assert missing == []


def test_a_teacher_with_conditions_is_refused():
    with pytest.raises(ArgumentError) as error:
        TeachSpec(out="o", network={"kind": "mlp", "conditions": ("end_time",)})
    assert error.value.name == "network.conditions"


def test_a_gaussian_path_is_the_same_on_a_command_line_and_in_python():
    assert parse(TeachSpec, ["--path", "gaussian", "--out", "o"], "teach").path == PathConfig(kind="gaussian")

"""Model folders: saving and loading are exact, and every error names the file and the problem."""

import ast
import hashlib
import json
import pickle
import re
from pathlib import Path

import pytest
import safetensors.torch
import torch
from diffusers import DiTTransformer2DModel, UNet2DModel
from torch import Tensor, nn

import kac
from kac.model import (
    CONFIG_FILE,
    DIFFUSERS_WEIGHTS_FILE,
    SCHEMA_VERSION,
    WEIGHTS_FILE,
    ModelConfig,
    load_config,
    load_model,
    load_teacher_config,
    main_weights,
    save_model,
)
from kac.networks import DiTConfig, MLPConfig, NetworkConfig, NetworkModule, UNetConfig, build_network
from kac.path import PathConfig
from kac.util import files
from kac.util.errors import CheckpointError

ROOT = Path(kac.__file__).parents[1]


def config(**changes) -> ModelConfig:
    values = {
        "kind": "student",
        "network": MLPConfig(width=8, depth=2),
        "path": PathConfig(a=25, c=5, clock="quadratic"),
        "data": "digits",
        "data_sha256": "of the data",
        "sample_shape": (1, 4, 4),
        "num_classes": 3,
        "class_frequencies": (0.5, 0.25, 0.25),
        "steps": 4,
        "guidance": 1.5,
        "fingerprint": "of the spec",
        "teacher_sha256": "of the teacher",
        "store_fingerprint": "of the store",
    }
    return ModelConfig(**{**values, **changes})


def test_load_teacher_config_refuses_a_student(tmp_path):
    for kind in ("teacher", "student"):
        save_model(str(tmp_path / kind), config(kind=kind), network().state_dict())
    assert load_teacher_config(str(tmp_path / "teacher")).kind == "teacher"
    with pytest.raises(CheckpointError, match="student is a student, not a teacher"):
        load_teacher_config(str(tmp_path / "student"))


def network(seed: int = 0) -> torch.nn.Module:
    torch.manual_seed(seed)
    result = build_network(config().network, (1, 4, 4), 3)
    for parameter in result.parameters():
        torch.nn.init.normal_(parameter)
    return result


@pytest.fixture
def folder(tmp_path) -> Path:
    """A saved model."""
    save_model(str(tmp_path / "model"), config(), network().state_dict())
    return tmp_path / "model"


def refusal(folder: Path, *parts: str) -> None:
    """Check that loading fails with a one-line error that contains the folder and all parts."""
    with pytest.raises(CheckpointError) as error:
        load_model(str(folder))
    message = str(error.value)
    assert "\n" not in message
    for part in (str(folder), *parts):
        assert part in message, message


def rewrite(folder: Path, **changes) -> None:
    values = json.loads((folder / CONFIG_FILE).read_text())
    (folder / CONFIG_FILE).write_text(json.dumps({**values, **changes}))


def replace_weights(folder: Path, data: bytes) -> None:
    """Replace the weights, and update their sha256 in the config."""
    (folder / WEIGHTS_FILE).write_bytes(data)
    rewrite(folder, weights_sha256=hashlib.sha256(data).hexdigest())


# Saving and loading


def test_a_loaded_model_equals_the_saved_model_bit_for_bit(tmp_path):
    saved = network()
    written = save_model(str(tmp_path / "model"), config(), saved.state_dict())
    model = load_model(str(tmp_path / "model"))
    for (name, value), (loaded_name, loaded) in zip(
        saved.state_dict().items(), model.network.state_dict().items(), strict=True
    ):
        assert name == loaded_name
        assert torch.equal(value.view(torch.int32), loaded.view(torch.int32))
    x, t, label = torch.randn(3, 1, 4, 4), torch.rand(3), torch.arange(3)
    assert torch.equal(model.network(x, t, label), saved(x, t, label))
    assert model.config == written == config(weights_sha256=written.weights_sha256)
    assert model.config.path.build() == config().path.build()
    assert not model.network.training
    assert not any(p.requires_grad for p in model.network.parameters())


def test_special_values_are_preserved(tmp_path):
    weights = network().state_dict()
    special = torch.tensor([float("nan"), float("inf"), -float("inf"), -0.0, 1e-45, 3.4028235e38])
    weights["enter.bias"] = torch.cat([special, weights["enter.bias"][6:]])
    save_model(str(tmp_path), config(), weights)
    loaded = load_model(str(tmp_path)).network.state_dict()["enter.bias"]
    assert torch.equal(loaded.view(torch.int32), weights["enter.bias"].view(torch.int32))


def test_saved_weights_are_float32(tmp_path):
    save_model(str(tmp_path), config(), network().double().state_dict())
    assert {value.dtype for value in safetensors.torch.load_file(tmp_path / WEIGHTS_FILE).values()} == {torch.float32}


def test_folder_contains_safetensors_and_a_readable_config(folder):
    assert sorted(path.name for path in folder.iterdir()) == sorted([WEIGHTS_FILE, CONFIG_FILE])
    values = json.loads((folder / CONFIG_FILE).read_text())
    data = (folder / WEIGHTS_FILE).read_bytes()
    assert values["weights_sha256"] == hashlib.sha256(data).hexdigest()
    assert values["schema_version"] == SCHEMA_VERSION
    assert (values["kind"], values["steps"], values["guidance"]) == ("student", 4, 1.5)
    assert safetensors.torch.load(data).keys() == network().state_dict().keys()
    assert load_config(str(folder)).weights_sha256 == values["weights_sha256"]


def test_a_trailing_slash_in_the_path_is_ignored(folder):
    assert load_model(f"{folder}/").config == load_model(str(folder)).config


def test_config_is_written_last(tmp_path, monkeypatch):
    """An interrupted write leaves a folder without a model."""
    real, written = files.write_bytes, []

    def fail_at_second_write(path, data):
        if written:
            raise OSError("no space left")
        written.append(Path(path).name)
        return real(path, data)

    monkeypatch.setattr(files, "write_bytes", fail_at_second_write)
    with pytest.raises(OSError, match="no space left"):
        save_model(str(tmp_path), config(), network().state_dict())
    assert written == [WEIGHTS_FILE]
    refusal(tmp_path, CONFIG_FILE, "not a model folder")


def test_saving_again_replaces_the_model(folder):
    other = network(seed=2)
    save_model(str(folder), config(steps=2), other.state_dict())
    model = load_model(str(folder))
    assert model.config.steps == 2
    assert all(torch.equal(model.network.state_dict()[name], value) for name, value in other.state_dict().items())


@pytest.mark.parametrize("change", ["missing", "foreign", "shape"])
def test_refuses_to_save_the_weights_of_a_different_network(tmp_path, change):
    weights = network().state_dict()
    if change == "missing":
        weights.pop("enter.bias")
    elif change == "foreign":
        weights["head"] = torch.zeros(1)
    else:
        weights["enter.bias"] = torch.zeros(9)
    with pytest.raises(CheckpointError, match="do not match the network"):
        save_model(str(tmp_path / "model"), config(), weights)
    assert not (tmp_path / "model").exists()


# Model folders of diffusers networks, which diffusers can load without this project

UNET = UNetConfig(channels=(8, 16), blocks=1, groups=8)
DIT = DiTConfig(heads=2, head_channels=16, depth=2, patch=2)
IMAGES, CLASSES = (3, 16, 16), 3

backbones = pytest.mark.parametrize(
    "network_config",
    [
        UNET,
        UNetConfig(channels=(8, 16), blocks=1, groups=8, patch=2, time_scale=1),
        UNetConfig(channels=(8, 16), blocks=2, groups=4, attention=(16, 8), head_channels=8, dropout=0.1),
        UNetConfig(channels=(8, 16), blocks=1, groups=8, attention=(16,), scale_shift=True),
        DIT,
        DiTConfig(heads=1, head_channels=32, depth=1, patch=4, dropout=0.1, time_scale=1),
    ],
    ids=["unet", "unet patches", "unet attention", "unet scale shift", "dit", "dit patches"],
)


def backbone(network_config: NetworkConfig) -> NetworkModule:
    """Return a network in evaluation mode, with all weights changed from their initial values."""
    torch.manual_seed(0)
    result = build_network(network_config, IMAGES, CLASSES)
    with torch.no_grad():
        for parameter in result.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return result.eval()


def save_backbone(folder: Path, network_config: NetworkConfig, weights: dict[str, Tensor]) -> ModelConfig:
    model_config = config(network=network_config, sample_shape=IMAGES, num_classes=CLASSES)
    return save_model(str(folder), model_config, weights)


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    """Return images, times, and all labels including the null label."""
    generator = torch.Generator().manual_seed(1)
    t = torch.rand(CLASSES + 1, generator=generator)
    return torch.randn(CLASSES + 1, *IMAGES, generator=generator), t, torch.arange(CLASSES + 1)


def loaded_by_diffusers(folder: Path, network_config: NetworkConfig) -> tuple[nn.Module, dict[str, list[str]]]:
    """Load the model with diffusers. Return it and the names of the weights that did not fit."""
    kind, subfolder = (UNet2DModel, "unet") if network_config.kind == "unet" else (DiTTransformer2DModel, "transformer")
    return kind.from_pretrained(folder, subfolder=subfolder, output_loading_info=True)


@torch.no_grad()
def assert_same_velocity(actual: Tensor | nn.Module, network: nn.Module, **conditions: Tensor) -> None:
    """Compare up to rounding, because PyTorch may select different kernels without gradients."""
    velocity = actual(*inputs(), **conditions) if isinstance(actual, nn.Module) else actual
    torch.testing.assert_close(velocity, network(*inputs(), **conditions), rtol=1e-4, atol=1e-5)


def assert_same_weights(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    assert all(torch.equal(actual[name], value) for name, value in expected.items())


@torch.no_grad()
def velocity_by_diffusers(model: nn.Module, network_config: NetworkConfig) -> Tensor:
    """Compute the velocity as a user of diffusers would: scale times, and fold the U-Net's patches into channels."""
    (x, t, label), patch = inputs(), network_config.patch if network_config.kind == "unet" else 1
    folded = nn.functional.pixel_unshuffle(x, patch)
    velocity = model(folded, network_config.time_scale * t, class_labels=label).sample
    return nn.functional.pixel_shuffle(velocity, patch)


@backbones
def test_diffusers_loads_a_saved_model(tmp_path, network_config):
    saved = backbone(network_config)
    save_backbone(tmp_path, network_config, saved.state_dict())
    model, unfit = loaded_by_diffusers(tmp_path, network_config)
    assert not any(unfit.values()), unfit
    assert_same_weights(model.state_dict(), saved.get_submodule(saved.diffusers_name).state_dict())
    velocity = velocity_by_diffusers(model, network_config)
    assert_same_velocity(velocity, saved)
    assert velocity.abs().max() > 0.01
    assert len(torch.unique(velocity, dim=0)) == CLASSES + 1


@backbones
def test_a_loaded_diffusers_network_equals_the_saved_network(tmp_path, network_config):
    saved = backbone(network_config)
    written = save_backbone(tmp_path, network_config, saved.state_dict())
    model = load_model(str(tmp_path))
    assert model.config == written
    assert_same_weights(model.network.state_dict(), saved.state_dict())
    assert_same_velocity(model.network, saved)


@pytest.mark.parametrize("network_config", [MLPConfig(width=8, depth=1), UNET, DIT], ids=["mlp", "unet", "dit"])
def test_a_guide_is_saved_with_its_teacher(tmp_path, network_config):
    torch.manual_seed(0)
    saved, weaker = (build_network(network_config, IMAGES, CLASSES) for _ in range(2))
    for parameter in weaker.parameters():
        nn.init.normal_(parameter)
    guided = config(kind="teacher", network=network_config, sample_shape=IMAGES, num_classes=CLASSES, has_guide=True)
    weights = {**saved.state_dict(), **{f"guide.{name}": weight for name, weight in weaker.state_dict().items()}}
    written = save_model(str(tmp_path / "guided"), guided, weights)
    network = load_model(str(tmp_path / "guided")).network
    assert network.guide is not None
    assert_same_weights(main_weights(network), saved.state_dict())
    assert_same_weights(network.guide.state_dict(), weaker.state_dict())
    plain = save_model(str(tmp_path), guided.model_copy(update={"has_guide": False}), saved.state_dict())
    assert written.weights_sha256 != plain.weights_sha256  # stores and samples of the two teachers differ
    with pytest.raises(CheckpointError, match="names or shapes"):
        save_model(str(tmp_path), guided, saved.state_dict())


@pytest.mark.parametrize("network_config", [UNET, DIT], ids=["unet", "dit"])
def test_diffusers_ignores_conditions(tmp_path, network_config):
    """diffusers loads the network without its condition embeddings."""
    conditioned = network_config.model_copy(update={"conditions": ("end_time", "guidance")})
    saved = backbone(conditioned)
    save_backbone(tmp_path, conditioned, saved.state_dict())
    model, unfit = loaded_by_diffusers(tmp_path, network_config)
    unexpected = unfit.pop("unexpected_keys")
    assert not any(unfit.values()), unfit
    assert set(unexpected) == {name for name in saved.state_dict() if name.startswith("conditions.")} != set()
    plain = build_network(network_config, IMAGES, CLASSES).eval()
    plain.load_state_dict(saved.state_dict(), strict=False)
    assert_same_velocity(velocity_by_diffusers(model, network_config), plain)
    conditions = {"end_time": torch.tensor(0.2), "guidance": torch.tensor(1.5)}
    loaded = load_model(str(tmp_path)).network
    assert_same_velocity(loaded, saved, **conditions)
    assert not torch.allclose(loaded(*inputs(), **conditions), plain(*inputs()), rtol=0.01)


@pytest.mark.parametrize(("network_config", "subfolder"), [(UNET, "unet"), (DIT, "transformer")], ids=["unet", "dit"])
def test_a_diffusers_folder_has_the_file_names_of_diffusers(tmp_path, network_config, subfolder):
    save_backbone(tmp_path, network_config, backbone(network_config).state_dict())
    names = sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file())
    weights = f"{subfolder}/{DIFFUSERS_WEIGHTS_FILE}"
    assert names == sorted([CONFIG_FILE, f"{subfolder}/config.json", weights])
    with safetensors.safe_open(tmp_path / weights, "pt") as file:
        assert file.metadata()["format"] == "pt"
    data = bytearray((tmp_path / weights).read_bytes())
    assert load_config(str(tmp_path)).weights_sha256 == hashlib.sha256(data).hexdigest()
    data[-1] ^= 1
    (tmp_path / weights).write_bytes(data)
    refusal(tmp_path, weights, "damaged")
    (tmp_path / weights).unlink()
    refusal(tmp_path, weights, "has no")


def test_saved_weights_do_not_depend_on_the_memory_format(tmp_path):
    saved = backbone(UNET)
    written = [save_backbone(tmp_path / "a", UNET, saved.state_dict())]
    saved.to(memory_format=torch.channels_last)
    written.append(save_backbone(tmp_path / "b", UNET, saved.state_dict()))
    assert written[0].weights_sha256 == written[1].weights_sha256


@pytest.mark.parametrize("network_config", [UNET, DIT], ids=["unet", "dit"])
def test_folders_of_older_versions_with_one_weights_file_load(tmp_path, network_config):
    """Older versions wrote the weights of diffusers networks to one file, under this project's names."""
    saved = backbone(network_config)
    written = save_backbone(tmp_path, network_config, saved.state_dict())
    (tmp_path / (saved.diffusers_name or "") / DIFFUSERS_WEIGHTS_FILE).unlink()
    replace_weights(tmp_path, safetensors.torch.save(saved.state_dict()))
    model = load_model(str(tmp_path))
    assert model.config.weights_sha256 != written.weights_sha256
    assert_same_weights(model.network.state_dict(), saved.state_dict())


# Refusals


def test_refuses_a_missing_folder(tmp_path):
    refusal(tmp_path / "nowhere", CONFIG_FILE, "not a model folder")


def test_refuses_a_file_instead_of_a_folder(tmp_path):
    (tmp_path / "model").write_text("not a folder")
    refusal(tmp_path / "model", CONFIG_FILE, "not a model folder")


def test_refuses_a_folder_without_weights(folder):
    (folder / WEIGHTS_FILE).unlink()
    refusal(folder, WEIGHTS_FILE, "has no")


@pytest.mark.parametrize("name", [CONFIG_FILE, WEIGHTS_FILE])
def test_refuses_a_folder_instead_of_a_file(folder, name):
    (folder / name).unlink()
    (folder / name).mkdir()
    refusal(folder, name)


@pytest.mark.parametrize("position", [0.0, 0.5, 1.0], ids=["first byte", "middle", "last byte"])
def test_refuses_a_flipped_bit(folder, position):
    data = bytearray((folder / WEIGHTS_FILE).read_bytes())
    data[round(position * (len(data) - 1))] ^= 1
    (folder / WEIGHTS_FILE).write_bytes(data)
    refusal(folder, WEIGHTS_FILE, "sha256", hashlib.sha256(data).hexdigest()[:12], "damaged")


def test_refuses_truncated_weights(folder):
    (folder / WEIGHTS_FILE).write_bytes((folder / WEIGHTS_FILE).read_bytes()[:-1])
    refusal(folder, WEIGHTS_FILE, "damaged")


@pytest.mark.parametrize("raw", [b"", b"{", b"[1, 2]", b"null", b"\xff\xfe\x00", b'"text"'], ids=repr)
def test_refuses_a_config_that_is_not_a_json_object(folder, raw):
    (folder / CONFIG_FILE).write_bytes(raw)
    refusal(folder, CONFIG_FILE, "not a JSON object")


def test_refuses_the_config_of_another_project(folder):
    (folder / CONFIG_FILE).write_text(json.dumps({"model_type": "bert", "hidden_size": 768}))
    refusal(folder, CONFIG_FILE, "not a valid model config")


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"heads": 4}, "`heads`"),
        ({"kind": "critic"}, "`kind`"),
        ({"network": {"kind": "mlp", "width": 8, "depth": 2, "dropout": 0.1}}, "`network.dropout`"),
        ({"network": {"kind": "transformer"}}, "'transformer'"),
        ({"path": {"kind": "kac", "a": -9}}, "`path.a` is -9"),
        ({"num_classes": "many"}, "`num_classes`"),
        ({"num_classes": -3}, "-3"),
        ({"class_names": ["one", "two"]}, "`class_names`"),
        ({"sample_shape": [-4]}, "-4"),
    ],
    ids=str,
)
def test_refuses_invalid_config_values(folder, change, problem):
    rewrite(folder, **change)
    refusal(folder, CONFIG_FILE, problem)


def test_a_config_of_a_version_without_class_names_loads(folder):
    values = json.loads((folder / CONFIG_FILE).read_text())
    del values["class_names"]
    (folder / CONFIG_FILE).write_text(json.dumps(values))
    assert load_config(str(folder)).class_names == ()
    rewrite(folder, class_names=["a", "b", "c"])
    assert load_config(str(folder)).class_names == ("a", "b", "c")


@pytest.mark.parametrize("version", [SCHEMA_VERSION + 1, 99, "2", 2.0])
def test_refuses_a_newer_schema_version(folder, version):
    rewrite(folder, schema_version=version)
    refusal(folder, str(version), "version")


def test_a_newer_version_is_reported_before_its_unknown_fields(folder):
    rewrite(folder, schema_version=SCHEMA_VERSION + 1, new_field=True)
    refusal(folder, f"schema version {SCHEMA_VERSION + 1}", "newer distillkac")


@pytest.mark.parametrize(
    "change",
    [
        {"network": {"kind": "mlp", "width": 16, "depth": 2}},
        {"network": {"kind": "mlp", "width": 8, "depth": 3}},
        {"num_classes": 4},
        {"sample_shape": [1, 5, 5]},
    ],
    ids=str,
)
def test_refuses_weights_of_other_shapes(folder, change):
    rewrite(folder, **change)
    refusal(folder, WEIGHTS_FILE, "does not fit")


def test_refuses_weights_without_a_tensor(folder):
    weights = network().state_dict()
    weights.pop("enter.bias")
    replace_weights(folder, safetensors.torch.save(weights))
    refusal(folder, WEIGHTS_FILE, "does not fit", "enter.bias")


class Payload:
    """An object whose pickle runs code when it is loaded."""

    def __init__(self, target: Path):
        self.target = target

    def __reduce__(self):
        return Path.touch, (self.target,)


@pytest.mark.parametrize("write", [pickle.dump, torch.save])
def test_a_pickle_is_refused_and_not_run(folder, tmp_path, write):
    trap, bomb = tmp_path / "trap", tmp_path / "bomb"
    with bomb.open("wb") as file:
        write(Payload(trap), file)
    replace_weights(folder, bomb.read_bytes())
    refusal(folder, WEIGHTS_FILE, "does not fit")
    assert not trap.exists()
    pickle.loads(pickle.dumps(Payload(trap)))
    assert trap.exists()  # unpickling does create the file


# The project never unpickles

PICKLE_MODULES = {"pickle", "cPickle", "_pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"}


def is_constant(node: ast.expr | None, value: bool) -> bool:
    return isinstance(node, ast.Constant) and node.value is value


def unpickles(node: ast.AST) -> bool:
    """Detect imports of a pickle module, torch.load without weights_only=True, allow_pickle and read_pickle."""
    if isinstance(node, ast.Import):
        return any(PICKLE_MODULES & set(alias.name.split(".")) for alias in node.names)
    if isinstance(node, ast.ImportFrom):
        names = {*(node.module or "").split("."), *(alias.name for alias in node.names)}
        return bool(names & PICKLE_MODULES) or (node.module == "torch" and "load" in names)
    if not isinstance(node, ast.Call):
        return False
    name, keywords = ast.unparse(node.func), {keyword.arg: keyword.value for keyword in node.keywords}
    if name == "torch.load":
        return not is_constant(keywords.get("weights_only"), True)
    if re.search(r"pickle\.loads?$|\bread_pickle$|\bUnpickler$", name):
        return True
    return "allow_pickle" in keywords and not is_constant(keywords["allow_pickle"], False)


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from ray import cloudpickle",
        "import ray.cloudpickle as cp",
        "from torch import load",
        "torch.load(f)",
        "torch.load(f, weights_only=False)",
        "np.load(f, allow_pickle=True)",
        "ray.cloudpickle.loads(b)",
        "pd.read_pickle(f)",
    ],
)
def test_the_search_finds_unpickling(source):
    assert any(unpickles(node) for node in ast.walk(ast.parse(source)))


@pytest.mark.parametrize("source", ["torch.load(f, weights_only=True)", "json.load(f)", "safetensors.torch.load(b)"])
def test_the_search_ignores_safe_loading(source):
    assert not any(unpickles(node) for node in ast.walk(ast.parse(source)))


RESTRICTED = ROOT / "kac/data/published.py"  # its unpickler accepts only arrays: see tests/kac/data/test_bad_data.py


@pytest.mark.parametrize("package", ["kac", "pipeline", "jobs"])
def test_no_code_unpickles(package):
    sources = sorted(set((ROOT / package).rglob("*.py")) - {RESTRICTED})
    assert sources
    places = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path in sources
        for node in ast.walk(ast.parse(path.read_text()))
        if unpickles(node)
    ]
    assert not places


def test_models_with_equal_weights_and_different_options_have_different_identities(tmp_path):
    """Their samples differ, so a store of one of them must not be extended by the other."""
    free, bounded = (config(kind="teacher", network=MLPConfig(width=8, depth=2, bounded=b)) for b in (False, True))
    hashes = {
        save_model(str(tmp_path / str(n)), c, network().state_dict()).weights_sha256
        for n, c in enumerate((free, bounded))
    }
    assert len(hashes) == 2
    weights = backbone(UNET).state_dict()
    scales = [UNET.model_copy(update={"time_scale": scale}) for scale in (1.0, 1000.0)]
    saved = {save_backbone(tmp_path / f"scale-{n}", scaled, weights).weights_sha256 for n, scaled in enumerate(scales)}
    assert len(saved) == 2
    for number in (0, 1):
        assert_same_weights(load_model(str(tmp_path / str(number))).network.state_dict(), network().state_dict())

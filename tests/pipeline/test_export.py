"""Exports draw the images of ``Model.sample`` in software that does not have this project."""

import ast
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import huggingface_hub
import numpy as np
import pytest
import torch
import yaml
from diffusers.utils import dynamic_modules_utils

from kac.data import DataConfig, open_autoencoder
from kac.model import Model, load_model, save_model, teacher_config
from kac.networks import DiTConfig, MLPConfig, NetworkConfig, OutsideConfig, UNetConfig, build_network
from kac.networks.diffusers_model import DiffusersModelConfig
from kac.path import PathConfig
from kac.util.errors import ArgumentError, DistillKacError
from pipeline.config import ExportSpec
from pipeline.evaluate.scores import Record, Score
from pipeline.export.bundle import bundle
from pipeline.export.export_stage import export
from tests import autoencoders
from tests.kac.diffusers_folders import config_of, dit, unet

KAC, GAUSSIAN = PathConfig(), PathConfig(kind="gaussian")
MLP, DIT = MLPConfig(width=16, depth=1), DiTConfig(heads=2, head_channels=8, depth=2)
UNET = UNetConfig(channels=(8, 16), blocks=1, groups=8, attention=(4,), patch=2)
BOTH = ("end_time", "guidance")
CONVERTED = {
    kind: DiffusersModelConfig(
        model=config_of(model), scheduler=config_of(diffusers.DDPMScheduler(prediction_type=kind)), labels="with_null"
    )
    for kind, model in (("epsilon", unet(classes=11)), ("v_prediction", dit(classes=10)))
}
ANY_STEP: dict[str, Any] = {"kind": "student", "steps": 2, "guidance": 0.5}


def make_model(
    folder: Path,
    network: NetworkConfig = MLP,
    path: PathConfig = KAC,
    data: str | DataConfig = "digits",
    std: float = 0.2,
    **fields: Any,
) -> str:
    """Write a model folder with random weights of the given standard deviation. Return its path."""
    data = DataConfig(kind=data) if isinstance(data, str) else data
    config = teacher_config(network, path, data).model_copy(update={"fingerprint": "f", **fields})
    torch.manual_seed(0)
    made = build_network(network, config.sample_shape, config.num_classes, path.build())
    if config.has_guide:
        made.guide = build_network(network, config.sample_shape, config.num_classes, path.build())
    for weight in made.parameters():
        torch.nn.init.normal_(weight, std=std)
    save_model(str(folder / "model"), config, made.state_dict())
    return str(folder / "model")


@pytest.fixture
def exported(tmp_path: Path) -> Callable[..., tuple[Path, Model]]:
    """Make and export a model. Return the folder of the export, and the model."""

    def make(*arguments: Any, options: dict[str, Any] | None = None, **fields: Any) -> tuple[Path, Model]:
        model, out = make_model(tmp_path, *arguments, **fields), tmp_path / "export"
        export(ExportSpec(model=model, out=str(out), **{"samples": 0, **(options or {})}))
        return out, load_model(model)

    return make


@pytest.fixture
def load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], Any]:
    """Load an exported pipeline."""
    monkeypatch.setattr(dynamic_modules_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))

    def pipeline(folder: Path, **options: Any) -> Any:
        loaded = diffusers.DiffusionPipeline.from_pretrained(folder, trust_remote_code=True, **options)
        loaded.set_progress_bar_config(disable=True)
        return loaded

    return pipeline


def seed(number: int) -> torch.Generator:
    return torch.Generator().manual_seed(number)


def with_conditions(network: NetworkConfig, *conditions: str) -> NetworkConfig:
    return network.model_copy(update={"conditions": conditions})


SAME_IMAGES: dict[str, tuple[tuple[Any, ...], dict[str, Any], list[dict[str, Any]]]] = {
    "any-step MLP": ((with_conditions(MLP, "end_time"),), ANY_STEP, [{"steps": n} for n in (1, 2, 4)]),
    "any-step MLP, any guidance": (
        (with_conditions(MLP, *BOTH),),
        {**ANY_STEP, "guidance_scales": (0.0, 1.0)},
        [{"steps": n, "guidance": 0.7} for n in (1, 2, 4)] + [{}],
    ),
    "any-step U-Net on patches, any guidance": (
        (with_conditions(UNET, *BOTH),),
        {**ANY_STEP, "guidance_scales": (0.0, 1.0)},
        [{"steps": n, "guidance": 0.7} for n in (1, 2, 4)],
    ),
    "any-step U-Net, Gaussian path": (
        (with_conditions(UNET.model_copy(update={"patch": 1}), "end_time"), GAUSSIAN),
        ANY_STEP,
        [{"steps": n} for n in (1, 2, 4)],
    ),
    "any-step DiT, quadratic grid": (
        (with_conditions(DIT, "end_time"),),
        {**ANY_STEP, "knot_grid": "quadratic"},
        [{"steps": n} for n in (1, 2, 4)],
    ),
    "fixed-step student": ((UNET,), {**ANY_STEP, "steps": 4}, [{}, {"steps": 4}]),
    "teacher": ((MLP, GAUSSIAN), {}, [{}, {"guidance": 1.5}, {"steps": 3, "guidance": 0.5}]),
    "DiT teacher": ((DIT,), {}, [{"steps": 5, "guidance": 1.0}]),
    "bounded teacher with a guide": (
        (UNET.model_copy(update={"bounded": True}),),
        {"has_guide": True},
        [{"steps": 5, "guidance": 1.0}],
    ),
    "unconditional teacher": ((MLP,), {"conditioning": "none"}, [{"steps": 5}]),
    "any-step converted U-Net": (
        (CONVERTED["epsilon"].for_student(BOTH, False), GAUSSIAN),
        {**ANY_STEP, "guidance_scales": (0.0, 1.0), "std": 0.05},
        [{"steps": n, "guidance": 0.7} for n in (1, 2, 4)],
    ),
    "converted DiT teacher": ((CONVERTED["v_prediction"], GAUSSIAN), {}, [{"steps": 5, "guidance": 1.0}]),
    "points": ((MLP,), {"data": "moons"}, [{"steps": 5}]),
}


@pytest.mark.parametrize("case", SAME_IMAGES)
def test_a_pipeline_draws_the_images_of_the_model(case: str, exported: Any, load: Any):
    arguments, fields, requests = SAME_IMAGES[case]
    folder, model = exported(*arguments, **fields)
    pipeline = load(folder)
    for request in requests:
        options = {"num_inference_steps": request.get("steps"), "guidance": request.get("guidance")}
        images = pipeline(batch_size=5, generator=seed(7), output_type="pt", **options).images
        expected = model.sample(5, seed=7, **request).images
        assert torch.allclose(images, expected, atol=1e-5)
        assert expected.std() > 0.1
        if model.config.conditioning != "none":
            images = pipeline(class_labels=[1, 0], batch_size=3, generator=seed(7), output_type="pt", **options).images
            assert torch.allclose(images, model.sample(3, labels=[1, 0], seed=7, **request).images, atol=1e-5)
    if case.startswith("any-step"):
        images = [pipeline(batch_size=5, num_inference_steps=n, generator=seed(7), output_type="pt")[0] for n in (1, 4)]
        assert not torch.allclose(*images, atol=0.02), "the number of steps matters"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_converted_model_samples_in_half_precision(dtype: torch.dtype, exported: Any, load: Any):
    network = CONVERTED["v_prediction"].for_student(BOTH, False)
    folder, model = exported(network, GAUSSIAN, guidance_scales=(0.0, 1.0), std=0.05, **ANY_STEP)
    images = load(folder, torch_dtype=dtype)(batch_size=3, generator=seed(7), output_type="pt").images
    assert (images - model.sample(3, seed=7).images).abs().mean() < 0.02


def test_a_model_in_latents_is_exported_with_its_autoencoder(tmp_path: Path, load: Any):
    data = DataConfig(kind="digits", autoencoder=autoencoders.write(tmp_path / "autoencoder"))
    model = make_model(tmp_path, with_conditions(MLP, "end_time"), data=data, **ANY_STEP)
    spec = ExportSpec(model=model, out=str(tmp_path / "export"), samples=0)
    export(spec)
    images = load(tmp_path / "export")(batch_size=3, generator=seed(7), output_type="pt").images
    assert images.shape == (3, 1, 8, 8)
    assert torch.allclose(images, load_model(model).sample(3, seed=7).images, atol=1e-5)
    assert str(tmp_path) not in (tmp_path / "export/README.md").read_text()
    autoencoders.write(tmp_path / "autoencoder", seed=1)
    open_autoencoder.cache_clear()
    with pytest.raises(DistillKacError, match="has changed"):
        export(spec.model_copy(update={"out": str(tmp_path / "other")}))


WITHOUT_PROJECT = """
    import importlib.abc, json, sys
    import numpy as np

    class Block(importlib.abc.MetaPathFinder):
        def find_spec(self, name, path=None, target=None):
            if name.split(".")[0] in {"kac", "pipeline", "jobs", "pydantic", "ray", "mlflow"}:
                raise ImportError(f"{name} is blocked")

    sys.meta_path.insert(0, Block())
    import diffusers, torch
    for folder in sys.argv[1:]:
        pipeline = diffusers.DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
        for steps in (1, 2, 4):
            options = {"class_labels": [3, 1, 4], "num_inference_steps": steps}
            made = {
                kind: pipeline(**options, generator=torch.Generator().manual_seed(5), output_type=kind).images
                for kind in ("pt", "np", "pil")
            }
            pil = np.stack([np.asarray(image) for image in made["pil"]])
            np.savez(f"{folder}/{steps}.npz", pt=made["pt"].numpy(), np=made["np"], pil=pil)
    assert not {"kac", "pipeline", "jobs"} & {*sys.modules}
"""


def test_a_process_without_this_project_draws_the_same_images(tmp_path: Path):
    fields = {**ANY_STEP, "guidance_scales": (0.0, 1.0)}
    models = {}
    for name, network in (("mlp", MLP), ("unet", UNET), ("dit", DIT)):
        (tmp_path / name).mkdir()
        model = make_model(tmp_path / name, with_conditions(network, *BOTH), **fields)
        export(ExportSpec(model=model, out=str(tmp_path / name / "export"), samples=0))
        models[str(shutil.move(tmp_path / name / "export", tmp_path / f"moved-{name}"))] = load_model(model)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    subprocess.run(
        [sys.executable, "-c", textwrap.dedent(WITHOUT_PROJECT), *models],
        cwd=tmp_path,
        env={**environment, "HF_HOME": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"},
        check=True,
    )
    for folder, model in models.items():
        for steps in (1, 2, 4):
            expected = model.sample(3, steps=steps, labels=[3, 1, 4], seed=5).images.numpy()
            with np.load(f"{folder}/{steps}.npz") as made:
                np.testing.assert_allclose(made["pt"], expected, atol=1e-5)
                np.testing.assert_allclose(made["np"], np.moveaxis(expected, 1, -1) / 2 + 0.5, atol=1e-6)
                np.testing.assert_array_equal(made["pil"], np.rint(expected[:, 0] * 127.5 + 127.5))


def test_diffusers_alone_loads_the_model_in_the_folder(exported: Any):
    for network, load, part in (
        (UNET, diffusers.UNet2DModel.from_pretrained, "unet"),
        (DIT, diffusers.DiTTransformer2DModel.from_pretrained, "transformer"),
    ):
        folder, model = exported(network)
        loaded, x = load(folder, subfolder=part), torch.randn(2, 1, 8, 8)
        t, label = torch.tensor([0.2, 0.9]), torch.tensor([3, 10])
        folded = torch.nn.functional.pixel_unshuffle(x, 2) if part == "unet" else x
        made = loaded(folded, 1000 * t, label).sample
        made = torch.nn.functional.pixel_shuffle(made, 2) if part == "unet" else made
        assert torch.allclose(made, model.network(x, t, label), atol=1e-6)
        assert not [*folder.rglob("*.bin"), *folder.rglob("*.pt")]
        shutil.rmtree(folder)


def test_the_next_call_of_a_generator_continues_with_the_next_images(exported: Any, load: Any):
    folder, model = exported()
    pipeline, generator = load(folder), seed(3)
    options = {"num_inference_steps": 2, "generator": generator, "output_type": "pt"}
    parts = [pipeline(batch_size=count, **options).images for count in (2, 3)]
    expected = model.sample(5, steps=2, seed=3).images
    assert torch.allclose(torch.cat(parts), expected, atol=1e-5)
    generator.manual_seed(3)
    assert torch.allclose(pipeline(batch_size=2, **options).images, expected[:2], atol=1e-5)
    torch.manual_seed(0)
    first, second = (pipeline(num_inference_steps=1, output_type="pt").images for _ in range(2))
    assert not torch.equal(first, second)


def test_classes_have_names_and_bad_requests_are_refused(exported: Any, load: Any):
    names = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
    folder, model = exported(UNET, class_names=names, **{**ANY_STEP, "steps": 2})
    pipeline = load(folder)
    images = pipeline("three", generator=seed(0), output_type="pt").images
    assert torch.allclose(images, model.sample(1, labels=[3]).images, atol=1e-5)
    assert pipeline(["one", 2])[0][1].size == (8, 8)
    assert isinstance(pipeline(1, return_dict=False), tuple)
    for request, problem in (
        ({"class_labels": "ten"}, "'ten' is not a class"),
        ({"class_labels": [10]}, "'10' is not a class"),
        ({"num_inference_steps": 3}, "works only with 2"),
        ({"guidance": 2.0}, r"trained on \[0.5\]"),
        ({"output_type": "latent"}, "'latent'. Choose pil or np or pt"),
    ):
        with pytest.raises(ValueError, match=problem):
            pipeline(**request)
    with pytest.raises(ValueError, match="trust_remote_code"):
        diffusers.DiffusionPipeline.from_pretrained(folder)


@pytest.mark.parametrize("name", ["KacPipeline", "KacMLP", "KacConditions", "initial_noise"])
def test_a_bundle_imports_only_public_packages(name: str):
    nodes = list(ast.walk(ast.parse(bundle("pipeline.export.kac_pipeline", name))))
    modules = {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
    modules |= {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    packages = {str(module).partition(".")[0] for module in modules}
    assert packages - sys.stdlib_module_names <= {"torch", "numpy", "diffusers"}


# Programs


@pytest.mark.parametrize(
    "network",
    [MLP, UNET.model_copy(update={"patch": 1}), DIT, CONVERTED["epsilon"]],
    ids=lambda network: network.kind,
)
@pytest.mark.parametrize("ending", ["pt2", "onnx"])
def test_a_program_computes_the_velocity_for_any_batch_size(ending: str, network: NetworkConfig, exported: Any):
    network, std = network.for_student(BOTH, False), 0.05 if network.kind == "diffusers" else 0.1
    folder, model = exported(network, std=std, options={"format": ending}, **ANY_STEP)
    if ending == "pt2":
        program = torch.export.load(folder / "network.pt2").module()
    else:
        session = pytest.importorskip("onnxruntime").InferenceSession(folder / "network.onnx")
        assert session.get_inputs()[0].shape == ["batch", 1, 8, 8]
    for batch in (1, 5, 70):
        times = {name: torch.rand(batch) for name in ("t", *BOTH)}
        inputs = {"x": torch.randn(batch, 1, 8, 8), "label": torch.arange(batch) % 11, **times}
        if ending == "pt2":
            made = program(**inputs)
        else:
            made = torch.from_numpy(session.run(None, {name: value.numpy() for name, value in inputs.items()})[0])
        assert torch.allclose(made, model.network(**inputs), atol=1e-4)
        assert made.std() > 0.01


def test_the_cards_snippet_of_a_program_runs(exported: Any, tmp_path: Path):
    folder, model = exported(options={"format": "pt2"}, has_guide=True)
    assert (folder / "guide.pt2").exists()
    snippet = (folder / "README.md").read_text().split("```python\n")[1].split("```")[0]
    code = f"{snippet}\nnp.save('x.npy', x)"
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    subprocess.run([sys.executable, "-c", code], cwd=folder, env=environment, check=True)
    expected = model.sample(4, steps=1, labels=[0]).images.numpy()
    np.testing.assert_allclose(np.load(folder / "x.npy").clip(-1, 1), expected, atol=1 / 255 + 1e-5)


@pytest.mark.parametrize(
    ("fields", "label", "accepted"),
    [
        ({"kind": "student", "steps": 1, "guidance": 0.0, "conditioning": "classes"}, 0, "0 to 9: a class;"),
        ({}, 0, '0 to 9: a class, 10: "no class";'),
        ({"conditioning": "none"}, 10, '10: "no class";'),
    ],
    ids=["student", "teacher", "unconditional"],
)
def test_the_card_of_a_program_names_the_labels_of_the_model(fields: Any, label: int, accepted: str, exported: Any):
    folder, _ = exported(options={"format": "pt2"}, **fields)
    text = (folder / "README.md").read_text()
    assert f"np.full(4, {label})" in text and f"`label` [batch] int64, {accepted}" in text


# The model card, the stage and the upload


def test_the_card_describes_the_model_its_training_and_its_scores(exported: Any, tmp_path: Path):
    make_model(tmp_path)
    (tmp_path / "model" / "spec.json").write_text(json.dumps({"identity": {"optimizer": {"updates": 77}}}))
    score = {"steps": None, "guidance": None, "count": 500, "fingerprint": "data"}
    values: list[dict[str, Any]] = [
        {**score, "name": "real images", "kind": "real", "metrics": {"pixels/frechet": 0.25}},
        {**score, "name": "other", "kind": "teacher", "metrics": {"pixels/frechet": 0.5}},
        {**score, "name": "ours", "kind": "teacher", "metrics": {"pixels/frechet": 0.75}, "fingerprint": "f"},
    ]
    real = {"kind": "digits", "train": 1442, "held_out": 355, "sha256": "abc"}
    record = {"fingerprint": "e", "samples": 500, "seeds": (1,), "features": ("pixels",), "facts": {}, "real": real}
    scores = tuple(Score(**each) for each in values)
    record = Record(**record, floor_count=None, kept_rows=500, scores=scores)
    (tmp_path / "evaluation").mkdir()
    (tmp_path / "evaluation" / "evaluation.json").write_text(record.model_dump_json())
    options = {"evaluation": str(tmp_path / "evaluation"), "license": "mit", "samples": 3}
    folder, _ = exported(options=options)
    card = (folder / "README.md").read_text()
    front = yaml.safe_load(card.split("---\n")[1])
    assert (front["library_name"], front["license"]) == ("diffusers", "mit")
    assert "optimizer.updates: 77" in card
    assert "kac a=25 c=5" in card
    assert "| real images |" in card
    assert "| ours |" in card
    assert "| other |" not in card
    assert "500 delivered samples" in card
    assert str(tmp_path) not in card
    assert (folder / "samples.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(DistillKacError, match="belongs to another spec"):
        exported(options={**options, "evaluation": None})
    with pytest.raises(ArgumentError, match=r"`evaluation`.*no scores"):
        exported(fingerprint="g", options=options)


def test_an_export_is_written_once(exported: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    folder, _ = exported()
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    exported()
    assert "is complete: nothing to do" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before
    for change in ({"options": {"license": "mit"}}, {"options": {"format": "pt2"}}):
        with pytest.raises(DistillKacError, match="belongs to another spec"):
            exported(**change)
    (folder / "export.json").unlink()
    (folder / "pipeline.py").write_text("")
    exported()
    assert "KacPipeline" in (folder / "pipeline.py").read_text()
    assert not (folder / "claim.json").exists()


def test_bad_input_is_refused_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def refusal(**options: Any) -> str:
        with pytest.raises(DistillKacError) as error:
            export(ExportSpec(**{"model": model, "out": str(tmp_path / "out"), **options}))
        assert "\n" not in str(error.value)
        assert not (tmp_path / "out").exists()
        return str(error.value)

    model = make_model(tmp_path)
    assert "no/such" in refusal(model="no/such")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "letter.txt").write_text("x")
    assert "not empty" in refusal(out=str(tmp_path / "full"))
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["letter.txt"]
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "onnxscript" else find(name))
    assert "distillkac[onnx]" in refusal(format="onnx")
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    assert "HF_TOKEN" in refusal(push_to_hub="me/model")
    assert "`push_to_hub`" in refusal(push_to_hub="no repository")
    values = json.loads((tmp_path / "model" / "config.json").read_text())
    values["network"] = OutsideConfig(module="tests.kac.outside_modules:Field").model_dump(mode="json")
    (tmp_path / "model" / "config.json").write_text(json.dumps(values))
    assert "outside" in refusal()


def test_a_folder_is_uploaded_to_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The test replaces the two methods of ``HfApi`` that send requests."""
    uploads: list[dict[str, Any]] = []
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "token")
    hub = huggingface_hub.HfApi
    monkeypatch.setattr(hub, "create_repo", lambda self, name, **options: uploads.append({name: options}))
    monkeypatch.setattr(hub, "upload_folder", lambda self, **options: uploads.append(options))
    spec = ExportSpec(model=make_model(tmp_path), out=str(tmp_path / "out"), push_to_hub="me/model", samples=0)
    export(spec)
    ignored = ["export.json", "spec.json", "claim.json"]
    sent = {"repo_id": "me/model", "folder_path": str(tmp_path / "out"), "ignore_patterns": ignored}
    assert uploads == [{"me/model": {"exist_ok": True}}, sent]
    export(spec)
    assert len(uploads) == 4, "a complete export is uploaded again"

    def fail(self: Any, **options: Any) -> None:
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr(hub, "upload_folder", fail)
    with pytest.raises(DistillKacError, match=r"me/model failed .no route to host"):
        export(spec)

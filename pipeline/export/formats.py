"""Write a model into a local folder as a diffusers pipeline, or as a program of torch.export or ONNX."""

import json
import logging
import warnings
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import Tensor, nn

from kac.data import open_autoencoder
from kac.model import Model, decoder_of, main_weights
from kac.networks import NetworkModule
from pipeline.export.bundle import bundle
from pipeline.export.kac_pipeline import KacConditions, KacMLP, KacPipeline

KINDS = ("mlp", "unet", "dit", "diffusers")
"""The kinds of networks that ``component`` makes and ``kac_pipeline.VELOCITIES`` calls."""


def write_pipeline(folder: Path, model: Model) -> None:
    """Write model_index.json, pipeline.py, and one folder per component with its weights as safetensors."""
    config, network = model.config, model.network
    euler = "FlowMatchEuler" if config.kind == "teacher" else "FlowMapEuler"
    parts: dict[str, Any] = {"scheduler": getattr(diffusers, f"{euler}DiscreteScheduler")()}
    parts[network.diffusers_name or "network"] = component(network, model)
    if network.guide is not None:
        parts["guide"] = component(network.guide, model)
    if network.diffusers_name and network.takes:
        parts["conditions"] = KacConditions(network.takes, network.width)
        parts["conditions"].embedding.load_state_dict(network.conditions.state_dict())  # type: ignore[union-attr]
    if config.data.autoencoder:
        decoder_of(config)  # checks that the autoencoder is the model's
        parts["vae"] = open_autoencoder(config.data.autoencoder).network
    index: dict[str, Any] = {"_class_name": ["pipeline", "KacPipeline"], "_diffusers_version": diffusers.__version__}
    for name, part in parts.items():
        part.save_pretrained(folder / name)
        module, class_name = type(part).__module__, type(part).__name__
        index[name] = [module.partition(".")[0], class_name]
        if module == KacPipeline.__module__:
            index[name][0] = f"distillkac_{class_name.lower()}"
            (folder / name / f"{index[name][0]}.py").write_text(bundle(module, class_name))
    settings = config.model_dump(mode="json", exclude={"data"})  # it contains paths
    settings |= {"is_any_step": config.is_any_step, "takes_guidance": config.takes_guidance}
    settings["network"]["has_null_label"] = config.network.has_null_label
    (folder / "pipeline.py").write_text(bundle(KacPipeline.__module__, KacPipeline.__name__))
    (folder / "model_index.json").write_text(json.dumps({**index, "settings": settings}, indent=2))


def component(network: NetworkModule, model: Model) -> Any:
    """Return the component with a network's weights."""
    if network.diffusers_name:
        return network.get_submodule(network.diffusers_name)
    mlp = KacMLP(model.config.network.model_dump(mode="json"), model.config.sample_shape, model.config.num_classes)
    mlp.network.load_state_dict(main_weights(network))
    return mlp


def write_programs(folder: Path, model: Model, ending: str) -> None:
    """Write network.pt2 or network.onnx, also of the guide if there is one, and noise.py, which draws the noise."""
    inputs = {"x": torch.zeros(2, *model.config.sample_shape), "t": torch.ones(2), "label": torch.zeros(2).long()}
    inputs |= {each: torch.ones(2) for each in model.network.takes}
    # Above 63 images, diffusers calls contiguous(), which changes no value: a program for 63 works for any number.
    shapes = {each: {0: torch.export.Dim("batch", min=1, max=63)} for each in inputs}
    for name, network in (("network", model.network), ("guide", model.network.guide)):
        if network is None:
            continue
        program = torch.export.export(_Velocity(network).eval(), (), inputs, dynamic_shapes=shapes)
        program.range_constraints.clear()
        if ending == "pt2":
            torch.export.save(program, folder / f"{name}.pt2")
            continue
        logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # otherwise it reports that torchvision is missing
        axes = {each: {0: "batch"} if each == "x" else None for each in inputs}
        with warnings.catch_warnings(action="ignore"):
            onnx: Any = torch.onnx.export(program, output_names=["velocity"], dynamic_shapes=axes, verbose=False)
        onnx.save(folder / f"{name}.onnx")
    (folder / "noise.py").write_text(bundle(KacPipeline.__module__, "initial_noise"))


class _Velocity(nn.Module):
    """A network with an argument for each condition, because programs have no ``**conditions``."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor, t: Tensor, label: Tensor, end_time: Any = None, guidance: Any = None) -> Tensor:
        given = {"end_time": end_time, "guidance": guidance}
        return self.network(x, t, label, **{name: value for name, value in given.items() if value is not None})  # type: ignore[no-any-return]

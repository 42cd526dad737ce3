"""Write a model as a diffusers pipeline: model_index.json, pipeline.py, and one folder per component."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import torch

from kac.model import Model, ModelConfig, main_weights
from kac.networks import NetworkModule
from kac.util.errors import DistillKacError
from pipeline.export.bundle import bundle
from pipeline.export.components import KacConditions, KacMLP

MODEL_FIELDS = {
    *("kind", "path", "sample_shape", "num_classes", "class_frequencies", "class_names", "conditioning", "steps"),
    *("knot_grid", "guidance", "guidance_scales", "has_guide", "is_any_step", "takes_guidance"),
}
"""The fields and properties of ``ModelConfig`` that the pipeline's settings contain."""


def write_pipeline(folder: Path, model: Model) -> None:
    """Write the pipeline into a local folder, with all weights as safetensors."""
    config, network = model.config, model.network
    euler = diffusers.FlowMatchEulerDiscreteScheduler if config.kind == "teacher" else None
    components: dict[str, Any] = {"scheduler": (euler or diffusers.FlowMapEulerDiscreteScheduler)()}
    components[network.diffusers_name or "network"] = COMPONENTS[config.network.kind](network, config)
    if network.guide is not None:
        components["guide"] = COMPONENTS[config.network.kind](network.guide, config)
    if network.diffusers_name and network.takes:
        components["conditions"] = KacConditions(list(network.takes), network.width)
        components["conditions"].embedding.load_state_dict(network.conditions.state_dict())  # type: ignore[union-attr]
    index: dict[str, Any] = {"_class_name": ["pipeline", "KacPipeline"], "_diffusers_version": diffusers.__version__}
    for name, component in components.items():
        component.save_pretrained(folder / name)
        module, class_name = type(component).__module__, type(component).__name__
        index[name] = [module.split(".")[0], class_name]
        if module == KacMLP.__module__:
            index[name][0] = f"distillkac_{class_name.lower()}"  # the file is not shared with other pipelines
            (folder / name / f"{index[name][0]}.py").write_text(bundle(module, class_name))
    (folder / "pipeline.py").write_text(bundle("pipeline.export.kac_pipeline", "KacPipeline"))
    (folder / "model_index.json").write_text(json.dumps({**index, "settings": _settings(config)}, indent=2))


def draw(folder: Path, count: int, device: torch.device) -> torch.Tensor:
    """Load the pipeline in ``folder`` and draw the first images of seed 0: [count, *sample_shape], delivered."""
    pipeline = diffusers.DiffusionPipeline.from_pretrained(folder, trust_remote_code=True).to(device)
    pipeline.set_progress_bar_config(disable=True)
    images: torch.Tensor = pipeline(
        batch_size=count, generator=torch.Generator().manual_seed(0), output_type="pt"
    ).images
    return images


def check(images: torch.Tensor, model: Model) -> None:
    """Raise ``DistillKacError`` unless the pipeline's ``images`` are those of ``Model.sample``, up to rounding."""
    difference = (images - model.sample(len(images)).images).abs()
    if not difference.mean() < 0.01:
        raise DistillKacError(
            f"The exported pipeline draws other images than the model (mean difference {difference.mean():.3g}). Use "
            f"another version of diffusers than {diffusers.__version__}."
        )


def _settings(config: ModelConfig) -> dict[str, Any]:
    network: Any = config.network
    values = {
        **config.model_dump(mode="json"),
        "is_any_step": config.is_any_step,
        "takes_guidance": config.takes_guidance,
    }
    return {
        **{name: values[name] for name in sorted(MODEL_FIELDS)},
        "network": {
            "kind": network.kind,
            "conditions": network.conditions,
            "bounded": network.bounded,
            "has_null_label": network.has_null_label,
            "time_scale": getattr(network, "time_scale", 1.0),
            "fold": network.patch if network.kind == "unet" else 1,  # a DiT divides images into patches itself
        },
    }


def _mlp(network: NetworkModule, config: ModelConfig) -> KacMLP:
    options: Any = config.network
    sizes = (options.width, options.depth, list(network.takes), list(config.sample_shape), config.num_classes)
    component = KacMLP(*sizes)
    component.network.load_state_dict(main_weights(network))
    return component


def _diffusers_model(network: NetworkModule, config: ModelConfig) -> Any:
    return network.get_submodule(str(network.diffusers_name))


COMPONENTS: dict[str, Callable[[NetworkModule, ModelConfig], Any]] = {
    "mlp": _mlp,
    "unet": _diffusers_model,
    "dit": _diffusers_model,
}
"""The component that contains a network's weights, by kind. ``kac_pipeline.VELOCITIES`` calls it."""

"""Folders of diffusers with random weights, and their samplers."""

from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from torch import Tensor, nn

from kac.data import ArrayData

SHAPE = (1, 8, 8)


def unet(
    classes: int | None = None, kind: str = "UNet2DModel", seed: int = 0, roughness: float = 0.2, **options: Any
) -> nn.Module:
    """A U-Net for digits. Its output depends smoothly on image and time, as a trained network's does."""
    torch.manual_seed(seed)
    values = {
        "sample_size": 8,
        "in_channels": 1,
        "out_channels": 1,
        "block_out_channels": (16, 16),
        "down_block_types": ("DownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "UpBlock2D"),
        "norm_num_groups": 8,
        "layers_per_block": 1,
        "num_class_embeds": classes,
        **({} if kind == "UNet2DModel" else {"mid_block_type": "UNetMidBlock2D"}),
    }
    model: Any = getattr(diffusers, kind)(**{**values, **options})
    with torch.no_grad():
        model.time_embedding.linear_2.weight.mul_(0.1)
        model.conv_out.weight.mul_(roughness)
        model.conv_out.bias.fill_(0.5)
    return model.eval()


def dit(classes: int, seed: int = 0, **options: Any) -> nn.Module:
    """A transformer for digits that predicts eps and a variance, as DiT-XL/2 does."""
    torch.manual_seed(seed)
    values = {
        "num_attention_heads": 2,
        "attention_head_dim": 8,
        "in_channels": 1,
        "out_channels": 2,
        "num_layers": 2,
        "sample_size": 8,
        "patch_size": 2,
        "num_embeds_ada_norm": classes,
    }
    return diffusers.DiTTransformer2DModel(**{**values, **options}).eval()


def config_of(source: Any) -> dict[str, Any]:
    """The config of a model or scheduler, as its file has it."""
    values = {name: value for name, value in source.config.items() if not name.startswith("_")}
    return {**values, "_class_name": type(source).__name__}


def write(folder: Path, model: nn.Module, scheduler: Any) -> Path:
    """Write the model with its scheduler. UNet2DModels are written as a pipeline."""
    if isinstance(model, diffusers.UNet2DModel):
        diffusers.DDPMPipeline(model, scheduler).save_pretrained(folder)
    else:
        model.save_pretrained(folder)  # type: ignore[operator]
        scheduler.save_pretrained(folder / "scheduler")
    return folder


def ddim(scheduler: diffusers.DDPMScheduler) -> diffusers.DDIMScheduler:
    """The DDIM sampler with the same betas, in as many steps as there are."""
    options = {"prediction_type": scheduler.config.prediction_type, "clip_sample": False}
    sampler = diffusers.DDIMScheduler(len(scheduler.betas), trained_betas=scheduler.betas.tolist(), **options)
    sampler.set_timesteps(len(scheduler.betas))
    return sampler


@torch.inference_mode()
def sample(model: nn.Module, sampler: Any, z: Tensor, first: int = 0, **labels: Tensor) -> Tensor:
    """Sample deterministically with diffusers, from the sampler's timestep number ``first``."""
    for timestep in sampler.timesteps[first:]:
        scaled = sampler.scale_model_input(z, timestep) if hasattr(sampler, "scale_model_input") else z
        z = sampler.step(model(scaled, timestep, **labels).sample, timestep, z).prev_sample
    return z


def big() -> ArrayData:
    """Images of another size."""
    return ArrayData(np.zeros((20, 1, 28, 28), np.uint8), np.arange(20) % 2)

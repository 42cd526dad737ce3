"""Small autoencoders for tests."""

from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from kac.data import DataConfig, all_rows, open_dataset

SIZES: dict[str, dict[str, Any]] = {
    "AutoencoderKL": {
        "block_out_channels": (8, 16),
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "norm_num_groups": 4,
        "scaling_factor": 0.5,
        "shift_factor": 0.25,
    },
    "AutoencoderTiny": {
        "encoder_block_out_channels": (8, 8),
        "decoder_block_out_channels": (8, 8),
        "num_encoder_blocks": (1, 1),
        "num_decoder_blocks": (1, 1),
    },
    "AutoencoderDC": {
        "attention_head_dim": 4,
        "encoder_block_out_channels": (8, 8),
        "decoder_block_out_channels": (8, 8),
        "encoder_layers_per_block": (1, 1),
        "decoder_layers_per_block": (1, 1),
        "encoder_qkv_multiscales": ((), ()),
        "decoder_qkv_multiscales": ((), ()),
        "scaling_factor": 0.5,
    },
}
"""Options of each class. All map images [channels, 2 n, 2 n] to latents [latent channels, n, n]."""


def make_network(name: str = "AutoencoderKL", channels: int = 1, latent_channels: int = 2, seed: int = 0) -> Any:
    """Return an autoencoder with random weights."""
    import diffusers

    sides = {} if name == "AutoencoderDC" else {"out_channels": channels}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        options = {"in_channels": channels, "latent_channels": latent_channels, **sides, **SIZES[name]}
        return getattr(diffusers, name)(**options)


def write(folder: Path, name: str = "AutoencoderKL", **options: Any) -> str:
    """Write an autoencoder with random weights, and return its folder."""
    make_network(name, **options).save_pretrained(folder)
    return str(folder)


@lru_cache(maxsize=1)
def trained_on_digits() -> Any:
    """Return an ``AutoencoderKL`` of the digits: 8 x 8 pixels to latents [4, 4, 4]. Training takes a few seconds."""
    images = all_rows(open_dataset(DataConfig()).train).images
    network = make_network(latent_channels=4)
    optimizer = torch.optim.AdamW(network.parameters(), 3e-3)
    order = torch.Generator().manual_seed(0)
    for _ in range(150):
        batch = images[torch.randint(len(images), (64,), generator=order)]
        latent = network.encode(batch).latent_dist.mean
        loss = (network.decode(latent).sample - batch).square().mean() + 1e-3 * latent.square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        latent = network.encode(images).latent_dist.mean
    network.register_to_config(scaling_factor=1 / float(latent.std()), shift_factor=float(latent.mean()))
    return network


def write_trained(folder: Path) -> str:
    """Write the trained autoencoder of the digits, and return its folder."""
    trained_on_digits().save_pretrained(folder)
    return str(folder)

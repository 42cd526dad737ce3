"""Load models of diffusers from the content of their files."""

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from kac.util.errors import CheckpointError, one_line


def load_files(class_name: str, contents: Mapping[str, bytes]) -> tuple[Any, dict[str, list[str]]]:
    """Return a diffusers model in float32 on the CPU, and diffusers' lists of ``missing_keys`` and ``unexpected_keys``.

    No code in a file is run: diffusers reads .bin files with ``weights_only=True``.

    Raises:
        CheckpointError: a file is missing or damaged, or a tensor has another size.
    """
    import diffusers

    # diffusers reads only local folders. It draws random weights before it reads the files.
    with tempfile.TemporaryDirectory() as copy, torch.random.fork_rng(devices=[]):
        for name, data in contents.items():
            Path(copy, name).write_bytes(data)
        options = {"local_files_only": True, "low_cpu_mem_usage": False, "output_loading_info": True}
        try:
            model, report = getattr(diffusers, class_name).from_pretrained(copy, **options)
        except Exception as error:  # noqa: BLE001 - diffusers may raise any error for a damaged file
            raise CheckpointError(one_line(str(error).replace(copy, "the folder"), 300)) from None
    return model.float(), report

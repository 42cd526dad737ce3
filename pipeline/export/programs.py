"""Write a network as a program of torch.export or ONNX, with a dynamic batch size."""

import importlib.util
import logging
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from kac.model import Model
from kac.util.errors import ArgumentError

ProgramFormat = Literal["pt2", "onnx"]
ONNX_PACKAGES = ("onnx", "onnxscript")
ONNX_LIMIT = 2**31 - 2**20  # bytes of weights that fit into one ONNX file with its graph; larger weights get their own


def check_packages(format: str) -> None:
    """Raise ``ArgumentError`` if the packages that ``format`` needs are not installed."""
    missing = [name for name in ONNX_PACKAGES if format == "onnx" and importlib.util.find_spec(name) is None]
    if missing:
        raise ArgumentError(
            f"`format` onnx needs {' and '.join(missing)}. Install them: pip install 'distillkac[onnx]'."
        )


def write_programs(folder: Path, model: Model, format: ProgramFormat) -> None:
    """Write ``network.pt2`` or ``network.onnx``, and ``guide.*`` if the model has a guide, into a local folder."""
    for name, network in (("network", model.network), ("guide", model.network.guide)):
        if network is not None:
            program, path = _trace(network, model), folder / f"{name}.{format}"
            if format == "pt2":
                torch.export.save(program, path)
            else:
                logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # otherwise it reports missing torchvision
                names = {name: {0: "batch"} if name == "x" else None for name in _inputs(network, model)}
                onnx: Any = torch.onnx.export(
                    program, dynamo=True, output_names=["velocity"], dynamic_shapes=names, verbose=False
                )
                weights = sum(value.nbytes for value in program.state_dict.values())
                onnx.save(path, external_data=weights > ONNX_LIMIT)


class _Velocity(nn.Module):
    """A network with an argument for each condition, because programs have no ``**conditions``."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(
        self, x: Tensor, t: Tensor, label: Tensor, end_time: Tensor | None = None, guidance: Tensor | None = None
    ) -> Tensor:
        given = {"end_time": end_time, "guidance": guidance}
        conditions = {name: value for name, value in given.items() if value is not None}
        return self.network(x, t, label, **conditions)  # type: ignore[no-any-return]


def _inputs(network: Any, model: Model) -> dict[str, Tensor]:
    """Return example inputs by name. In a batch of 1, PyTorch would fix the size."""
    times, label = {name: torch.ones(2) for name in ("t", *network.takes)}, torch.zeros(2, dtype=torch.int64)
    return {"x": torch.zeros(2, *model.config.sample_shape), "t": times.pop("t"), "label": label, **times}


def _trace(network: Any, model: Model) -> torch.export.ExportedProgram:
    # Above 63 images, diffusers calls contiguous(), which changes no value. So a program for 63 works for any number.
    batch = torch.export.Dim("batch", min=1, max=63)
    inputs = _inputs(network, model)
    shapes = {name: {0: batch} for name in inputs}
    program = torch.export.export(_Velocity(network).eval(), (), inputs, dynamic_shapes=shapes)
    program.range_constraints.clear()
    return program

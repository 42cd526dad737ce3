"""Read a model of diffusers from the folder of a pipeline, or from a model's folder with its ``scheduler/``."""

import hashlib
import json
from typing import Any, NamedTuple

from torch import Tensor

from kac.networks.diffusers_model import MODELS, DiffusersModelConfig
from kac.networks.schedule import read_schedule
from kac.util import files
from kac.util.diffusers_files import load_files
from kac.util.errors import CheckpointError
from kac.util.text import shorten

INDEX_FILE, MODEL_FILE = "model_index.json", "config.json"
SCHEDULER_FILES = ("scheduler/scheduler_config.json", "scheduler_config.json")
COMPONENTS = ("unet", "transformer")
WEIGHTS = (".safetensors", ".bin")


class DiffusersFolder(NamedTuple):
    """The config files of a diffusers model, and where its weights are."""

    path: str
    subfolder: str  # of the model; empty if the model is in the folder itself
    model: dict[str, Any]
    scheduler: dict[str, Any]
    autoencoder: str | None  # folder of the pipeline's autoencoder

    def network(self, sample_shape: tuple[int, ...], num_classes: int) -> DiffusersModelConfig:
        """Return the network's config. Raises ``CheckpointError`` if the model does not fit the data."""
        name, size, channels = self.model["_class_name"], self.model.get("sample_size"), self.model.get("in_channels")
        side = tuple(size) if isinstance(size, list | tuple) else (size, size)
        if sample_shape[0] != channels or (size is not None and sample_shape[1:] != side):
            advice = f" Add --data.autoencoder {self.autoencoder}." if self.autoencoder else ""
            raise CheckpointError(
                f"{self.path}: this model works on samples of shape {[channels, *side]}, but the data have samples of "
                f"shape {list(sample_shape)}. Choose `data` to match, with `data.size` and `data.channels`.{advice}"
            )
        rows = self.model.get("num_class_embeds")
        if name == "DiTTransformer2DModel":  # has a row for the null label, besides its classes
            rows = self.model["num_embeds_ada_norm"] + 1
        if rows not in {None, num_classes, num_classes + 1}:
            raise CheckpointError(
                f"{self.path}: this model has {rows} labels, but the data have {num_classes} classes. Choose the data "
                f"that the model was trained on: {rows} classes, or {rows - 1} classes and a null label."
            )
        labels = "none" if rows is None else "with_null" if rows == num_classes + 1 else "without_null"
        return DiffusersModelConfig(model=self.model, scheduler=self.scheduler, labels=labels)

    def read_weights(self) -> tuple[dict[str, Tensor], str]:
        """Return the model's weights and the sha256 of its files.

        Raises:
            CheckpointError: files are missing or damaged, or tensors are missing, unexpected or of another size.
        """
        below = f"{self.subfolder}/" if self.subfolder else ""
        names = [name for name in files.list_sizes(self.path) if name.startswith(below)]
        names = [name.removeprefix(below) for name in names if "/" not in name.removeprefix(below)]
        ending = next((each for each in WEIGHTS if any(name.endswith(each) for name in names)), None)
        if ending is None:
            raise CheckpointError(f"{self.path}/{below} has no weights (*.safetensors or *.bin). Download it again.")
        names = sorted(name for name in names if name.endswith((ending, ".json")))
        content = {name: files.read_bytes(files.join(self.path, below + name)) for name in names}
        try:
            loaded, report = load_files(self.model["_class_name"], content)
            if wrong := [*report["missing_keys"], *report["unexpected_keys"]]:
                raise CheckpointError(f"tensors are missing or unexpected: {shorten(wrong, 3)}. Download it again.")
        except CheckpointError as error:
            raise CheckpointError(f"{self.path}: the weights do not fit {MODEL_FILE}: {error}") from None
        digest = hashlib.sha256(json.dumps(self.scheduler, sort_keys=True).encode())
        for name in names:
            digest.update(name.encode() + hashlib.sha256(content[name]).digest())
        return loaded.state_dict(), digest.hexdigest()


def find_diffusers_folder(path: str) -> DiffusersFolder | None:
    """Return the diffusers model in the folder ``path``, or None if ``path`` is not such a folder.

    Raises:
        CheckpointError: the model or its scheduler is missing or not supported.
    """
    names = files.list_sizes(path)
    index = _read(path, INDEX_FILE) if INDEX_FILE in names else {}
    if not index and (MODEL_FILE not in names or "_class_name" not in _read(path, MODEL_FILE)):
        if any(f"{name}/{MODEL_FILE}" in names for name in COMPONENTS):
            raise CheckpointError(f"{path} has no {INDEX_FILE}. Download the whole folder, or give the model's folder.")
        return None
    if texts := sorted(name for name in index if name.startswith(("text_encoder", "tokenizer"))):
        raise CheckpointError(
            f"{path} is a text-to-image pipeline ({index['_class_name']}, with {shorten(texts, 3)}), but this project "
            "conditions only on classes. Choose an unconditional or class-conditional model."
        )
    component = next((name for name in COMPONENTS if name in index), "")
    subfolder = component if f"{component}/{MODEL_FILE}" in names else ""
    if MODEL_FILE not in names and not subfolder:
        raise CheckpointError(f"{path} has no {' or '.join(COMPONENTS)}. Supported models are {', '.join(MODELS)}.")
    model = _read(path, f"{subfolder}/{MODEL_FILE}" if subfolder else MODEL_FILE)
    if model.get("_class_name") == "Transformer2DModel" and model.get("norm_type") == "ada_norm_zero":
        model["_class_name"] = "DiTTransformer2DModel"  # its former name
    _check_model(path, model)
    scheduler_file = next((name for name in SCHEDULER_FILES if name in names), None)
    if scheduler_file is None:
        raise CheckpointError(f"{path} has no {SCHEDULER_FILES[0]}. Copy the scheduler of the model's pipeline there.")
    scheduler = _read(path, scheduler_file)
    try:
        read_schedule(scheduler)
    except CheckpointError as error:
        raise CheckpointError(f"{path}/{scheduler_file}: {error}") from None
    autoencoder = files.join(path, "vae") if f"vae/{MODEL_FILE}" in names else None
    return DiffusersFolder(path, subfolder, model, scheduler, autoencoder)


def _check_model(path: str, model: dict[str, Any]) -> None:
    name = model.get("_class_name")
    if name not in MODELS:
        raise CheckpointError(f"{path}: the model {name} is not supported. Supported models are {', '.join(MODELS)}.")
    blocks = [*(model.get("down_block_types") or []), model.get("mid_block_type"), *(model.get("up_block_types") or [])]
    if name == "UNet2DConditionModel" and any("CrossAttn" in str(block) for block in blocks):
        raise CheckpointError(f"{path}: this UNet2DConditionModel attends to text. Choose a model without CrossAttn.")
    if model.get("class_embed_type") is not None:
        kind = model["class_embed_type"]
        raise CheckpointError(f"{path}: class_embed_type {kind} is not supported. Choose a model with class labels.")


def _read(path: str, name: str) -> dict[str, Any]:
    """Read a JSON file, without diffusers' private entries such as its version."""
    try:
        values = json.loads(files.read_bytes(files.join(path, name)))
        return {key: value for key, value in values.items() if key == "_class_name" or not key.startswith("_")}
    except (ValueError, AttributeError):
        raise CheckpointError(f"{path}/{name} is not a JSON object. Copy the folder again.") from None

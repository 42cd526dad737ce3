"""Convert existing weights into a teacher's model folder."""

from typing import NamedTuple

from kac.data import DataDescription
from kac.model import CONFIG_FILE, ModelConfig, teacher_config
from kac.networks import Conditioning, NetworkConfig, NetworkModule, build_network
from kac.networks.adopt import adopt, try_out
from kac.networks.cost import network_cost, short
from kac.networks.diffusers_folder import DiffusersFolder, find_diffusers_folder
from kac.networks.weight_files import read_weights
from kac.path import PathConfig
from kac.util.errors import ArgumentError, CheckpointError
from kac.util.log import log
from pipeline import decode, outputs, tracking
from pipeline.cluster import connection as cluster
from pipeline.config import ConvertSpec


def convert(spec: ConvertSpec, parent: tracking.TrackedRun | None = None) -> ModelConfig:
    """Write a teacher's model folder from a checkpoint, and return its config. A complete folder stays unchanged.

    Raises:
        DistillKacError: the checkpoint cannot be read or does not fit the network and the data, the network's output
            is not a finite velocity, or the folder belongs to another spec or cannot be written.
    """
    spec = cluster.absolute_paths(spec, "out", "checkpoint", "data.root", "data.autoencoder")
    folder = find_diffusers_folder(spec.checkpoint)
    data = decode.open_described("convert", spec.data, is_read=False)
    source = _convert_checkpoint(spec, data) if folder is None else _convert_folder(spec, folder, data)
    content = {"data_sha256": data.sha256, "checkpoint_sha256": source.sha256}
    spec = spec.model_copy(update={"network": source.config, "path": source.path})  # of a folder: what it determines
    if not outputs.begin(spec.out, spec, CONFIG_FILE, **content):
        return outputs.complete_model(spec.stage, spec.out)
    cost = network_cost(source.config, data.sample_shape, data.num_classes)
    with outputs.teacher_run(spec, data, content, parent) as run:
        run.params(cost._asdict())
        fingerprint = spec.fingerprint(**content)
        config = teacher_config(source.config, source.path, spec.data, fingerprint, source.conditioning)
        config = outputs.write_model(spec.out, config, source.network.state_dict(), run)
    log.info(
        f"convert: {spec.checkpoint}{source.description}\n"
        f"convert: wrote {spec.out}: {source.config.kind} of {short(cost.parameters)} parameters, "
        f"{short(cost.flops_per_call, 'FLOP')} per call (weights sha256 {config.weights_sha256[:12]})"
    )
    return config


class _Converted(NamedTuple):
    network: NetworkModule
    config: NetworkConfig
    path: PathConfig
    conditioning: Conditioning
    sha256: str  # of the checkpoint
    description: str


def _convert_checkpoint(spec: ConvertSpec, data: DataDescription) -> _Converted:
    """Load a weights file into the spec's network."""
    samples = (data.sample_shape, data.num_classes)
    unclamped = spec.network.model_copy(update={"bounded": False})
    checkpoint, network = read_weights(spec.checkpoint), build_network(unclamped, *samples)
    try:
        adopted = adopt(network, unclamped, data.sample_shape, checkpoint, spec.key)
        try_out(network, unclamped, *samples)
    except CheckpointError as error:
        raise CheckpointError(f"{spec.checkpoint}: {error}") from error
    where = f", {adopted.key}" if adopted.key else ""
    description = f"{where} (sha256 {checkpoint.sha256[:12]}): {adopted.description}"
    return _Converted(network, spec.network, spec.path, adopted.conditioning, checkpoint.sha256, description)


def _convert_folder(spec: ConvertSpec, folder: DiffusersFolder, data: DataDescription) -> _Converted:
    """Load a folder of diffusers, which determines the network and the path."""
    for name in ("network", "path", "key"):
        if getattr(spec, name) != type(spec).model_fields[name].default:
            raise ArgumentError(f"`{name}` has no effect on a folder of diffusers, which determines it. Remove it.")
    samples = (data.sample_shape, data.num_classes)
    config = folder.network(*samples)
    weights, sha256 = folder.read_weights()
    network = build_network(config, *samples)
    network.get_submodule(str(network.diffusers_name)).load_state_dict(weights)
    try:
        try_out(network, config, *samples)
    except CheckpointError as error:
        raise CheckpointError(f"{spec.checkpoint}: {error}") from error
    model, scheduler = (values["_class_name"] for values in (folder.model, folder.scheduler))
    description = f" (sha256 {sha256[:12]}): {model} with {scheduler}, {config.describe()}"
    return _Converted(network, config, PathConfig(kind="gaussian"), config.conditioning, sha256, description)

"""Convert existing weights into a teacher's model folder."""

from kac.model import CONFIG_FILE, ModelConfig, teacher_config
from kac.networks import build_network
from kac.networks.adopt import adopt, try_out
from kac.networks.cost import network_cost, short
from kac.networks.weight_files import read_weights
from kac.util.errors import CheckpointError
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
    data = decode.open_described("convert", spec.data)
    samples = (data.sample_shape, data.num_classes)
    unclamped = spec.network.model_copy(update={"bounded": False})
    checkpoint, network = read_weights(spec.checkpoint), build_network(unclamped, *samples)
    try:
        adopted = adopt(network, unclamped, data.sample_shape, checkpoint, spec.key)
        try_out(network, unclamped, *samples)
    except CheckpointError as error:
        raise CheckpointError(f"{spec.checkpoint}: {error}") from error
    content = {"data_sha256": data.sha256, "checkpoint_sha256": checkpoint.sha256}
    if not outputs.begin(spec.out, spec, CONFIG_FILE, **content):
        return outputs.complete_model(spec.stage, spec.out)
    cost = network_cost(spec.network, *samples)
    with outputs.teacher_run(spec, data, content, parent) as run:
        run.params(cost._asdict())
        fingerprint = spec.fingerprint(**content)
        config = teacher_config(spec.network, spec.path, spec.data, fingerprint, adopted.conditioning)
        config = outputs.write_model(spec.out, config, network.state_dict(), run)
    where = f", {adopted.key}" if adopted.key else ""
    log.info(
        f"convert: {spec.checkpoint}{where} (sha256 {checkpoint.sha256[:12]}): {adopted.description}\n"
        f"convert: wrote {spec.out}: {spec.network.kind} of {short(cost.parameters)} parameters, "
        f"{short(cost.flops_per_call, 'FLOP')} per call (weights sha256 {config.weights_sha256[:12]})"
    )
    return config

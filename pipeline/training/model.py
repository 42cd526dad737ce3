"""The end of a training: the model folder in the place of the training state."""

from torch import Tensor

from kac import files
from kac.checkpoint import ModelConfig, save_model
from pipeline.outputs import TRAINING_FOLDER, check_owner
from pipeline.tracking import TrackedRun


def write_model(out: str, config: ModelConfig, weights: dict[str, Tensor], run: TrackedRun) -> ModelConfig:
    """Write the model folder ``out``, tag its run, and remove what the training would have gone on from.

    Raises:
        DistillKacError: another job has taken the folder meanwhile.
    """
    check_owner(out, config.fingerprint)
    config = save_model(out, config, weights)
    run.tags({"distillkac.weights_sha256": config.weights_sha256, "distillkac.path": out})
    files.remove_tree(files.join(out, TRAINING_FOLDER))
    return config

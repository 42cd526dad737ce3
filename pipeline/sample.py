"""Draw images from a model folder."""

import io

import numpy as np
import torch

from kac.data.class_names import label_of, list_classes
from kac.model import ModelConfig, load_model
from kac.sampling import BATCH_SIZE, Samples, Sampling, draw, student_sampling, teacher_sampling
from kac.util import files, probes
from kac.util.device import default_device
from kac.util.errors import ArgumentError
from kac.util.log import log
from pipeline.cluster import connection as cluster
from pipeline.config import SampleSpec
from pipeline.report.pictures import sheet


def sample(spec: SampleSpec) -> None:
    """Write ``spec.count`` images to a .png or .npz file.

    A .png file holds a sheet of all images. A .npz file holds ``images`` (float32 in [-1, 1]), ``labels`` (the labels
    given to the network; for an unconditional model the null label, which follows the last class) and, if the classes
    have names, ``class_names``. Images are rounded to 8 bits; with ``spec.raw`` they are the network's outputs.

    Raises:
        DistillKacError: the model does not exist or does not know a label, the file has another extension, or it
            cannot be written.
    """
    out = cluster.absolute(spec.out)
    if not out.endswith((".png", ".npz")):
        raise ArgumentError(f"`out` {spec.out} is neither a .png nor an .npz file. Choose one of these extensions.")
    if spec.raw and out.endswith(".png"):
        raise ArgumentError(f"`raw` needs an .npz file, because a .png has only 8 bits. `out` is {spec.out}.")
    spec = spec.settled(torch.cuda.is_available)
    model = load_model(cluster.absolute(spec.model), default_device())
    sampling = _sampling(spec, model.config)
    probes.check_writable(out.rsplit("/", 1)[0] or "/")
    labels = _labels(spec, model.config)
    made = draw(model, sampling, spec.precision, spec.seed, spec.count, BATCH_SIZE, labels, raw=spec.raw)
    files.write_bytes(out, sheet(made.images.numpy()) if out.endswith(".png") else _npz(made, model.config))
    if model.config.class_names:
        log.info(f"sample: classes, label=name: {list_classes(model.config.class_names)}")
    is_guidance_fixed = model.config.kind == "student" and not model.config.takes_guidance
    guidance = model.config.guidance if is_guidance_fixed else sampling.guidance
    values = ", raw values" if spec.raw else ""
    log.info(f"sample: wrote {out}: {spec.count} images, {sampling.steps} steps, guidance {guidance:g}{values}")


def _labels(spec: SampleSpec, config: ModelConfig) -> tuple[int, ...] | None:
    """Return the numbers of the requested classes, or None for the data's class frequencies."""
    if spec.labels is None:
        return None
    return tuple(label_of(word, config.class_names, config.num_classes) for word in spec.labels)


def _npz(made: Samples, config: ModelConfig) -> bytes:
    sink = io.BytesIO()
    names = {"class_names": np.array(config.class_names)} if config.class_names else {}
    np.savez(sink, images=made.images.numpy(), labels=made.label.numpy(), **names)  # type: ignore[arg-type]
    return sink.getvalue()


def _sampling(spec: SampleSpec, config: ModelConfig) -> Sampling:
    """Return how to sample the model.

    Raises:
        DistillKacError: the student does not support the steps or the guidance, or the teacher cannot be guided.
    """
    if config.kind == "teacher":
        return teacher_sampling(config, spec.guidance, spec.steps, spec.solver)
    return student_sampling(config, spec.steps, spec.guidance)

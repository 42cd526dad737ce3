"""Sample: draw images from a model folder."""

import io

import numpy as np
import torch

from kac.data.class_names import label_of, list_classes
from kac.model import ModelConfig, load_model
from kac.sampling import BATCH_SIZE, Samples, Sampling, draw, student_sampling, teacher_sampling
from kac.util import files, probes
from kac.util.device import default_device
from kac.util.errors import DistillKacError
from kac.util.log import log
from pipeline.cluster import connection as cluster
from pipeline.config.specs import SampleSpec
from pipeline.report.pictures import sheet


def sample(spec: SampleSpec) -> None:
    """Write ``spec.count`` images: a sheet as .png, or ``images`` (float32 in [-1, 1]) and ``labels`` as .npz, with
    ``class_names`` if the classes have names.

    The labels are those that the network was given: of an unconditional model the null label, which follows the last
    class.

    Images are on the 8-bit grid, as they are delivered; with ``spec.raw`` they are what the network made.

    Raises:
        DistillKacError: no such model, labels it does not know, another kind of file, a place that cannot be written.
    """
    out = cluster.absolute(spec.out)
    if not out.endswith((".png", ".npz")):
        raise DistillKacError(f"`out`: expected a .png or .npz file, found {spec.out}")
    if spec.raw and out.endswith(".png"):
        raise DistillKacError(f"`raw`: expected an .npz file as `out`, since a picture has 8 bits, found {spec.out}")
    spec = spec.settled(torch.cuda.is_available)
    model = load_model(cluster.absolute(spec.model), default_device())
    sampling = _sampling(spec, model.config)
    probes.check_writable(out.rsplit("/", 1)[0] or "/")
    labels = _labels(spec, model.config)
    made = draw(model, sampling, spec.precision, spec.seed, spec.count, BATCH_SIZE, labels, raw=spec.raw)
    files.write_bytes(out, sheet(made.images.numpy()) if out.endswith(".png") else _npz(made, model.config))
    if model.config.class_names:
        log.info(f"sample: classes, label=name: {list_classes(model.config.class_names)}")
    built_in = model.config.kind == "student" and not model.config.takes_guidance
    guidance = model.config.guidance if built_in else sampling.guidance
    values = ", raw values" if spec.raw else ""
    log.info(f"sample: wrote {out}: {spec.count} images, {sampling.steps} steps, guidance {guidance:g}{values}")


def _labels(spec: SampleSpec, config: ModelConfig) -> tuple[int, ...] | None:
    """The numbers of the classes that are asked for; None: by the data's frequencies."""
    if spec.labels is None:
        return None
    return tuple(label_of(word, config.class_names, config.num_classes) for word in spec.labels)


def _npz(made: Samples, config: ModelConfig) -> bytes:
    sink = io.BytesIO()
    names = {"class_names": np.array(config.class_names)} if config.class_names else {}
    np.savez(sink, images=made.images.numpy(), labels=made.label.numpy(), **names)  # type: ignore[arg-type]
    return sink.getvalue()


def _sampling(spec: SampleSpec, config: ModelConfig) -> Sampling:
    """How the model is to be sampled.

    Raises:
        DistillKacError: steps or guidance given for a student that was made for others, or guidance of a teacher that
            cannot be guided.
    """
    if config.kind == "teacher":
        return teacher_sampling(config, spec.guidance, spec.steps, spec.solver)
    return student_sampling(config, spec.steps, spec.guidance)

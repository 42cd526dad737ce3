"""Draw images from a model folder."""

import io

import numpy as np
import torch

from kac.data.class_names import label_of, list_classes
from kac.model import load_model
from kac.sampling import BATCH_SIZE, draw, student_sampling, teacher_sampling
from kac.util import files, probes
from kac.util.device import default_device
from kac.util.errors import ArgumentError
from kac.util.log import log
from pipeline.cluster import connection as cluster
from pipeline.config import SampleSpec
from pipeline.report.pictures import sheet


def sample(spec: SampleSpec) -> None:
    """Write ``spec.count`` images to a .png or .npz file.

    A .png file holds one sheet of all images. A .npz file holds ``images`` (float32 in [-1, 1]), ``labels`` and, if the
    classes have names, ``class_names``. An unconditional model's samples have the null label, whose number is the class
    count. Images are rounded to 8 bits, unless ``spec.raw`` requests the network's raw outputs.

    Raises:
        DistillKacError: the model does not exist, does not know a label or does not support the steps or the guidance,
            or the output file has an unknown extension or cannot be written.
    """
    out = cluster.absolute(spec.out)
    if not out.endswith((".png", ".npz")):
        raise ArgumentError(f"`out` {spec.out} is neither a .png nor an .npz file. Choose one of these extensions.")
    if spec.raw and out.endswith(".png"):
        raise ArgumentError(f"`raw` needs an .npz file, because a .png file has only 8 bits. `out` is {spec.out}.")
    spec = spec.settled(torch.cuda.is_available)
    model = load_model(cluster.absolute(spec.model), default_device())
    config, names = model.config, model.config.class_names
    if config.kind == "teacher":
        sampling = teacher_sampling(config, spec.guidance, spec.steps, spec.solver, spec.knot_grid, spec.time_factor)
    elif (spec.solver, spec.knot_grid, spec.time_factor) != ("ab2", "uniform", 1.0):
        raise ArgumentError(
            "`solver`, `knot_grid` and `time_factor` are for teachers. A student has its own steps. Leave them out."
        )
    else:
        sampling = student_sampling(config, spec.steps, spec.guidance)
    probes.check_writable(out.rsplit("/", 1)[0] or "/")
    labels = None if spec.labels is None else tuple(label_of(word, names, config.num_classes) for word in spec.labels)
    made = draw(model, sampling, spec.precision, spec.seed, spec.count, BATCH_SIZE, labels, raw=spec.raw)
    arrays = {"images": made.images.numpy(), "labels": made.label.numpy()}
    if names:
        arrays["class_names"] = np.array(names)
        log.info(f"sample: classes, label=name: {list_classes(names)}")
    if out.endswith(".png"):
        files.write_bytes(out, sheet(arrays["images"]))
    else:
        sink = io.BytesIO()
        np.savez(sink, **arrays)  # type: ignore[arg-type]
        files.write_bytes(out, sink.getvalue())
    is_guidance_fixed = config.kind == "student" and not config.takes_guidance
    guidance = config.guidance if is_guidance_fixed else sampling.guidance
    values = ", raw values" if spec.raw else ""
    log.info(f"sample: wrote {out}: {spec.count} images, {sampling.steps} steps, guidance {guidance:g}{values}")

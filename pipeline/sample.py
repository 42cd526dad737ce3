"""Sample: draw images from a model folder."""

import io

import numpy as np

from kac import files
from kac.checkpoint import ModelConfig, load_model
from kac.device import default_device
from kac.errors import DistillKacError
from kac.sampling import Sampling, draw, student_sampling, teacher_sampling
from pipeline import cluster
from pipeline.config import SampleSpec
from pipeline.pictures import sheet

BATCH_SIZE = 500


def sample(spec: SampleSpec) -> None:
    """Write ``spec.count`` images: a sheet as .png, or ``images`` (float32 in [-1, 1]) and ``labels`` as .npz.

    Raises:
        DistillKacError: no such model, labels it does not know, another kind of file, a place that cannot be written.
    """
    out = cluster.absolute(spec.out)
    if not out.endswith((".png", ".npz")):
        raise DistillKacError(f"--out: expected a .png or .npz file, found {spec.out}")
    model = load_model(cluster.absolute(spec.model), default_device())
    sampling = _sampling(spec, model.config)
    files.check_writable(out.rsplit("/", 1)[0])
    made = draw(model, sampling, spec.precision, spec.seed, spec.count, BATCH_SIZE, spec.labels)
    pixels = made.images.clamp(-1, 1).numpy()
    if out.endswith(".png"):
        data = sheet(pixels)
    else:
        sink = io.BytesIO()
        np.savez(sink, images=pixels.astype(np.float32), labels=made.label.numpy())
        data = sink.getvalue()
    files.write_bytes(out, data)
    guidance = model.config.guidance or sampling.guidance
    print(f"sample: wrote {out}: {spec.count} images, {sampling.steps} steps, guidance {guidance:g}", flush=True)


def _sampling(spec: SampleSpec, config: ModelConfig) -> Sampling:
    """How the model is to be sampled.

    Raises:
        DistillKacError: steps or guidance given for a student that was made for others.
    """
    if config.kind == "teacher":
        return teacher_sampling(spec.guidance, spec.steps, spec.solver)
    for option in ("steps", "guidance"):
        asked, built_in = getattr(spec, option), getattr(config, option)
        if asked is not None and asked != built_in:
            raise DistillKacError(
                f"--{option}: expected {built_in}, which is built into the student {spec.model}, found {asked}"
            )
    return student_sampling(config)

"""Sample: draw images from a model folder."""

import io

import numpy as np
import torch

from kac import files
from kac.checkpoint import load_model
from kac.errors import DistillKacError
from pipeline import cluster
from pipeline.config import SampleSpec
from pipeline.generate import generate, how_to_sample, starts
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
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = load_model(cluster.absolute(spec.model), device)
    how = how_to_sample(model, spec.guidance, spec.steps, spec.solver, spec.model)
    files.check_writable(out.rsplit("/", 1)[0])
    images, labels = [], []
    for first in range(0, spec.count, BATCH_SIZE):
        noise, label = starts(model, spec.seed, range(first, min(first + BATCH_SIZE, spec.count)), spec.labels)
        images.append(generate(model, noise.to(device), label.to(device), how).x.cpu())
        labels.append(label)
    pixels, classes = torch.cat(images).clamp(-1, 1).numpy(), torch.cat(labels).numpy()
    if out.endswith(".png"):
        data = sheet(pixels)
    else:
        sink = io.BytesIO()
        np.savez(sink, images=pixels.astype(np.float32), labels=classes)
        data = sink.getvalue()
    files.write_bytes(out, data)
    print(f"sample: wrote {out}: {spec.count} images, {how.steps} steps, guidance {how.guidance:g}", flush=True)

"""Samples of models, real images, and the features of both, computed in chunks and cached.

CACHE/samples/<fingerprint>/<first>-<last>.npz      samples of a model from one noise seed, or decoded images: images
                                                    (uint8) or points (float32), labels, nfe, seconds
CACHE/features/<space>/<fingerprint>/<...>.npy      features of these samples, or of real images
CACHE/reference/<fingerprint>.safetensors           statistics of the features of all training images

A fingerprint covers everything that determines the content (weights, sampling, noise; data; feature network), so cached
files are never stale. Actors draw the chunks and compute their features, because the driver may lack the GPU or the
package that a feature network needs. On several nodes, the cache must be a folder that all nodes share, or on S3.
"""

import functools
import io
import zipfile
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from kac.conditioning import known_classes
from kac.data import DataConfig, open_autoencoder, open_dataset
from kac.metrics import Evaluated, Reference, Statistics
from kac.metrics.classifier import Classifier
from kac.metrics.features import FeatureSpace, check_features
from kac.metrics.statistics import KEPT_ROWS
from kac.model import Model, ModelConfig, deliver, load_model
from kac.precision import Precision
from kac.sampling import Samples, Sampling, draw
from kac.util import files
from kac.util.cache import VARIABLE, cache_folder
from kac.util.device import default_device
from kac.util.errors import DistillKacError, one_line
from kac.util.fingerprint import fingerprint, hashed_values
from kac.util.images import delivered, from_bytes, is_image, to_bytes
from pipeline.config import EvaluateSpec
from pipeline.evaluate.inputs import Candidate

CHUNK_ROWS = 1000
"""Samples per chunk."""


class Drawn(ABC):
    """Samples that are computed once, and then read from the cache."""

    @property
    @abstractmethod
    def fingerprint(self) -> str:
        """A hash of everything that determines the samples."""

    @abstractmethod
    def draw(self, ids: range) -> Samples:
        """Compute a chunk's samples."""

    def file(self, ids: range) -> str:
        """A chunk's file in the cache."""
        return cache_folder("samples", self.fingerprint, _name(ids, "npz"))

    def rows(self, ids: range) -> Samples:
        """Read a chunk's samples from the cache. Raises ``DistillKacError`` if the file is missing or damaged."""
        with _read_cached(self.file(ids)) as data, np.load(data, allow_pickle=False) as arrays:
            images, label = (torch.from_numpy(arrays[name]) for name in ("images", "labels"))
            nfe, seconds = int(arrays["nfe"]), float(arrays["seconds"])
        return Samples(from_bytes(images) if images.dtype == torch.uint8 else images, label, nfe, seconds)

    def make(self, ids: range) -> None:
        """Compute a chunk's samples and write them to the cache."""
        drawn = self.draw(ids)
        images = to_bytes(drawn.images) if is_image(tuple(drawn.images.shape[1:])) else drawn.images
        sink = io.BytesIO()
        np.savez(sink, images=images, labels=drawn.label, nfe=drawn.nfe, seconds=drawn.seconds)
        files.write_bytes(self.file(ids), sink.getvalue())


@dataclass(frozen=True)
class ModelSamples(Drawn):
    """A model's samples 0 to ``count`` - 1 from one noise seed."""

    path: str
    config: ModelConfig
    sampling: Sampling
    precision: Precision
    seed: int
    count: int
    batch_size: int

    @functools.cached_property
    def fingerprint(self) -> str:
        """A hash of everything that determines the samples. Batch size, count and device are not part of it."""
        config = self.config
        return fingerprint(
            {
                "weights": config.weights_sha256,
                **({"autoencoder": config.autoencoder_sha256} if config.autoencoder_sha256 else {}),
                "network": hashed_values(config.network),
                "path": hashed_values(config.path),
                "class_frequencies": config.class_frequencies,
                **({} if known_classes(config) else {"labels": "null"}),
                "sampling": self.sampling._asdict(),
                "precision": hashed_values(self.precision),
                "seed": self.seed,
            }
        )

    def draw(self, ids: range) -> Samples:
        """Draw a chunk's samples.

        Raises ``DistillKacError`` if the model has changed or returns values that are not finite.
        """
        model = _model(self.path, self.config.weights_sha256)
        return draw(model, self.sampling, self.precision, self.seed, len(ids), self.batch_size, first=ids.start)


@dataclass(frozen=True)
class RealImages:
    """The first ``count`` images of a split, in a fixed random order."""

    data: DataConfig
    sha256: str  # hash of the data
    split: Literal["train", "held_out"]
    count: int

    @functools.cached_property
    def fingerprint(self) -> str:
        """A hash of the images and their order."""
        return fingerprint({"data": self.sha256, "split": self.split, "order": "permutation 0"})

    def rows(self, ids: range) -> Samples:
        """Return the images at positions ``ids`` of the random order, clipped and rounded like delivered samples."""
        split = getattr(open_dataset(self.data.images), self.split)
        order = torch.randperm(len(split), generator=torch.Generator().manual_seed(0))
        images, label = split.rows(order[ids.start : ids.stop])
        return Samples(delivered(images), label, 0, 0.0)


@dataclass(frozen=True)
class DecodedImages(Drawn):
    """Real images, encoded and decoded by the autoencoder of a model: the floor of models in its latents."""

    real: RealImages
    config: ModelConfig
    count: int

    @functools.cached_property
    def fingerprint(self) -> str:
        """A hash of the images and the autoencoder."""
        return fingerprint({"images": self.real.fingerprint, "autoencoder": self.config.autoencoder_sha256})

    def draw(self, ids: range) -> Samples:
        """Encode and decode a chunk's images."""
        images, label, nfe, seconds = self.real.rows(ids)
        latents = open_autoencoder(str(self.config.data.autoencoder)).encode(images.to(default_device()))
        return Samples(deliver(self.config, latents), label, nfe, seconds)


Source = ModelSamples | RealImages | DecodedImages


class Comparison(NamedTuple):
    """The models and the real images of an evaluation, and the feature spaces that compare them."""

    spec: EvaluateSpec
    candidates: list[Candidate]
    spaces: list[FeatureSpace]
    train: RealImages
    held_out: RealImages
    decoded: DecodedImages | None = None  # the held-out images through the autoencoder; None for models in pixels

    def source(self, candidate: Candidate, seed: int) -> ModelSamples:
        """A candidate's samples from one noise seed."""
        _, path, config, _, sampling = candidate
        return ModelSamples(path, config, sampling, self.spec.precision, seed, self.spec.samples, self.spec.batch_size)

    @property
    def seeds(self) -> tuple[int, ...]:
        """The noise seeds."""
        return tuple(range(self.spec.seed, self.spec.seed + self.spec.seeds))


class Chunk(NamedTuple):
    """The unit of work: consecutive samples of a source."""

    source: Source
    ids: range

    def make(self, spaces: Iterable[FeatureSpace]) -> None:
        """Compute the samples and features that are missing from the cache, and write them to it."""
        source, ids = self
        if isinstance(source, Drawn) and not files.exists(source.file(ids)):
            source.make(ids)
        for space in spaces:
            path = self._features_file(space)
            if not space.is_cheap and not files.exists(path):
                sink = io.BytesIO()
                np.save(sink, space(source.rows(ids).images).numpy())
                files.write_bytes(path, sink.getvalue())

    def features(self, space: FeatureSpace, images: Tensor) -> Tensor:
        """The features [rows, width] of the chunk's ``images``, computed if the space is cheap, otherwise cached."""
        if space.is_cheap:
            return space(images)
        path = self._features_file(space)
        with _read_cached(path) as data:
            vectors = torch.from_numpy(np.load(data, allow_pickle=False))
        return check_features(f"{space.option} (cached in {path})", vectors, len(self.ids))

    def _features_file(self, space: FeatureSpace) -> str:
        return cache_folder("features", space.fingerprint, self.source.fingerprint, _name(self.ids, "npy"))


def chunks(source: Source) -> list[Chunk]:
    """All chunks of a source."""
    starts = range(0, source.count, CHUNK_ROWS)
    return [Chunk(source, range(start, min(start + CHUNK_ROWS, source.count))) for start in starts]


def unfinished(source: Source, spaces: Iterable[FeatureSpace]) -> list[Chunk]:
    """The chunks whose samples or features are not in the cache."""
    of_spaces = [(cache_folder("features", s.fingerprint, source.fingerprint), "npy") for s in spaces if not s.is_cheap]
    of_samples = [(cache_folder("samples", source.fingerprint), "npz")] if isinstance(source, Drawn) else []
    cached = [(set(files.list_sizes(folder)), ending) for folder, ending in (*of_spaces, *of_samples)]
    return [chunk for chunk in chunks(source) if any(_name(chunk.ids, ending) not in names for names, ending in cached)]


def gather(
    source: Source,
    spaces: Sequence[FeatureSpace],
    reference: Reference,
    teacher: ModelSamples | None = None,
    teacher_metrics: dict[str, float] | None = None,
) -> Evaluated:
    """Read the chunks of a source from the cache, and return what the metrics need.

    Args:
        spaces: feature spaces, which must include pixels.
        teacher: for a student, the samples of its teacher from the same noise.
        teacher_metrics: the metrics of the teacher's samples.
    """
    is_model = isinstance(source, ModelSamples)
    has_classes = not isinstance(source, ModelSamples) or bool(known_classes(source.config))
    statistics: dict[str, Statistics] = {}
    right, squares, values, nfe, speeds = None, 0.0, 0, 0, []
    for chunk in chunks(source):
        images, label, nfe, seconds = source.rows(chunk.ids)
        speeds += [len(label) / seconds] if seconds else []
        for space in spaces:
            vectors = chunk.features(space, images)
            # The cache may have features of an earlier version of a network from an import path.
            space.check_widths(vectors.shape[1], len(reference.train[space.name].moments.mean))
            statistics.setdefault(space.name, Statistics(vectors.shape[1], reference.floor_count or 0)).add(vectors)
            if isinstance(space.network, Classifier) and has_classes:
                right = (right or 0) + int((space.network.labels(vectors) == label).sum())
        if teacher is not None:
            gap = images - teacher.rows(chunk.ids).images
            squares, values = squares + float(gap.double().square().sum()), values + gap.numel()
    return Evaluated(
        statistics,
        reference,
        label_agreement=None if right is None else right / source.count,
        endpoint_error=(squares / values) ** 0.5 if values else None,
        nfe=nfe if is_model else None,
        speed=median(speeds) if is_model else None,  # the first chunk's time may include compilation
        teacher=teacher_metrics,
    )


def training_statistics(train: RealImages, space: FeatureSpace) -> Statistics:
    """The statistics of all training images, read from the cache or computed from cached features."""
    path = statistics_file(train, space)
    try:
        return Statistics.from_bytes(files.read_bytes(path), train.count)
    except FileNotFoundError:
        parts = [chunk.features(space, train.rows(chunk.ids).images) for chunk in chunks(train)]
        space.check_widths(*(part.shape[1] for part in parts))
        statistics = Statistics.of(parts)
    files.write_bytes(path, statistics.to_bytes())
    return statistics


def statistics_file(train: RealImages, space: FeatureSpace) -> str:
    """The cache file of ``training_statistics``."""
    name = fingerprint({"images": train.fingerprint, "space": space.fingerprint, "kept": KEPT_ROWS})
    return cache_folder("reference", f"{name}.safetensors")


def _name(ids: range, ending: str) -> str:
    return f"{ids.start:08d}-{ids.stop - 1:08d}.{ending}"


@contextmanager
def _read_cached(path: str) -> Iterator[io.BytesIO]:
    """Open a cached file for numpy. If the file is missing or damaged, raise ``DistillKacError``."""
    try:
        yield io.BytesIO(files.read_bytes(path))
    except FileNotFoundError:
        raise DistillKacError(
            f"{path} is missing, although the actors computed it. On several nodes, set {VARIABLE} to a folder that "
            "all nodes share, or to an s3:// prefix."
        ) from None
    except (ValueError, EOFError, KeyError, zipfile.BadZipFile, zlib.error) as error:
        raise DistillKacError(
            f"{path} in the cache is damaged ({one_line(error, 80)}). Delete it and run the same command again."
        ) from None


@functools.lru_cache(maxsize=1)
def _model(path: str, weights_sha256: str) -> Model:
    torch.compiler.reset()  # PyTorch limits compiled variants, and the previous model's variants would still count
    model = load_model(path, default_device())
    if model.config.weights_sha256 != weights_sha256:
        raise DistillKacError(f"{path}: the weights changed during the evaluation. Run the same command again.")
    return model

"""Small datasets with known pixels, in published formats."""

import gzip
import io
import pickle
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image


def pixels(count: int, channels: int = 3, size: int = 8, seed: int = 0) -> np.ndarray:
    """Return noise [count, channels, size, size], uint8."""
    return np.random.default_rng(seed).integers(0, 256, (count, channels, size, size), dtype=np.uint8)


def idx_bytes(values: np.ndarray) -> bytes:
    """Return an IDX file of uint8 values."""
    header = bytes((0, 0, 8, values.ndim)) + np.array(values.shape, ">u4").tobytes()
    return header + values.astype(np.uint8).tobytes()


def write_idx(root: Path, images: np.ndarray, labels: np.ndarray, held_out: int, packed: bool = False) -> Path:
    """Write greyscale images [count, 1, h, w] as four IDX files. The last ``held_out`` images are the test images."""
    root.mkdir(parents=True, exist_ok=True)
    for part, which in (("train", slice(None, -held_out)), ("t10k", slice(-held_out, None))):
        for name, values in (("images-idx3", images[which, 0]), ("labels-idx1", labels[which])):
            data = idx_bytes(values)
            path = root / f"{part}-{name}-ubyte{'.gz' if packed else ''}"
            path.write_bytes(gzip.compress(data) if packed else data)
    return root


def cifar_batches(images: np.ndarray, labels: Sequence[int], protocol: int = 2) -> dict[str, bytes]:
    """Return six pickles as in the published archive, for images [6 n, 3, 32, 32]."""
    names = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]
    batches = {}
    for name, part, part_labels in zip(names, np.split(images, 6), np.split(np.asarray(labels), 6), strict=True):
        content = {b"data": part.reshape(len(part), -1), b"labels": part_labels.tolist(), b"batch_label": name.encode()}
        batches[name] = pickle.dumps(content, protocol)
    return batches


def write_archive(path: Path, batches: dict[str, bytes]) -> Path:
    """Write these files to a tar.gz, in a folder named as in the published archive."""
    with tarfile.open(path, "w:gz") as archive:
        for name, data in batches.items():
            member = tarfile.TarInfo(f"cifar-10-batches-py/{name}")
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return path


def encoded(image: np.ndarray, ending: str = "png", **options: Any) -> bytes:
    """Encode an image [channels, h, w] in an image format."""
    buffer = io.BytesIO()
    picture = Image.fromarray(image[0] if len(image) == 1 else image.transpose(1, 2, 0))
    picture.save(buffer, {"jpg": "jpeg"}.get(ending, ending), **options)
    return buffer.getvalue()


def write_folder(root: Path, images: np.ndarray, labels: Sequence[int], names: str = "abcdefghij") -> Path:
    """Write ROOT/CLASS/IMAGE.png."""
    for i, (image, label) in enumerate(zip(images, labels, strict=True)):
        folder = root / names[label]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{i:05d}.png").write_bytes(encoded(image))
    return root


def write_parquet(path: Path, images: np.ndarray, labels: Sequence[int] | None, rows: int = 100) -> Path:
    """Write one Parquet file as Hugging Face does: each image is a struct of bytes and path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    columns = {"image": pa.array([{"bytes": encoded(image), "path": f"{i}.png"} for i, image in enumerate(images)])}
    if labels is not None:
        columns["label"] = pa.array(labels, pa.int64())
    pq.write_table(pa.table(columns), path, row_group_size=rows)
    return path
